"""Train a model of full width from random weights: exact, the paper's PAMM, the whole model.

    python examples/benchmarks/pretrain.py --device cuda --seconds 300
    python examples/benchmarks/pretrain.py --model llama-60m --rules qkv=pamm:64 linear=subspace

All arms start from the same weights, see the same batches of real text as bytes, and alternate, as
many steps as fit into --seconds: the learning rate's schedule is of exactly so many. The table has
losses, and the time that a step took by the exact arm's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import cli, machine, tables, worker
from examples.benchmarks.arms import EVERY_ARM, REFERENCE, WHOLE, Arm, by_name
from examples.benchmarks.models import DTYPES, SHAPES, Case
from examples.benchmarks.timing import paired_ratios, quartiles

RULES = ("qkv=pamm:64", "qkv=pamm:256", "qkv=pamm:512", WHOLE)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama-60m")
    parser.add_argument("--rules", nargs="+", help=f"one arm each (default: {'; '.join(RULES)})")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", default=[], choices=[arm.name for arm in EVERY_ARM],
        help="by their names in arms.py, in place of rules; ends where one is not what it is named",
    )  # fmt: skip
    parser.add_argument("--layers", type=cli.positive, help="default: the model's")
    parser.add_argument("--width", type=cli.positive, help="default: the model's")
    parser.add_argument("--batch", type=cli.positive, default=64, help="sequences a step")
    parser.add_argument("--sequence", type=cli.positive, default=256)
    parser.add_argument("--steps", type=cli.positive, default=20_000, help="at most")
    parser.add_argument("--seconds", type=float, help="take as many steps as fit; default: --steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default=machine.default_device())
    parser.add_argument("--base", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain.json"))
    return parser.parse_args(arguments)


HEAD = ("arm", "training loss", "validation loss", "above exact", "step, by exact (quartiles)")


def rows(runs: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table."""
    exact = runs[REFERENCE]
    return [
        [
            name,
            f"{run['train_loss']:.4f}",
            f"{run['validation_loss']:.4f}",
            f"{run['validation_loss'] - exact['validation_loss']:+.4f}",
            str(quartiles(paired_ratios(run["seconds"], exact["seconds"]))),
        ]
        for name, run in runs.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    machine.require(args.device)
    shape = SHAPES[args.model]._replace(sequence=args.sequence, vocabulary=257)
    given = {"layers": args.layers, "width": args.width}
    case = Case(
        model=args.model,
        shape=shape._replace(**{name: value for name, value in given.items() if value}),
        batch=args.batch,
        device=args.device,
        dtype=args.dtype,
        seed=args.seed,
        base=args.base,
    )
    record: dict[str, Any] = {
        "command": machine.command(),
        "environment": machine.facts(args.device),
        "cuts": case.cuts(),
    }
    rules = args.rules or ([] if args.arms else RULES)
    arms = [Arm(REFERENCE), *(Arm(each, rules=each) for each in rules), *map(by_name, args.arms)]
    record["runs"] = worker.quality(case, arms, args.steps, args.lr, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    steps = len(record["runs"][REFERENCE]["losses"])
    print(f"{case.cuts()}; {steps:,} steps, seed {args.seed}\n")
    print("\n".join(tables.markdown(HEAD, rows(record["runs"]))))
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
