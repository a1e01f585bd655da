"""Write the tables of README.md and docs/ from the records in docs/benchmarks/.

    python examples/studies/results.py             # write them
    python examples/studies/results.py --check     # fail if one is not what its record says

A page holds a table between two comments, and what is between them is this script's:

    <!-- table: NAME -->
    <!-- end -->

To publish a figure: put the raw record that its script wrote into docs/benchmarks/, name its table
in TABLES, write the two comments where it belongs, and run this. Pages show what decides something;
all others are in docs/benchmarks/tables.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import cli, compile_time, device_model, output, partitions, score, tables
from examples.benchmarks.decoding import published
from examples.benchmarks.machine import CHECKOUT
from examples.benchmarks.timing import Quartiles, paired_ratios, quartiles
from examples.studies import errors, fidelity, quality, scratch, study_estimators, tried
from pamm_compile.devices import device_named
from pamm_compile.methods.pamm.triton import plan
from pamm_compile.methods.pamm.triton.model import limits_of
from pamm_compile.trials import result

RECORDS = CHECKOUT / "docs" / "benchmarks"
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<old>.*?)(<!-- end -->)", re.S)


@functools.cache
def _record(name: str) -> Any:
    return json.loads((RECORDS / name).read_text())


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


def _scores(task: str, with_tried: bool, timed_on: str = "") -> list[str]:
    found = tables.records(RECORDS / "score.jsonl")
    found = [r for r in found if "loss" in r or timed_on in r["environment"]["machine"]]
    setting = (tried.TASKS if with_tried else score.TASKS)[task]
    if timed_on:
        timed = {*score.LENGTHS, *(name for r in found for name in r.get("times_s", ()))}
        setting = dataclasses.replace(
            setting, arms={n: arm for n, arm in setting.arms.items() if n in timed}
        )
    return score.table(setting, found, 1 if with_tried else score.SEEDS)


def _compilations(name: str) -> list[str]:
    return tables.markdown(compile_time.MODEL_HEAD, compile_time.model_rows(_record(name)))


def _trial(name: str) -> list[str]:
    return result.shown(_record(f"trial-{name}.json")).splitlines()


def _errors(*, predict: bool) -> list[str]:
    found, scores = (tables.records(RECORDS / f"{name}.jsonl") for name in ("errors", "score"))
    return errors.predictors(found, scores) if predict else errors.table(found)


def _first_screen() -> list[str]:
    arms = _record("whole-350m/benchmark.json")["models"]["llama-350m"]["arms"]
    rows = [
        [
            name,
            f"{tables.mebibytes(arm['saved_bytes'])} MiB",
            f"{tables.mebibytes(arm['peak_bytes'])} MiB",
            f"{arm['time_ratio']['median']:.2f} ×",
        ]
        for name, arm in arms.items()
    ]
    return tables.markdown(["one step", "saved for backward", "peak", "time"], rows)


def _whole(*folders: str, in_all: bool = False) -> list[str]:
    """Return all arms of whole models, and the time of all rounds where some take longer."""
    rows = []
    records = (_record(f"{folder}/benchmark.json") for folder in folders)
    for name, model in (pair for record in records for pair in record["models"].items()):
        exact = output.measured(model)["compile"]
        for arm, found in output.measured(model).items():
            saved, peak = (found[k] / exact[k] for k in ("saved_bytes", "peak_bytes"))
            time = quartiles(paired_ratios(found["times_s"], exact["times_s"]))
            named = f"{output.NAMES[name]}: {arm}"
            together = f"{sum(found['times_s']) / sum(exact['times_s']):.3f}"
            rows.append([named, f"{saved:.3f}", f"{peak:.3f}", str(time), *[together] * in_all])
    last = ["all rounds together"] * in_all
    return tables.markdown(["by compile", "saved", "peak", "time (quartiles)", *last], rows)


def _adapters() -> list[str]:
    """Return what examples/train.py printed of adapters."""
    runs = _record("lora-seed0.json")["runs"]
    exact = runs[0]["validation_loss"]
    rows = [
        [
            run["name"],
            f"{run['validation_loss']:.3f}",
            f"{run['validation_loss'] - exact:+.3f}",
            *(f"{run[key] / 2**20:.1f}" for key in ("saved_bytes", "peak_bytes")),
            f"{run['time_ratio']:.2f} ×",
        ]
        for run in runs
    ]
    header = [
        "adapters of rank 8",
        "validation loss",
        "above exact",
        "saved MiB",
        "peak MiB",
        "step",
    ]
    return tables.markdown(header, rows)


WHOLE_METHODS = {
    ("exact", "qkv"): "exact",
    ("generators:16", "qkv"): "PAMM, k = 16, on Q, K, V",
    ("generators:fill=20", "linear"): "PAMM, whole model",
    ("generators:fill=35", "linear"): "PAMM, whole model, more generators",
    ("subspace:34", "linear"): "Subspace, r = 34, whole model",
    ("subspace:61", "linear"): "Subspace, r = 61, whole model",
}


def _first_loss() -> list[str]:
    """Return tuning by the paper's method, and on every linear layer."""
    of: dict[tuple[str, str], dict[int, dict[str, Any]]] = {name: {} for name in WHOLE_METHODS}
    for run in tables.records(RECORDS / "quality-whole.jsonl"):
        targets = "qkv" if run["method"] == "exact" else run["setting"]["targets"]
        of.get((run["method"], targets), {})[run["seed"]] = run
    exact = of["exact", "qkv"]
    rows = []
    for key, name in WHOLE_METHODS.items():
        losses = {seed: run["validation"] for seed, run in of[key].items()}
        gaps = [f"{loss - exact[seed]['validation']:+.3f}" for seed, loss in losses.items()]
        stored = f"{max(run['bytes_per_token'] for run in of[key].values()):.0f}"
        shown = ", ".join(f"{loss:.3f}" for loss in losses.values())
        rows.append([name, stored, shown, "-" if key[0] == "exact" else ", ".join(gaps)])
    header = ["tuning, three seeds", "most bytes a token", "validation loss", "above exact"]
    return tables.markdown(header, rows)


def _by_pamm() -> list[str]:
    """Return the error of Subspace by that of PAMM, at equal bytes, a ratio a seed."""
    targets = list(dict.fromkeys(study_estimators.TARGETS.values()))
    of: dict[tuple[float, str], list[str]] = {}
    for seed in range(3):
        rows = _record(f"estimators-512-seed{seed}.json")["rows"]
        for available in dict.fromkeys(row["bytes"] for row in rows):
            names = dict.fromkeys(r["method"] for r in rows if r["bytes"] == available)
            pamm, ours = (next(n for n in names if n.startswith(w)) for w in ("Pamm", "Subspace"))
            for target in targets:
                mine = [r for r in rows if (r["bytes"], r["target"]) == (available, target)]
                a, b = (
                    statistics.fmean(r["error"] for r in mine if r["method"] == name)
                    for name in (ours, pamm)
                )
                of.setdefault((available, target), []).append(f"{a / b:.2f}")
    rows = [
        [f"{available:g}", *(", ".join(of[available, target]) for target in targets)]
        for available in dict.fromkeys(available for available, _ in of)
    ]
    return tables.markdown(["bytes a token", *targets], rows)


def _only(lines: list[str], names: Sequence[str]) -> list[str]:
    """Return the lines of a table up to its rule, and of its rows those of these names."""
    rule = next(number for number, line in enumerate(lines) if line.startswith("|--"))
    rows = {line.split("|")[1].strip(" `"): line for line in lines[rule + 1 :] if "|" in line}
    return lines[: rule + 1] + [rows[name] for name in names]


def _arms_shown() -> list[str]:
    """Return saved bytes of PAMM, the whole model and exact settings, in one table."""
    name = "llama-1b"
    arms = [_record(f"partitions{which}.json")["models"][name]["arms"] for which in ("", "-whole")]
    return _only(partitions.arms_table({name: {"arms": arms[0] | arms[1]}}), SHOWN_ARMS)


def _losses(name: str) -> list[str]:
    return _as_written_today(quality.table(tables.records(RECORDS / name)).splitlines())


def _as_written_today(lines: list[str]) -> list[str]:
    """Return the lines of a table with methods spelled as choices.py does.

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
    return write(tables.records(RECORDS / f"decoding-{file}.jsonl"))


H100 = device_named("h100")
SHOWN_ARMS = (
    "compile",
    "PAMM",
    "whole model",
    "compile + budget 0.99",
    "whole model + budget 0.99",
    "compile + budget 0.5",
    "whole model + budget 0.5",
    "compile + checkpointing",
)
SHOWN_STEPS = tuple(
    f"LLaMA-{arm}"
    for arm in (
        "350M: PAMM",
        "350M: whole model",
        "350M: whole model, rank 1/16",
        "350M: compile + budget 0.99",
        "350M: compile + checkpointing",
        "60M: whole model",
    )
)
TABLES: dict[str, Callable[[], list[str]]] = {
    **{n: functools.partial(_errors, predict=n != "errors") for n in ("errors", "errors-predict")},
    **{f"trial-{name}": functools.partial(_trial, name) for name in ("encoder", "small")},
    "score-encoder": functools.partial(_scores, "encoder", with_tried=False),
    "score-encoder-xeon": functools.partial(_scores, "encoder", True, timed_on="Intel"),
    "score-scratch": functools.partial(_scores, "scratch", with_tried=False),
    "score-encoder-tried": functools.partial(_scores, "encoder", with_tried=True),
    "score-scratch-tried": functools.partial(_scores, "scratch", with_tried=True),
    "first-screen": _first_screen,
    "first-screen-loss": _first_loss,
    "steps-whole": lambda: _whole("whole-350m", "whole-60m", "whole-60m-short"),
    "steps-whole-shown": lambda: _only(_whole("whole-350m", "whole-60m"), SHOWN_STEPS),
    "steps-8192": lambda: _whole("tokens-8192", in_all=True),
    "steps-bf16": lambda: _whole("whole-60m-bf16"),
    "compile-models": lambda: _compilations("compile_time.json"),
    "compile-methods": lambda: _compilations("compile_methods.json"),
    "compile-layers": lambda: tables.markdown(
        compile_time.LAYER_HEAD, compile_time.layer_rows(_record("compile_time.json"))
    ),
    "steps-twins": _twins,
    "bytes-qkv": lambda: partitions.qkv_table(_record("partitions.json")["models"]),
    "bytes-arms": lambda: partitions.arms_table(_record("partitions.json")["models"]),
    "bytes-shown": _arms_shown,
    "bytes-whole": lambda: partitions.arms_table(_record("partitions-whole.json")["models"]),
    "bytes-quantized": lambda: partitions.arms_table(
        _record("partitions-quantized.json")["models"]
    ),
    "bytes-rules": lambda: partitions.targets_table(_record("partitions-targets.json")["models"]),
    "loss-tuning": lambda: _losses("quality-tuning.jsonl"),
    "loss-whole": lambda: _losses("quality-whole.jsonl"),
    "loss-adapters": _adapters,
    **{
        f"random-{name}": functools.partial(scratch.study, RECORDS, rows)
        for name, rows in scratch.TABLES.items()
    },
    "random-race": functools.partial(scratch.races, RECORDS),
    "loss-tuning-512": lambda: _losses("quality-tuning-512.jsonl"),
    "loss-wide": lambda: _losses("quality-wide.jsonl"),
    "loss-batch": lambda: _losses("quality-batch.jsonl"),
    "subspace-by-pamm": _by_pamm,
    "subspace-variants": lambda: study_estimators.text_table(
        [_record("estimators-512-variants-seed0.json")]
    ).splitlines(),
    "kernels-compiled": _compiled,
    "device-kernels": lambda: device_model.kernels_table(H100),
    "device-sites": lambda: device_model.sites_table(H100, device_model.METHODS),
    "device-steps": lambda: device_model.steps_table(H100, device_model.METHODS),
    "device-float8": lambda: device_model.float8_table(H100, device_model.FLOAT8_METHODS),
    "device-joined": lambda: device_model.joined_table(H100),
    "gradients-512": lambda: _as_written_today(
        fidelity.step_table(_record("fidelity-512-seed0.json")["rows"])
    ),
    **{
        f"decoding-{table}": functools.partial(_decoding, write, file)
        for table, write, file in (
            ("budgets", published.budgets, "budgets"),
            ("bytes", published.equal_bytes, "bytes"),
            ("models", published.models, "models"),
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
    return [CHECKOUT / "README.md", *sorted(docs.glob("*.md")), *sorted(RECORDS.glob("*.md"))]


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
