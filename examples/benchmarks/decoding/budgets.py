"""Accuracy and loss of a model that recalls, by method and budget of its cache.

    python examples/benchmarks/decoding/budgets.py recall-seed0 --lengths 1024 4096

The context is read whole; then come questions, each answered (with the right answer, whatever the
model says) before the next, and a piece of the text that follows, token by token through the cache.
What a method drops it drops before it knows what will be asked. All methods choose in every layer
(whole_layers=0), where the papers leave the first two of many layers whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf
from torch import Tensor

from examples.benchmarks import cli, corpus, machine, tables
from examples.benchmarks.decoding.recall import ANSWER, VALUES, question
from pamm_compile import decoding

METHODS: dict[str, Callable[[int], Any]] = {
    "clusters of 80": lambda n: decoding.ClusterCache(n, whole_layers=0),
    "clusters of 16": lambda n: decoding.ClusterCache(n, tokens_per_cluster=16, whole_layers=0),
    "clusters of 80 of a sample": lambda n: decoding.ClusterCache(n, sample=1024, whole_layers=0),
    "pages": lambda n: decoding.PageCache(n, whole_layers=0),
    "policy": lambda n: decoding.EvictionCache(budget=n),
    "heavy hitters": decoding.HeavyHitterCache,
    "norms": lambda n: decoding.NormCache(n, whole_layers=0),
    "window": decoding.WindowCache,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="folders that recall.py wrote")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=cli.positive, default=[1024, 4096])
    parser.add_argument("--budgets", nargs="+", type=float, default=[1 / 4, 1 / 8, 1 / 16, 1 / 32])
    parser.add_argument("--contexts", type=cli.positive, default=4, help="contexts a model")
    parser.add_argument("--facts", type=cli.positive, default=16, help="planted and asked for")
    parser.add_argument("--text", type=cli.positive, default=16, help="tokens of text after them")
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, a record each")
    return parser.parse_args(arguments)


@torch.no_grad()
def ask(
    model: Any, cache: Any, contexts: Tensor, asked: Tensor, answers: Tensor, text: Tensor
) -> dict[str, float]:
    """Read contexts [b, n], ask for facts [b, f] in turn, then read text [b, t]."""
    model(contexts, cache=cache, use_cache=True, logits_to_keep=1)
    right, answer_loss, text_loss = [], [], []

    def step(token: Tensor) -> Tensor:
        logits: Tensor = model(token[:, None], cache=cache, use_cache=True).logits[:, 0]
        return logits.log_softmax(-1)

    for asks, answer in zip(asked.T, answers.T, strict=True):
        scores = step(asks)
        best = scores[:, ANSWER : ANSWER + VALUES].argmax(-1) + ANSWER
        right.append(best == answer)
        answer_loss.append(-scores.gather(1, answer[:, None]))
        bytes_held = decoding.cache_bytes(cache)
        step(answer)
    for token, following in zip(text.T[:-1], text.T[1:], strict=True):
        text_loss.append(-step(token).gather(1, following[:, None]))
    return {
        "accuracy": float(torch.stack(right).float().mean()),
        "answer_loss": float(torch.stack(answer_loss).mean()),
        "text_loss": float(torch.stack(text_loss).mean()),
        "cache_bytes": float(bytes_held),
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = machine.facts(threads=args.threads)
    cli.announce(facts)
    text = corpus.Text().validation
    rows = []
    for folder in args.models:
        model = decoding.attach(hf.AutoModelForCausalLM.from_pretrained(folder).eval())
        for length in args.lengths:
            generator = torch.Generator().manual_seed(length)
            drawn = [
                question(text, length, args.facts, generator, args.text)
                for _ in range(args.contexts)
            ]
            data = [torch.cat([q.context for q in drawn])]
            data += [torch.stack([getattr(q, n) for q in drawn]) for n in ("asked", "answers")]
            data.append(torch.stack([q.text for q in drawn]))
            runs: list[tuple[str, float, Any]] = [("full", 1.0, hf.DynamicCache())]
            for name in args.methods:
                runs += [(name, b, METHODS[name](round(length * b))) for b in args.budgets]
            for name, share, cache in runs:
                record = {
                    "model": folder.name,
                    "length": length,
                    "method": name,
                    "budget": round(length * share),
                    **ask(model, cache, *data),
                }
                print(json.dumps(record), flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({**record, "facts": facts}) + "\n")
                rows.append(record)
    header = ["model", "length", "method", "budget", "accuracy", "answer loss", "text loss", "MiB"]
    body = [
        [
            str(r["model"]),
            str(r["length"]),
            str(r["method"]),
            str(r["budget"]),
            f"{r['accuracy']:.2f}",
            f"{r['answer_loss']:.3f}",
            f"{r['text_loss']:.3f}",
            tables.mebibytes(r["cache_bytes"] / args.contexts),
        ]
        for r in rows
    ]
    print(tables.text(header, body))


if __name__ == "__main__":
    cli.run(main)
