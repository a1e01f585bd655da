"""Write the tables of README.md and docs/ from the records in docs/benchmarks/.

    python examples/benchmarks/results.py             # write them
    python examples/benchmarks/results.py --check     # fail if one is not what its record says

A page holds a table between two comments, and what is between them is this script's:

    <!-- table: NAME -->
    <!-- end -->

To publish a figure: put the raw record that its script wrote into docs/benchmarks/, name its table
in TABLES, write the two comments where it belongs, and run this. Pages show what decides something;
whole tables are in docs/benchmarks/tables.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import (
    cli,
    device_model,
    fidelity,
    output,
    partitions,
    quality,
    study_estimators,
    tables,
)
from examples.benchmarks.decoding import published
from examples.benchmarks.machine import CHECKOUT
from examples.benchmarks.timing import Quartiles, paired_ratios, quartiles
from pamm_compile.devices import device_named
from pamm_compile.methods.pamm.triton import plan
from pamm_compile.methods.pamm.triton.model import limits_of

RECORDS = CHECKOUT / "docs" / "benchmarks"
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<old>.*?)(<!-- end -->)", re.S)


@functools.cache
def _record(name: str) -> Any:
    return json.loads((RECORDS / name).read_text())


def _steps(model: str) -> list[str]:
    return output.model_table(_record("cpu/benchmark.json")["models"][model])


class _Twins(NamedTuple):
    """A PAMM arm and the exact arm of its setting."""

    model: str
    mine: str
    theirs: str
    saved: str
    peak: str
    time: Quartiles


def _pairs() -> Iterator[_Twins]:
    for name, model in _record("cpu/benchmark.json")["models"].items():
        arms = output.measured(model)
        for mine, theirs in output.twins(arms):
            ratios = [arms[mine][key] / arms[theirs][key] for key in output.METRICS.values()]
            peak, saved = (f"{ratio:.3f}" for ratio in ratios)
            time = quartiles(paired_ratios(arms[mine]["times_s"], arms[theirs]["times_s"]))
            yield _Twins(name, mine, theirs, saved, peak, time)


def _twins() -> list[str]:
    rows = [
        [f"{output.NAMES[p.model]}: {p.mine} by {p.theirs}", p.saved, p.peak, str(p.time)]
        for p in _pairs()
    ]
    return tables.markdown(["at the same setting", "saved", "peak", "time (quartiles)"], rows)


def _twins_in_short() -> list[str]:
    """Return the models' ratios by setting, in the order of the record."""
    by_setting: dict[str, list[_Twins]] = {}
    for pair in _pairs():
        by_setting.setdefault(pair.theirs, []).append(pair)
    rows = []
    for setting, pairs in by_setting.items():
        times = ", ".join(f"{pair.time.median:.3f}" for pair in pairs)
        saved, peaks = (", ".join(getattr(p, what) for p in pairs) for what in ("saved", "peak"))
        rows.append([setting, saved, peaks, times])
    return tables.markdown(["setting", "saved", "peak", "time"], rows)


def _first_screen() -> list[str]:
    arms = _record("cpu/benchmark.json")["models"]["llama-60m"]["arms"]
    left_out = ("aggressive", "0.8")
    rows = [
        [
            name,
            f"{tables.mebibytes(arm['saved_bytes'])} MiB",
            f"{tables.mebibytes(arm['peak_bytes'])} MiB",
            f"{arm['time_ratio']['median']:.2f} ×",
        ]
        for name, arm in arms.items()
        if not any(word in name for word in left_out)
    ]
    return tables.markdown(["one step", "saved for backward", "peak", "time"], rows)


def _first_loss() -> list[str]:
    """Return tuning on Q, K and V alone, from few generators to many."""
    runs = quality.records(RECORDS / "quality-tuning.jsonl")
    wanted = {"exact": "exact", **{f"pamm:{k}": f"PAMM, k = {k}" for k in (8, 16, 32)}}
    of: dict[str, dict[int, float]] = {name: {} for name in wanted}
    for run in runs:
        if run["method"] in wanted and run["setting"]["targets"] == "qkv":
            of[run["method"]][run["seed"]] = run["validation"]
    rows = []
    for method, name in wanted.items():
        gaps = [loss - of["exact"][seed] for seed, loss in of[method].items()]
        each = ", ".join(f"{gap:+.3f}" for gap in gaps) if method != "exact" else "-"
        rows.append([name, ", ".join(f"{loss:.3f}" for loss in of[method].values()), each])
    return tables.markdown(["tuning, three seeds", "validation loss", "above exact"], rows)


def _only(lines: list[str], names: Sequence[str]) -> list[str]:
    """Return the lines of a table up to its rule, and of its rows those of these names."""
    rule = next(number for number, line in enumerate(lines) if line.startswith("|--"))
    rows = {line.split("|")[1].strip(" `"): line for line in lines[rule + 1 :] if "|" in line}
    return lines[: rule + 1] + [rows[name] for name in names]


def _losses(name: str) -> list[str]:
    return _as_written_today(quality.table(quality.records(RECORDS / name)).splitlines())


def _as_written_today(lines: list[str]) -> list[str]:
    """Return the lines of a table with methods spelled as estimators.py does.

    Records are never changed, and older ones call PAMM with k = 16 "pamm:16".
    """

    def spell(match: re.Match[str]) -> str:
        return match[0].replace("pamm:", "generators:").replace(",", ":")

    return [re.sub(r"`[^`]*`", spell, line) for line in lines]


def _compiled() -> list[str]:
    path = "pamm_compile/methods/pamm/triton/figures.json"
    records = json.loads((CHECKOUT / path).read_text())["kernels"]
    known = {(r["kernel"], r["target"], tuple(r["tile"])): r for r in records}
    rows = []
    for name in ("a100", "h100"):
        device = device_named(name)
        limits = limits_of(device)
        for k in (16, 64, 128, 256, 512):
            sort = "sorted" if k == 512 else "contract"
            ways = {
                "assign": plan.assign_tiles(k, 2048, torch.bfloat16, limits)[0],
                sort: plan.contract_tiles(k, torch.bfloat16, limits, k == 512)[0],
            }
            for kernel, tile in ways.items():
                row = known[kernel, device.target, tuple(tile)]
                cut = f"{tile.rows}×{tile.columns}×{tile.depth}, {tile.warps} warps, "
                cut += f"{tile.stages} stages"
                figures = [str(row[what]) for what in ("registers", "spilled", "instructions")]
                shared, slots = f"{row['shared'] / 1024:.0f}", " ".join(map(str, row["slots"]))
                rows.append([kernel, device.target, str(k), cut, *figures, shared, slots])
    header = ["kernel", "target", "k", "tile", "registers", "spilled", "instructions a tile"]
    return tables.markdown([*header, "shared KiB", "slots"], rows, left=4)


def _decoding(write: Callable[[list[dict[str, Any]]], list[str]], file: str) -> list[str]:
    return write(quality.records(RECORDS / f"decoding-{file}.jsonl"))


H100 = device_named("h100")
SHOWN_ARMS = (
    "compile",
    "PAMM",
    "compile + budget 0.99",
    "PAMM + budget 0.99",
    "compile + budget 0.5",
    "PAMM + budget 0.5",
    "compile + checkpointing",
)
SHOWN_METHODS = (
    "generators:2",
    "generators:16",
    "generators:32",
    "generators:32 on mlp",
    "generators:32 on qkv+mlp",
    "generators:fill=13.5",
    "directions:fill=13.5",
    "sketch:fill=13.5",
)
TABLES: dict[str, Callable[[], list[str]]] = {
    "first-screen": _first_screen,
    "first-screen-loss": _first_loss,
    "steps-llama-60m": lambda: _steps("llama-60m"),
    "steps-gpt2": lambda: _steps("gpt2"),
    "steps-roberta": lambda: _steps("roberta"),
    "steps-twins": _twins,
    "steps-twins-shown": _twins_in_short,
    "bytes-qkv": lambda: partitions.qkv_table(_record("partitions.json")["models"]),
    "bytes-arms": lambda: partitions.arms_table(_record("partitions.json")["models"]),
    "bytes-arms-shown": lambda: _only(
        partitions.arms_table(
            {n: m for n, m in _record("partitions.json")["models"].items() if n != "llama-350m"}
        ),
        SHOWN_ARMS,
    ),
    "bytes-rules": lambda: partitions.targets_table(_record("partitions-targets.json")["models"]),
    "loss-tuning": lambda: _losses("quality-tuning.jsonl"),
    "loss-tuning-shown": lambda: _only(TABLES["loss-tuning"](), SHOWN_METHODS),
    "loss-tuning-512": lambda: _losses("quality-tuning-512.jsonl"),
    "loss-wide": lambda: _losses("quality-wide.jsonl"),
    "loss-batch": lambda: _losses("quality-batch.jsonl"),
    "subspace-variants": lambda: study_estimators.text_table(
        [_record("estimators-512-variants-seed0.json")]
    ).splitlines(),
    "kernels-compiled": _compiled,
    "device-kernels": lambda: device_model.kernels_table(H100),
    "device-sites": lambda: device_model.sites_table(H100, device_model.METHODS),
    "device-steps": lambda: device_model.steps_table(H100, device_model.METHODS),
    "device-steps-shown": lambda: [
        line
        for line in device_model.steps_table(H100, device_model.METHODS)
        if "| q, k, v |" not in line
    ],
    "gradients-512": lambda: _as_written_today(
        fidelity.step_table(_record("fidelity-512-seed0.json")["rows"])
    ),
    **{
        f"decoding-{table}": functools.partial(_decoding, write, file)
        for table, write, file in (
            ("budgets", published.budgets, "budgets"),
            ("times", published.times, "times"),
            ("ranks", published.ranks, "ranks"),
            ("thin", published.thin, "ranks"),
            ("evolution", published.evolution, "evolution"),
        )
    },
}


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    docs = CHECKOUT / "docs"
    return [CHECKOUT / "README.md", *sorted(docs.glob("*.md")), docs / "benchmarks" / "tables.md"]


def written(text: str, page: str) -> str:
    """Return a page with its tables as the records say."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"{page}: no table {name!r}; there are {', '.join(TABLES)}")
        return match[1] + "\n".join(TABLES[name]()) + "\n" + match[4]

    if text.count("<!-- table: ") != len(_BLOCK.findall(text)):
        raise SystemExit(f"{page}: a table has no <!-- end -->")
    return _BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    args: argparse.Namespace = parser.parse_args(arguments)
    differing = []
    for path in pages():
        before = path.read_text()
        after = written(before, path.name)
        if after != before:
            differing.append(path.name)
            if not args.check:
                path.write_text(after)
    if args.check and differing:
        raise SystemExit(f"not what docs/benchmarks/ says: {', '.join(differing)}; run this script")
    print(f"{'differing' if args.check else 'written'}: {', '.join(differing) or 'none'}")


if __name__ == "__main__":
    cli.run(main)
