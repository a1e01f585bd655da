"""The paper's table of Q, K and V memory, and what every arm saves, at full size, by fake tensors.

    python examples/benchmarks/partitions.py                               # tens of minutes
    python examples/benchmarks/partitions.py --models llama-60m --only qkv    # less than one

Nothing is computed: models are traced, rewritten and partitioned as torch.compile does, with
tensors that have no memory, and the bytes that cross from forward to backward are added up. Times
and peaks need a machine: steps.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from examples.benchmarks import cli, full_size, machine
from examples.benchmarks.arms import ARMS, REFERENCE
from examples.benchmarks.models import DEVICE_TOKENS, DTYPES, NAMES, SHAPES, WEIGHTS, Case
from examples.benchmarks.tables import mebibytes

TABLES = ("qkv", "arms", "targets")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    llamas = [name for name in SHAPES if name.startswith("llama")]
    parser.add_argument(
        "--models", nargs="+", choices=llamas, default=llamas[:3], help="default: 60M, 350M, 1B"
    )
    parser.add_argument("--only", choices=TABLES, help="default: all tables")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", choices=[arm.name for arm in ARMS],
        help="of the table of arms (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens",
        type=cli.positive,
        default=DEVICE_TOKENS,
        help="a step on one device, in sequences of 256 (default: %(default)s)",
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[128, 256, 512], help="of the QKV table"
    )
    parser.add_argument("--ratio", type=float, default=256, help="of the PAMM arms (256)")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[1, 0.99, 0.5], help="of the table of targets"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=WEIGHTS,
        help="bfloat16 is autocast, with float32 weights (default: %(default)s)",
    )
    parser.add_argument("--layers", type=cli.positive, help="default: each model's")
    parser.add_argument("--width", type=cli.positive, help="default: each model's")
    parser.add_argument("--vocabulary", type=cli.positive, help="default: 32,000")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    return parser.parse_args(arguments)


def make_case(name: str, args: argparse.Namespace) -> Case:
    shape = SHAPES[name]
    if args.tokens % shape.sequence:
        raise SystemExit(f"--tokens {args.tokens} is not a multiple of {shape.sequence}")
    given = {field: getattr(args, field) for field in ("layers", "width", "vocabulary")}
    return Case(
        model=name,
        shape=shape._replace(**{field: value for field, value in given.items() if value}),
        batch=args.tokens // shape.sequence,
        dtype=args.dtype,
        ratio=args.ratio,
    )


def qkv_table(models: dict[str, Any]) -> list[str]:
    """Return the lines of the paper's table: C alone as the paper counts, then all we save."""
    lines = [
        "| inputs of Q, K and V | ratio | k | exact MiB | C alone MiB | by exact "
        "| C, f and α MiB | by exact |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, model in models.items():
        for ratio, row in model.get("qkv", {}).items():
            exact, alone, whole = (
                row["exact_bytes"],
                row["generator_bytes"],
                row["all_bytes"],
            )
            lines.append(
                f"| {NAMES[name]} | 1/{ratio} | {row['generators']} "
                f"| {mebibytes(exact)} "
                f"| {alone / 2**20:.2f} | 1/{exact / alone:.0f} "
                f"| {whole / 2**20:.2f} | 1/{exact / whole:.0f} |"
            )
    return lines


def arms_table(models: dict[str, Any]) -> list[str]:
    """Return the lines of a table of the bytes that each arm saves."""
    shown = [name for name, model in models.items() if model.get("arms")]
    lines = [
        "| saved for backward | "
        + " | ".join(f"{NAMES[n]} MiB | by compile" for n in shown)
        + " |",
        "|---|" + "--:|" * (2 * len(shown)),
    ]
    for arm in ARMS:
        if not any(arm.name in models[name]["arms"] for name in shown):
            continue
        cells = []
        for name in shown:
            arms = models[name]["arms"]
            if arm.name not in arms or REFERENCE not in arms:
                cells += ["–", "–"]
                continue
            saved, exact = arms[arm.name]["saved_bytes"], arms[REFERENCE]["saved_bytes"]
            cells += [f"{saved / 2**20:,.0f}", f"{saved / exact:.3f}"]
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    heads = [
        f"{NAMES[name]} {models[name]['arms'][REFERENCE]['head_bytes'] / 2**20:,.0f} MiB"
        for name in shown
        if REFERENCE in models[name]["arms"]
    ]
    lines += ["", f"Of these, logits of the loss head, under compile: {', '.join(heads)}."]
    return lines + inputs_left(models)


def inputs_left(models: dict[str, Any]) -> list[str]:
    """Return a line: what arms keep of the inputs that they compress, as shares of their bytes."""
    shares: dict[str, list[str]] = {}
    for arm in ARMS:
        for model in models.values():
            found = model.get("arms", {}).get(arm.name, {})
            if arm.rules and found.get("inputs_bytes_before"):
                share = found["inputs_bytes_after"] / found["inputs_bytes_before"]
                shares.setdefault(arm.name, []).append(f"{share:.3f}")
    if not shares:
        return []
    kept = "; ".join(f"{name} {', '.join(each)}" for name, each in shares.items())
    return ["", f"Left of the inputs of linear layers that are compressed: {kept}."]


def targets_table(models: dict[str, Any]) -> list[str]:
    """Return the lines of a table of what PAMM saves on each choice of projections."""
    counted = [model["targets"] for model in models.values() if "targets" in model]
    budgets = list(counted[0][REFERENCE]["saved_bytes"]) if counted else []
    head = " | ".join(f"saved at {budget} MiB | by exact" for budget in budgets)
    lines = [f"| rules | {head} | FLOPs saved |", "|---|" + "--:|" * (2 * len(budgets) + 1)]
    for model_name, model in models.items():
        rows = model.get("targets", {})
        for name, row in rows.items():
            cells = []
            for budget, saved in row["saved_bytes"].items():
                exact = rows[REFERENCE]["saved_bytes"][budget]
                cells += [f"{saved / 2**20:,.0f}", f"{saved / exact:.3f}"]
            share = row["saved_flops"] / row["weight_flops"]
            what = "none (exact)" if name == REFERENCE else name
            lines.append(f"| {NAMES[model_name]}: {what} | {' | '.join(cells)} | {share:.1%} |")
    return lines


def main() -> None:
    args = parse()
    tables = (args.only,) if args.only else TABLES
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / (f"partitions-{args.only}.json" if args.only else "partitions.json")
    record: dict[str, Any] = {
        "command": machine.command(),
        "environment": machine.facts(),
        "options": cli.options(args),
        "models": {},
    }
    started = time.time()

    def save() -> None:
        record["seconds"] = time.time() - started
        path.write_text(json.dumps(record, indent=1) + "\n")

    arms = [arm for arm in ARMS if arm.name in (args.arms or [arm.name])]
    counts = {"qkv": 1, "arms": len(arms), "targets": 1}
    steps = sum(counts[table] for table in tables)
    with tqdm(total=steps * len(args.models), unit="partition", dynamic_ncols=True) as bar:
        for name in args.models:
            case = make_case(name, args)
            model = record["models"][name] = {"cuts": case.cuts(), "tokens": case.tokens}
            if "qkv" in tables:
                bar.set_description(f"{name}, Q, K and V")
                model["qkv"] = full_size.qkv(case, args.ratios)
                save()
                bar.update()
            if "arms" in tables:
                model["arms"] = {}
                for arm, found in full_size.frontier(case, arms):
                    model["arms"][arm] = found
                    save()
                    bar.set_description(f"{name}, {arm}")
                    bar.update()
            if "targets" in tables:
                bar.set_description(f"{name}, targets")
                model["targets"] = full_size.targets(case, args.budgets)
                save()
                bar.update()
    lines = [f"{model['cuts']}." for model in record["models"].values()]
    writers = {"qkv": qkv_table, "arms": arms_table, "targets": targets_table}
    for table in tables:
        lines += ["", *writers[table](record["models"])]
    print("\n".join(lines))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"\n{record['seconds']:.0f} s; wrote {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    cli.run(main)
