"""Training from random weights: where a gap comes from, what helps, and the time to a loss.

    python examples/studies/scratch.py                  # hours
    python examples/studies/scratch.py --only race

Runs quality.py for every row, three seeds each, and prints the tables. Runs that --out holds are
not repeated. Rows name a method, what it approximates and what differs from the study's setting;
one that lacks a seed is left out of a table: three seeds or no claim.
"""

from __future__ import annotations

import argparse
import itertools
import json
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

from examples.benchmarks import cli, models, tables
from examples.studies import choices, quality
from pamm_compile.size import Size

Records = Sequence[dict[str, Any]]
SEEDS = 3
_DENSE = ("noise", "unbiased", "rounded", "tail", "lottery", "centred", "restored")
"""What keeps X̂ itself, dense and not rounded: its bytes say nothing."""
STEPS = 200
"""Of the exact runs that are raced."""


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
_MUON = (("optimizer", "muon"),)
CAUSES = (
    Row("all seven, r = 20, 4 bits", "subspace:20"),
    Row("r = 20, not rounded", "directions:20"),
    Row("exact, unbiased noise as long as its error", "unbiased:20"),
    Row("20 of 40 directions, drawn and reweighted", "lottery:20"),
    Row("the same, the mean of eight draws", "lottery:20:draws=8"),
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
    Row("Muon", "subspace:20", others=_MUON),
    Row("Muon, drawn: candidates=2", "subspace:20:candidates=2", others=_MUON),
    Row("no clipping", "subspace:20", others=(("clip", 1e9),)),
)
REMEDIES = (
    Row("r = 20: nothing", "subspace:20"),
    Row("r = 20, 8 bits", "subspace:20:bits=8"),
    Row(
        "five iterations on all tokens, which a remembered basis nears",
        "subspace:20:iterations=5:rows=128",
    ),
    Row("the first fifth of the steps exact", "subspace:20@first=60"),
    Row("the last fifth exact", "subspace:20@last=60"),
    Row("every fourth step exact", "subspace:20@every=4"),
    Row("4 of 20 directions random", "tail:20:4:damp=0"),
    Row("the same, half unbiased", "tail:20:4:damp=0.5"),
    Row("20 of 40 directions, drawn and reweighted", "lottery:20"),
    Row("the same by sampled rows, 4 bits: candidates=2", "subspace:20:candidates=2"),
    Row("the mean token exactly", "centred:20"),
    Row("X̂ as long as X", "restored:20"),
    Row("PAMM at 20 bytes, refined", "generators:fill=20:refine=1"),
    Row("PAMM, k = 32, on the rest", "subspace:20+generators:32"),
    Row("average of the weights", "subspace:20", others=(("average", 0.98),)),
    Row("r = 20, 20, 20 and 56 at down", "shares:0.16:0.16:0.16:0.16"),
    Row("r = 13, 13, 32 and 70", "shares:0.1:0.1:0.25:0.2"),
    Row("r = 40", "subspace:40"),
)

_UNEVEN = "shares:0.0625:0.0625:0.0625:0.07:bits=None"
_512 = (("hidden", 512), ("heads", 8), ("steps", 200), ("lr", 1e-3))
TREND = (
    *(
        Row(f"{what}, {where}", method, targets, others)
        for what, method, targets in (
            ("all seven, r = n / 16, more at down", _UNEVEN, "linear"),
            ("Q, K and V by PAMM, k = 8", "pamm:256", "qkv"),
        )
        for where, others in (
            ("width 128, 300 steps", ()),
            ("width 128, 1,000 steps", (("steps", 1000),)),
            ("width 256, 300 steps", (("hidden", 256),)),
            ("width 512, 200 steps at 1e-3", _512),
        )
    ),
    Row(
        "all seven, drawn of twice as many, width 512, 200 steps at 1e-3",
        f"{_UNEVEN}:candidates=2",
        others=_512,
    ),
)
"""Not rounded, as in the race; and the paper's."""
TABLES = {"yardstick": YARDSTICK, "causes": CAUSES, "remedies": REMEDIES, "trend": TREND}


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
        cells = ["-" if row.method.startswith(_DENSE) else f"{stored:.0f}", shown]
        lines.append([row.label, *cells, f"{statistics.fmean(found):+.3f} ± {error:.3f}"])
    header = ["", "most bytes a token", "above exact by seed", "mean ± standard error"]
    return tables.markdown(header, lines)


class Race(NamedTuple):
    """A method's runs by which the steps to the exact run's loss are found."""

    label: str
    method: str
    targets: str
    width: int
    lengths: tuple[int, ...]
    """Steps of its runs: the first gives the gap, the second only the slope."""
    timed: str
    """The folder of the record of step times."""
    arm: str
    """Of arms.py, whose step is timed."""
    warmup: int = 20
    """Of runs that are not as long as the exact one: as many steps as its, since runs of another
    warm-up do not follow one another at width 1024; 0 stands for a tenth of each run."""
    lr: float = 1e-3
    slope: str = ""
    """The method of another race of the same setting, whose slope holds where none is run."""

    def row(self, steps: int) -> Row:
        """Return the runs of so many steps."""
        changed: dict[str, Any] = {}
        if steps != STEPS:
            changed = {"steps": steps} | ({"warmup": self.warmup} if self.warmup else {})
        return Row("", self.method, self.targets, tuple(changed.items()))

    @property
    def rows(self) -> tuple[Row, ...]:
        """All that are run."""
        return tuple(map(self.row, self.lengths))

    @property
    def setting(self) -> argparse.Namespace:
        """The options of quality.py."""
        changed = {"targets": self.targets, "lr": str(self.lr), "steps": str(STEPS)}
        return _setting(_SMALL | _WIDTHS[self.width] | changed)

    @property
    def record(self) -> str:
        """The runs."""
        return f"quality-random-{self.width}.jsonl"

    @property
    def model(self) -> str:
        """The model of steps.py of this width."""
        return {512: "llama-60m", 1024: "llama-350m"}[self.width]


def steps_needed(records: Records, race: Race) -> Iterator[tuple[int, float, float]]:
    """Yield by seed the gap after the first length, and the steps to the exact run's by its steps.

    The gap, where runs follow one another closely, divided by how much the loss falls with the
    logarithm of the steps, between runs of two lengths with schedules of their own.
    """
    base = quality.setting(race.setting)
    sloped = race._replace(method=race.slope, lengths=_LENGTHS) if race.slope else race
    runs = _runs(records, base, race.rows[0])
    first, second = (_runs(records, base, row) for row in sloped.rows)
    span = math.log(sloped.lengths[0] / sloped.lengths[1])
    exact = _exact(records, base, race.row(STEPS))
    for seed in sorted(set(exact).intersection(runs, first, second)):
        gap = runs[seed]["validation"] - exact[seed]["validation"]
        fall = (second[seed]["validation"] - first[seed]["validation"]) / span
        needed = race.lengths[0] / STEPS * math.exp(gap / fall) if fall > 0 else math.inf
        yield seed, gap, needed


def raced(records: Records, race: Race, step: float) -> list[str]:
    """Return a row: steps needed by exact's, times the step's time by exact's."""
    found = list(steps_needed(records, race))
    if len(found) < SEEDS:
        return []
    times = [step * needed for *_, needed in found]
    return [
        str(race.width),
        f"{race.lr:g}",
        race.label,
        f"{race.lengths[0]}: " + ", ".join(f"{gap:+.3f}" for _, gap, _ in found),
        ", ".join(f"{needed:.3f}" for *_, needed in found),
        f"{step:.3f}",
        ", ".join(f"{each:.2f}" for each in times),
        f"{_mean(times):.2f}",
    ]


def _mean(values: Sequence[float]) -> float:
    # Of ratios; an arithmetic mean would favour whoever is divided by.
    return math.exp(statistics.fmean(map(math.log, values)))


_SMALL = {"hidden": "128", "layers": "2", "batch": "8", "targets": "linear"}
_WIDTHS = {
    512: {"hidden": "512", "heads": "8"},
    1024: {"hidden": "1024", "heads": "16"},
}


def _setting(chosen: dict[str, str]) -> argparse.Namespace:
    return quality.parse([f"--{name}={value}" for name, value in chosen.items()])


STUDY = _setting(_SMALL)
"""The setting of causes and remedies; the rest is quality.py's own."""
_DRAWN = "shares:0.0625:0.0625:0.0625:0.035:bits=None:candidates="
_LENGTHS = (STEPS, 150)
RACES = (
    Race(
        "PAMM on Q, K and V, the paper's",
        "pamm:256", "qkv", 512, _LENGTHS, "whole-60m-race", "PAMM",
    ),
    Race(
        "r = 32, and 96 at down",
        _UNEVEN, "linear", 512, (STEPS, 215), "whole-60m-race", "whole model, not rounded",
        warmup=0,
    ),
    Race(
        "r = 64, and 96 at down, drawn of twice as many",
        f"{_DRAWN}2", "linear", 1024, _LENGTHS, "whole-350m-race", "whole model, drawn of 2",
    ),
    Race(
        "the same, drawn of half as many more",
        f"{_DRAWN}1.5", "linear", 1024, _LENGTHS, "whole-350m-race", "whole model, drawn of 1.5",
        lr=5e-4,
    ),
    Race(
        "the same, found on half as many rows",
        f"{_DRAWN}1.5:rows=8", "linear", 1024, (214,), "whole-350m-race",
        "whole model, drawn of 1.5, fewer rows", lr=5e-4,
        slope=f"{_DRAWN}1.5",
    ),
)  # fmt: skip
"""Nothing is rounded: on a CPU it takes time, and there are bytes to spare."""


def file_of(row: Row) -> str:
    """Return the name of the record of a row of the study."""
    width = dict(row.others).get("hidden")
    return f"quality-random-{width}.jsonl" if width in _WIDTHS else "quality-random.jsonl"


def study(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of the study, by the records of a folder."""
    files = {folder / file_of(row) for row in rows}
    records = [each for file in sorted(files) for each in tables.records(file)]
    return table(records, quality.setting(STUDY), rows)


def share_of_bytes(method: str, args: argparse.Namespace) -> float:
    """Return what a method stores of its targets' inputs, by the inputs, both in bfloat16."""
    n, inner = args.hidden, models.study_inner(args.hidden)
    sites = [(n, (n, n, n)), (n, (n,)), (n, (inner, inner)), (inner, (n,))]
    if args.targets == "qkv":
        sites = sites[:1]
    sizes = [Size(args.batch * args.sequence, *site, torch.bfloat16) for site in sites]
    chosen = choices.parse(method).method
    return sum(map(chosen.stored_bytes, sizes)) / sum(size.bytes for size in sizes)


def races(folder: Path) -> list[str]:
    """Return the lines of a table: time to the exact run's loss, by the records of a folder.

    The time of a step is that of the same ranks and nearly the same shape, compiled.
    """
    lines = []
    for race in RACES:
        timed = folder / race.timed / "benchmark.json"
        if not timed.exists():
            print(f"{race.label}: no step times in {timed}")
            continue
        arm = json.loads(timed.read_text())["models"][race.model]["arms"][race.arm]
        cells = raced(tables.records(folder / race.record), race, arm["time_ratio"]["median"])
        if cells:
            share = f"{100 * share_of_bytes(race.method, race.setting):.1f} %"
            lines.append([*cells[:3], share, *cells[3:]])
    header = ["width", "learning rate", "", "bytes of these inputs", "above exact, after steps"]
    header += ["steps to its loss", "a step", "time to its loss", "mean"]
    return tables.markdown(header, lines)


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

    # An exact run is the same whatever would be approximated, and recorded as of all layers.
    def run(file: str, setting: argparse.Namespace, rows: Sequence[Row]) -> None:
        paths = ["--out", str(args.out / file), "--threads", str(args.threads)]
        for row in rows:
            quality.main([*paths, *command(setting, row)])

    if args.only != "race":
        for row in itertools.chain(*TABLES.values()):
            run(file_of(row), STUDY, (Row("", "exact", others=row.others), row))
        for rows in TABLES.values():
            print("\n".join(["", *study(args.out, rows)]))
    if args.only != "study":
        for race in RACES:
            run(race.record, race.setting, (Row("", "exact"), *race.rows))
        print("\n".join(["", *races(args.out)]))


if __name__ == "__main__":
    cli.run(main)
