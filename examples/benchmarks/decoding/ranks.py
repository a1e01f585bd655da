"""Loss by rank of factored keys, before and after fine-tuning; and thin keys from nothing.

    python examples/benchmarks/decoding/ranks.py recall-seed0 --ranks 32 16 8 4
    python examples/benchmarks/decoding/ranks.py --from-nothing 8 --steps 200

Fine-tuning trains queries and keys alone. From nothing two models are trained on the same batches
with the same number of steps, one with whole keys and one with thin ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf

from examples.benchmarks import cli, corpus, machine, timing
from examples.benchmarks.decoding import recall
from pamm_compile import decoding


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders that recall.py wrote")
    parser.add_argument("--ranks", nargs="+", type=cli.positive, default=[32, 16, 8, 4])
    parser.add_argument("--rotary", nargs="+", choices=("before", "pairs"), default=["before"])
    parser.add_argument("--tune", type=cli.positive, default=40, help="steps of fine-tuning")
    parser.add_argument("--length", type=cli.positive, default=512, help="of its windows")
    parser.add_argument("--windows", type=cli.positive, default=4, help="a step")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--from-nothing", type=cli.positive, help="rank; trains two models")
    parser.add_argument("--steps", type=cli.positive, default=200, help="of those two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, a record each")
    return parser.parse_args(arguments)


@torch.no_grad()
def losses(model: Any, text: Any, length: int, windows: int = 8) -> dict[str, float]:
    """Loss of answers and of text on unseen files, and the share of answers that are right."""
    ids, weight = recall.batch(text, length, windows, torch.Generator().manual_seed(1))
    model.eval()
    logits = model(ids, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(windows, -1)
    answers = weight[:, 1:] > 1
    right = (logits.argmax(-1) == ids[:, 1:])[answers]
    return {
        "answer_loss": float(each[answers].mean()),
        "text_loss": float(each[~answers].mean()),
        "accuracy": float(right.float().mean()),
    }


def step_times(
    models: dict[int | None, Any], text: Any, seed: int, rounds: int = 15
) -> dict[int | None, list[float]]:
    """Times of a forward and a backward pass, models in turn; their weights stay as they are."""
    ids, weight = recall.batch(text, 64, 32, torch.Generator().manual_seed(seed))
    names = list(models)
    found: dict[int | None, list[float]] = {name: [] for name in names}
    for round_ in range(-1, rounds):
        for at in timing.in_turn([str(i) for i in range(len(names))], max(round_, 0)):
            model = models[names[int(at)]]

            def step(model: Any = model) -> None:
                recall.weighted_loss(model, ids, weight).backward()
                model.zero_grad()

            taken = timing.seconds(step, torch.device("cpu"))
            # The round before the first one warms up.
            if round_ >= 0:
                found[names[int(at)]].append(taken)
    return found


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = machine.facts(threads=args.threads)
    cli.announce(facts)
    text = corpus.Text()
    options = {**cli.options(args), "models": [folder.name for folder in args.models]}
    # Where a record was written says nothing of what it holds.
    del options["out"]

    def note(**record: Any) -> None:
        print(json.dumps(record), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**record, "options": options, **facts}) + "\n")

    for folder in args.models:
        whole = hf.AutoModelForCausalLM.from_pretrained(folder)
        note(model=folder.name, rank=None, **losses(whole, text.validation, args.length))
        for rotary in args.rotary:
            for rank in args.ranks:
                model = hf.AutoModelForCausalLM.from_pretrained(folder)
                decoding.factor_keys(model, rank, rotary=rotary)
                about = {"model": folder.name, "rotary": rotary, "rank": rank}
                note(**about, tuned=0, **losses(model, text.validation, args.length))
                chosen = decoding.train_queries_and_keys(model)
                stages = [(args.length, args.windows, args.tune)]
                recall.train(model, chosen, text.train, stages, args.seed, args.rate, show=False)
                note(**about, tuned=args.tune, **losses(model, text.validation, args.length))
    if args.from_nothing:
        stages = [(64, 32, args.steps)]
        models: dict[int | None, Any] = {}
        trained = {}
        for rank in (None, args.from_nothing):
            torch.manual_seed(args.seed)
            models[rank] = model = recall.build("llama")
            if rank:
                decoding.thin_keys(model, rank)
            parameters = list(model.parameters())
            trained[rank] = recall.train(model, parameters, text.train, stages, args.seed, 2e-3)
        seconds = step_times(models, text.train, args.seed)
        for rank, model in models.items():
            note(
                from_nothing=True,
                rank=rank,
                parameters=sum(p.numel() for p in model.parameters()),
                seconds=seconds[rank],
                train_loss=trained[rank][-1]["loss"],
                **losses(model, text.validation, 64, 64),
            )


if __name__ == "__main__":
    cli.run(main)
