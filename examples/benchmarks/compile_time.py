"""Measure the time of compiling: exact torch.compile against our backend, cold, in pairs.

    python examples/benchmarks/compile_time.py                     # half an hour on a quiet machine
    python examples/benchmarks/compile_time.py --models gpt2-96 --rounds 1
    python examples/benchmarks/compile_time.py --only layers

Cold: the first forward and backward pass in a process of its own with an empty cache directory.
Both arms of a round run one after the other, and the ratio of a round is what is reported, so that
a machine that slows down slows both; which goes first alternates. "CPU" is the time that all cores
spent on it, compilers included, and stands other work on the machine better than the wall clock.

--only layers: how long the pass itself takes by the number of layers, up to 500, nothing generated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import cli, machine, tables, worker
from examples.benchmarks.arms import REFERENCE, by_name
from examples.benchmarks.models import SHAPES, Case, Shape
from examples.benchmarks.processes import Processes
from examples.benchmarks.timing import paired_ratios, quartiles

CASES: dict[str, tuple[str, Shape, int]] = {
    "gpt2-96": ("gpt2", Shape("gpt2", 96, 12, 4, 384, 257, 128), 4),
    "gpt2": ("gpt2", SHAPES["gpt2"]._replace(vocabulary=257, sequence=256), 2),
    "llama-60m": ("llama-60m", SHAPES["llama-60m"]._replace(vocabulary=257), 2),
    "roberta": ("roberta", SHAPES["roberta"]._replace(vocabulary=257, sequence=256), 2),
    "bert-384": ("roberta", Shape("roberta", 384, 6, 12, 1536, 257, 128), 8),
}
"""What it is named after, the sizes, and the sequences a step."""
COLUMNS = {"seconds": "wall", "cpu_seconds": "CPU"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["gpt2-96", "llama-60m"])
    parser.add_argument("--arms", nargs="+", default=["PAMM", "whole model", "recommended"],
                        help="to compare with compile")  # fmt: skip
    parser.add_argument("--rounds", type=cli.positive, default=3)
    parser.add_argument("--layers", type=cli.positive, nargs="+", default=[10, 50, 100, 250, 500])
    parser.add_argument("--only", choices=("models", "layers"), help="default: both")
    parser.add_argument("--threads", type=cli.positive, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/compile_time.json"))
    return parser.parse_args(arguments)


def make_case(name: str, args: argparse.Namespace) -> Case:
    model, shape, batch = CASES[name]
    return Case(model, shape, batch, threads=args.threads, min_tokens=1, ratio=32)


def layers_case(layers: int) -> Case:
    """Return a LLaMA that is nothing but deep."""
    shape = Shape("llama", 32, layers, 2, 64, 257, 32)
    return Case("llama-60m", shape, 2, min_tokens=1, ratio=32)


def model_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table of cold compilations."""
    rows = []
    for name, arms in record["models"].items():
        exact = arms[REFERENCE]
        for arm, runs in arms.items():
            if arm == REFERENCE or not runs:
                continue
            ratios = [
                quartiles(paired_ratios([r[key] for r in runs], [r[key] for r in exact]))
                for key in COLUMNS
            ]
            share = max(run["pass_seconds"] / run["seconds"] for run in runs)
            seconds = [f"{sum(r['seconds'] for r in of) / len(of):.1f}" for of in (exact, runs)]
            files = [str(of[-1]["kernel_files"]) for of in (exact, runs)]
            rows.append([f"{name}: {arm}", *map(str, ratios), *seconds, *files, f"{share:.1%}"])
    return rows


MODEL_HEAD = (
    "cold compilation", *(f"by exact, {name} (quartiles)" for name in COLUMNS.values()),
    "exact, s", "ours, s", "exact, files", "ours, files", "pass, most",
)  # fmt: skip
LAYER_HEAD = ("layers", "pass, s", "ms a layer", "tracing and partitioning, s", "pass by that")


def layer_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table of the pass by layers."""
    return [
        [
            layers,
            f"{found['pass_seconds']:.2f}",
            f"{1e3 * found['pass_seconds'] / int(layers):.1f}",
            f"{found['seconds']:.1f}",
            f"{found['pass_seconds'] / found['seconds']:.1%}",
        ]
        for layers, found in record["layers"].items()
    ]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    record: dict[str, Any] = {
        "command": machine.command(),
        "environment": machine.facts("cpu", args.threads),
        "models": {},
        "layers": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def save() -> None:
        record["seconds"] = time.time() - started
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    processes = Processes("cpu", jobs=1)
    chosen = [by_name(REFERENCE), *map(by_name, args.arms)]
    for name in args.models if args.only != "layers" else ():
        case = make_case(name, args)
        arms = record["models"][name] = {arm.name: [] for arm in chosen}
        for round_ in range(args.rounds):
            for arm in chosen if round_ % 2 == 0 else chosen[::-1]:
                print(f"{name}, round {round_ + 1}, {arm.name}", flush=True)
                found = processes.run(worker.cold_compile, case, arm)
                if "error" in found:
                    raise SystemExit(f"{name}, {arm.name}: {found['error']}")
                arms[arm.name].append(found)
                save()
        print("\n".join(tables.markdown(MODEL_HEAD, model_rows(record))), flush=True)
    for layers in args.layers if args.only != "models" else ():
        print(f"{layers} layers", flush=True)
        case = dataclasses.replace(layers_case(layers), threads=args.threads)
        found = processes.run(worker.partition_time, case, by_name(args.arms[0]))
        if "error" in found:
            raise SystemExit(f"{layers} layers: {found['error']}")
        record["layers"][str(layers)] = found
        save()
    print("\n".join(tables.markdown(LAYER_HEAD, layer_rows(record))))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
