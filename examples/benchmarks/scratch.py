"""Training from random weights: where a gap comes from, what helps, and the time to a loss.

    python examples/benchmarks/scratch.py                  # hours
    python examples/benchmarks/scratch.py --only race

Runs quality.py for every row, three seeds each, and prints the tables. Runs that --out holds are
not repeated. Rows name a method, what it approximates and what differs from the study's setting;
one that lacks a seed is left out of a table: three seeds or no claim.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import choices, cli, models, quality, tables
from pamm_compile.methods.base import Size

Records = Sequence[dict[str, Any]]
SEEDS = 3


class Row(NamedTuple):
    """One line: what it is called, and the runs that it shows."""

    label: str
    method: str
    targets: str = "linear"
    others: tuple[tuple[str, Any], ...] = ()
    """Settings that are not the study's."""


YARDSTICK = (
    Row("exact, noise of 1 % added", "noise:0.01"),
    Row("exact, noise of 10 % added", "noise:0.1"),
    Row("exact, noise of 30 % added", "noise:0.3"),
    Row("X in 8 bits, unbiased", "rounded:8"),
    Row("X in 4 bits, unbiased", "rounded:4"),
)
CAUSES = (
    Row("all seven, r = 20, 4 bits", "subspace:20"),
    Row("r = 20, not rounded", "directions:20"),
    Row("r = 40, 4 bits", "subspace:40"),
    Row("PAMM at 20 bytes a token", "generators:fill=20"),
    *(Row(f"r = 20 on {name}", "subspace:20", name) for name in ("qkv", "o", "gate+up", "down")),
    *(
        Row(f"r = 20 on {name}", "subspace:20", name)
        for name in ("all but qkv", "all but o", "all but gate+up", "all but down")
    ),
    Row("r = 20 on the first of two layers", "subspace:20", "first layer"),
    Row("r = 20 on the second", "subspace:20", "all but the first layer"),
    Row("half the learning rate", "subspace:20", others=(("lr", 1e-3),)),
    Row("twice the learning rate", "subspace:20", others=(("lr", 4e-3),)),
    Row("SGD with momentum", "subspace:20", others=(("optimizer", "sgd"),)),
    Row("Muon", "subspace:20", others=(("optimizer", "muon"),)),
    Row("no clipping", "subspace:20", others=(("clip", 1e9),)),
)
REMEDIES = (
    Row("r = 20: nothing", "subspace:20"),
    Row("r = 20, 8 bits", "subspace:20:bits=8"),
    Row("the first fifth of the steps exact", "subspace:20@first=60"),
    Row("the last fifth exact", "subspace:20@last=60"),
    Row("every fourth step exact", "subspace:20@every=4"),
    Row("4 of 20 directions random", "tail:20:4:damp=0"),
    Row("the same, half unbiased", "tail:20:4:damp=0.5"),
    Row("20 of 40 directions, drawn and reweighted", "lottery:20"),
    Row("the mean token exactly", "centred:20"),
    Row("X̂ as long as X", "restored:20"),
    Row("PAMM, k = 32, on the rest", "subspace:20+generators:32"),
    Row("average of the weights", "subspace:20", others=(("average", 0.98),)),
    Row("r = 20, 20, 20 and 56 at down", "shares:0.16:0.16:0.16:0.16"),
    Row("r = 13, 13, 32 and 70", "shares:0.1:0.1:0.25:0.2"),
    Row("r = 40", "subspace:40"),
)


def _runs(records: Records, base: dict[str, Any], row: Row) -> dict[int, dict[str, Any]]:
    wanted = base | dict(row.others) | {"targets": row.targets}
    return {r["seed"]: r for r in records if (r["method"], r["setting"]) == (row.method, wanted)}


def _exact(records: Records, base: dict[str, Any], row: Row) -> dict[int, dict[str, Any]]:
    # What would be approximated makes no difference to an exact run.
    wanted = base | dict(row.others)
    return {
        r["seed"]: r
        for r in records
        if r["method"] == "exact" and {**r["setting"], "targets": wanted["targets"]} == wanted
    }


def gaps(records: Records, base: dict[str, Any], row: Row) -> list[float]:
    """Return validation loss above exact by seed; nothing where a seed is missing."""
    runs, exact = _runs(records, base, row), _exact(records, base, row)
    seeds = sorted(set(runs) & set(exact))
    if len(seeds) < SEEDS:
        return []
    return [runs[seed]["validation"] - exact[seed]["validation"] for seed in seeds]


def table(records: Records, base: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table: bytes, and the gap by seed with its standard error."""
    lines = []
    for row in rows:
        found = gaps(records, base, row)
        if not found:
            continue
        stored = max(r["bytes_per_token"] for r in _runs(records, base, row).values())
        error = statistics.stdev(found) / math.sqrt(len(found))
        shown = ", ".join(f"{gap:+.3f}" for gap in found)
        is_control = row.method.startswith(("noise", "rounded"))
        cells = ["-" if is_control else f"{stored:.0f}", shown]
        lines.append([row.label, *cells, f"{statistics.fmean(found):+.3f} ± {error:.3f}"])
    header = ["", "most bytes a token", "above exact by seed", "mean ± standard error"]
    return tables.markdown(header, lines)


class Race(NamedTuple):
    """A method that is run for more steps than the exact arm, and the time of its step by exact."""

    label: str
    method: str
    step: float


def steps_needed(
    records: Records, base: dict[str, Any], race: Race
) -> Iterator[tuple[int, float, float]]:
    """Yield by seed the gap at equal steps, and the steps to the exact run's loss by its steps.

    Between runs of other lengths, each with its own schedule, losses are interpolated along the
    logarithm of the steps; past the longest run, by its slope from the one before.
    """
    row = Row("", race.method)
    exact = _exact(records, base, row)
    by_length = {
        r["setting"]["steps"]
        for r in records
        if r["method"] == race.method and r["setting"] == base | {"steps": r["setting"]["steps"]}
    }
    for seed, goal in sorted(exact.items()):
        points = []
        for steps in sorted(by_length):
            run = _runs(records, base, Row("", race.method, others=(("steps", steps),))).get(seed)
            if run is not None:
                points.append((math.log(steps / base["steps"]), run["validation"]))
        if len(points) < 2:
            return
        (x0, y0), (x1, y1) = points[-2:]
        slope = min((y1 - y0) / (x1 - x0), -1e-6)
        needed = math.exp(x0 + (goal["validation"] - y0) / slope)
        yield seed, points[0][1] - goal["validation"], needed


def time_to_loss(records: Records, base: dict[str, Any], races: Sequence[Race]) -> list[str]:
    """Return the lines of a table: steps needed by exact's, times the step's time by exact's."""
    lines = []
    for race in races:
        found = list(steps_needed(records, base, race))
        if len(found) < SEEDS:
            continue
        gap = ", ".join(f"{each:+.3f}" for _, each, _ in found)
        needed = ", ".join(f"{each:.3f}" for *_, each in found)
        times = [race.step * each for *_, each in found]
        shown = ", ".join(f"{each:.3f}" for each in times)
        lines.append([race.label, gap, needed, f"{race.step:.3f}", shown])
    header = ["", "above exact at its steps", "steps to its loss", "a step", "time to its loss"]
    return tables.markdown(header, lines)


_SMALL = {"hidden": "128", "layers": "2", "batch": "8", "targets": "linear"}
_WIDE = _SMALL | {"hidden": "512", "heads": "8", "steps": "200", "lr": "1e-3"}


def _setting(chosen: dict[str, str]) -> argparse.Namespace:
    return quality.parse([f"--{name}={value}" for name, value in chosen.items()])


STUDY = _setting(_SMALL)
"""The setting of causes and remedies; the rest is quality.py's own."""
RACE = _setting(_WIDE)
RACED = "shares:0.0625:0.0625:0.0625:0.07:bits=None"
"""As many directions as the arm "whole model, not rounded", whose step is timed."""
LONGER = 215
"""Steps of the longer runs."""


def study(records: Records, rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of causes or remedies."""
    return table(records, quality.setting(STUDY), rows)


def share_of_bytes(method: str, args: argparse.Namespace) -> float:
    """Return what a method stores of a layer's inputs, by the inputs, both in bfloat16."""
    n, inner = args.hidden, models.study_inner(args.hidden)
    sites = [(n, (n, n, n)), (n, (n,)), (n, (inner, inner)), (inner, (n,))]
    sizes = [Size(args.batch * args.sequence, *site, torch.bfloat16) for site in sites]
    chosen = choices.parse(method).method
    return sum(map(chosen.stored_bytes, sizes)) / sum(size.bytes for size in sizes)


def race(records: Records, arms: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the race, by step times of the same shape and rules."""
    step = arms["whole model, not rounded"]["time_ratio"]["median"]
    share = f"{100 * share_of_bytes(RACED, RACE):.1f} % of the bytes"
    found = [Race(f"r = 32, and 96 at down, {share}", RACED, step)]
    return time_to_loss(records, quality.setting(RACE), found)


def command(setting: argparse.Namespace, row: Row) -> list[str]:
    """Return the options by which quality.py runs a row's method, paths and seeds aside."""
    changed = quality.setting(setting) | dict(row.others) | {"targets": row.targets}
    options = [text for name, value in changed.items() for text in (f"--{name}", str(value))]
    return [*options, "--methods", row.method]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--only", choices=("study", "race"), help="default: both")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the records")
    parser.add_argument("--threads", type=cli.positive, default=1)
    args = parser.parse_args()

    def run(file: Path, setting: argparse.Namespace, rows: Sequence[Row]) -> None:
        paths = ["--out", str(file), "--threads", str(args.threads)]
        for row in rows:
            # An exact run is the same whatever would be approximated.
            for each in (Row("", "exact", others=row.others), row):
                quality.main([*paths, *command(setting, each)])

    if args.only != "race":
        file = args.out / "quality-random.jsonl"
        run(file, STUDY, (*YARDSTICK, *CAUSES, *REMEDIES))
        for rows in (YARDSTICK, CAUSES, REMEDIES):
            print("\n".join(["", *study(quality.records(file), rows)]))
    if args.only != "study":
        longer = Row("", RACED, others=(("steps", LONGER),))
        run(args.out / "quality-random-512.jsonl", RACE, (Row("", RACED), longer))


if __name__ == "__main__":
    cli.run(main)
