"""Loss above exact against the error of the gradients, from random weights, by method and steps.

    python examples/studies/errors.py                       # three seeds, about two hours
    python examples/studies/errors.py --steps 300 --arm exact eight --seed 0
    python examples/studies/errors.py --encoder             # gradients of score.py's other setting
    python examples/studies/errors.py --table

A byte-level LLaMA of width 128 and two layers trains for 300 and for 1,000 steps, each with a
schedule of its own; --width takes a wider one. Exact runs with the batches in three other orders
are the control: a gap that is not larger than theirs is none. Errors are `pamm_compile.fidelity`'s,
of the model that exact training ends with. A last table says which figure orders methods as their
losses do: the error, or the share of what gradients of different tokens have in common. Runs that
--out holds are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn

import pamm_compile
from examples import encoder
from examples.benchmarks import cli, corpus, machine, models, score, tables, training
from examples.benchmarks.machine import CHECKOUT
from examples.benchmarks.score import SEEDS, Arm, Record, Task
from examples.studies import tried

STEPS = (300, 1000)
RATES = {128: 2e-3, 512: 1e-3}
"""By width."""
_WIDTH, _LAYERS, _WINDOWS, _BYTES = 128, 2, 8, 256
_HEADS = {128: 4, 512: 8}
_DRAWS = 4

CONTROLS = {f"order {n}": Arm(f"exact, order {n}", order=n) for n in (1, 2, 3)}
METHODS = {
    name: Arm(label, rules, goal="any")
    for name, label, rules in (
        ("eight", "X in 8 bits", "linear=quantized:8"),
        ("four", "X in 4 bits", "linear=quantized:4"),
        ("gradients", "gradient subspace, 1/8", "linear=gradients:every=10:carry=0:warmup=1"),
        ("carried", "the same, T = 5, half carried", "linear=gradients:every=5:carry=0.5:warmup=1"),
        ("subspace", "Subspace, 1/8, 4 bits", "linear=subspace:0.125"),
        ("subspace-8", "Subspace, 1/8, 8 bits", "linear=subspace:0.125:bits=8"),
        ("subspace-4", "Subspace, 1/4, 4 bits", "linear=subspace:0.25"),
        ("subspace-4-8", "Subspace, 1/4, 8 bits", "linear=subspace:0.25:bits=8"),
        ("pamm-64", "PAMM, k = 64, on Q, K, V", "qkv=pamm:1000000:min_generators=64"),
    )
}
ARMS = {"exact": Arm("exact"), **CONTROLS, **METHODS}
ENCODER = tried.TASKS["encoder"]
ENCODER_ARMS = {
    n: arm for n, arm in ENCODER.arms.items() if arm.rules and not (arm.first or arm.last)
}
"""Of which `score.py` and `tried.py` have the losses."""


def _llama(width: int) -> nn.Module:
    inner, heads = models.study_inner(width), _HEADS[width]
    return models.build(models.Shape("llama", width, _LAYERS, heads, inner, 256, _BYTES))


def _batches(seed: int, *, held_out: bool = False) -> Iterator[training.Batch]:
    text = corpus.Text()
    part = text.validation if held_out else text.train
    return training.batches(part, "llama", _WINDOWS, _BYTES, seed)


def _validation(model: nn.Module) -> dict[str, float]:
    data = _batches(0, held_out=True)
    return {"loss": training.validate(lambda batch: model(**batch).loss, model, data, 32)}


def task(steps: int, optimizer: str = "adamw", width: int = _WIDTH) -> Task:
    """Return the setting of runs of so many steps."""
    name = f"{steps} steps" if optimizer == "adamw" else f"{steps} steps, {optimizer}"
    return Task(
        name if width == _WIDTH else f"{name}, width {width}",
        steps,
        (RATES[width],),
        ARMS,
        functools.partial(_llama, width),
        _batches,
        lambda call, batch: call(**batch).loss,
        _validation,
        functools.partial(training.optimizer_of, kind=optimizer),
    )


def measured(
    model: nn.Module, arms: dict[str, Arm], *args: Any, **batch: Any
) -> dict[str, dict[str, float]]:
    """Return `error` and `lasting` of the gradients by arm, all inputs together."""
    found = {}
    for name, arm in arms.items():
        sites = pamm_compile.fidelity(
            model, *args, rules=arm.rules, draws=_DRAWS, progress=False, **batch
        ).sites
        lasting = [site.lasting for site in sites if not math.isnan(site.lasting)]
        found[name] = {
            "error": math.sqrt(statistics.fmean(site.error**2 for site in sites)),
            "lasting": statistics.median(lasting),
        }
    return found


def run(setting: Task, name: str, seed: int, base: str) -> Record:
    """Train one arm; an exact one also gives the errors of all methods."""
    if name == "exact":
        setting = dataclasses.replace(
            setting,
            score=lambda model: {
                **_validation(model),
                "errors": measured(model, METHODS, **next(_batches(seed + 500))),
            },
        )
    return score.run(setting, name, seed, setting.rates[0], base)


def gaps(records: Sequence[Record], setting: str, name: str) -> list[float]:
    """Return held loss above exact's by seed; nothing where a seed is missing."""
    of = {(r["arm"], r["seed"]): r["loss"] for r in records if r["task"] == setting}
    pairs = [(of.get((name, seed)), of.get(("exact", seed))) for seed in range(SEEDS)]
    return [mine - exact for mine, exact in pairs if mine is not None and exact is not None]


def noise(records: Sequence[Record], setting: str) -> float:
    """Return the standard error of a mean gap of three seeds, by exact runs in other orders."""
    found = [gap for name in CONTROLS for gap in gaps(records, setting, name)]
    return math.sqrt(statistics.fmean(gap**2 for gap in found) / SEEDS) if found else math.nan


def of_gradients(records: Sequence[Record], setting: str, name: str, figure: str) -> float:
    """Return "error" or "lasting" of an arm's gradients after exact training; NaN if unknown."""
    found = [r["errors"] for r in records if r["task"] == setting and "errors" in r]
    figures = [each[name][figure] for each in found if name in each]
    return statistics.fmean(figures) if figures else math.nan


def _lengths(records: Sequence[Record]) -> list[int]:
    """Return the numbers of steps of which there is an exact run for every seed and a control."""
    return [
        steps
        for steps in STEPS
        if len(gaps(records, task(steps).name, "exact")) == SEEDS
        and not math.isnan(noise(records, task(steps).name))
    ]


def table(records: Sequence[Record]) -> list[str]:
    """Return the lines of a table, a row an arm; a gap within the noise is called none."""
    head, lengths = ["arm"], _lengths(records)
    for steps in lengths:
        head += [f"error after {steps:,} steps", f"loss above exact after {steps:,}", "mean"]
    rows = []
    for name, arm in METHODS.items():
        row = [arm.label]
        for steps in lengths:
            found = gaps(records, task(steps).name, name)
            if len(found) < SEEDS:
                row += ["-", "-", "-"]
                continue
            mean, known = statistics.fmean(found), noise(records, task(steps).name)
            row.append(f"{of_gradients(records, task(steps).name, name, 'error'):.3f}")
            row.append(", ".join(f"{gap:+.3f}" for gap in found))
            row.append(f"{mean:+.3f}" + (" (none)" if abs(mean) <= 2 * known else ""))
        if set(row[1:]) != {"-"}:
            rows.append(row)
    row = ["exact, other orders of the batches"]
    for steps in lengths:
        found = [g for name in CONTROLS for g in gaps(records, task(steps).name, name)]
        shown = f"{min(found):+.3f} to {max(found):+.3f}" if found else "-"
        row += ["0", shown, f"± {noise(records, task(steps).name):.3f}"]
    return [*tables.markdown(head, [*rows, row]), *_of_others(records)]


def _of_others(records: Sequence[Record]) -> list[str]:
    """Return the lines of a table of other widths and optimizers; none without runs."""
    rows = []
    known = {task(steps).name for steps in STEPS}
    for setting in sorted({each["task"] for each in records if "arm" in each} - known):
        for name, arm in METHODS.items():
            if found := gaps(records, setting, name):
                rows.append([setting, arm.label, ", ".join(f"{gap:+.3f}" for gap in found)])
    return ["", *tables.markdown(["setting", "arm", "loss above exact"], rows)] if rows else []


def encoder_gaps(scores: Sequence[Record]) -> dict[str, float]:
    """Return mean held loss above exact's by arm of the encoder, over the seeds that there are."""
    runs = [r for r in scores if "loss" in r and r["task"] == ENCODER.name]
    of = score.chosen_runs(ENCODER, runs, least=1)
    return {
        name: statistics.fmean(run["loss"] - of["exact"][s]["loss"] for s, run in of[name].items())
        for name in ENCODER_ARMS
        if name in of and "exact" in of
    }


def by_rank(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's correlation."""
    ranks = [[sorted(each).index(value) for value in each] for each in (one, other)]
    return statistics.correlation(*ranks)


def predictors(records: Sequence[Record], scores: Sequence[Record]) -> list[str]:
    """Return the lines of a table: how error and `lasting` order methods as their gaps do."""
    rows = []
    known = {task(n).name: _mean_gaps(records, task(n).name) for n in _lengths(records)}
    for setting, of in {**known, "encoder": encoder_gaps(scores)}.items():
        names = [n for n in of if not math.isnan(of_gradients(records, setting, n, "error"))]
        if len(names) > 2:
            shown = [str(len(names))]
            for figure in ("error", "lasting"):
                found = [of_gradients(records, setting, name, figure) for name in names]
                shown.append(f"{by_rank(found, [of[name] for name in names]):+.2f}")
            rows.append([setting, *shown])
    return tables.markdown(["setting", "methods", "by error", "by `lasting`"], rows)


def _mean_gaps(records: Sequence[Record], setting: str) -> dict[str, float]:
    found = {name: gaps(records, setting, name) for name in METHODS}
    return {name: statistics.fmean(of) for name, of in found.items() if len(of) == SEEDS}


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw mean gaps against errors, a panel a number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    lengths = _lengths(records)
    figure = Figure(figsize=(4 + 4 * len(lengths), 4.6), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axis, steps in zip(panels, lengths, strict=True):
        setting = task(steps).name
        known = 2 * noise(records, setting)
        axis.axhspan(-known, known, color="0.88", label="two standard errors of exact runs")
        for index, (name, arm) in enumerate(METHODS.items()):
            found = gaps(records, setting, name)
            if len(found) == SEEDS:
                where = of_gradients(records, setting, name, "error")
                axis.plot([where] * SEEDS, found, ".", color=f"C{index}", alpha=0.4)
                axis.plot(where, statistics.fmean(found), "o", color=f"C{index}", label=arm.label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"{steps:,} steps", xlabel="error of the weight gradients", xscale="log")
        # Powers of ten alone: labels between them overlap.
        axis.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel("held loss above exact, nats a byte")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--steps", type=cli.positive, nargs="+", default=list(STEPS))
    parser.add_argument(
        "--arm", nargs="+", choices=sorted({*ARMS, *ENCODER_ARMS}), help="default: all"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--optimizer", choices=tuple(training.OPTIMIZERS), default="adamw")
    parser.add_argument("--width", type=int, choices=RATES, default=_WIDTH)
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--base", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--table", action="store_true", help="print the tables, draw the picture")
    parser.add_argument("--encoder", action="store_true", help="measure gradients of the encoder")
    parser.add_argument("--scores", type=Path, default=CHECKOUT / "docs/benchmarks/score.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/errors.jsonl"))
    args = parser.parse_args(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.encoder:
        data = next(encoder.batches(500))
        chosen = {n: arm for n, arm in ENCODER_ARMS.items() if n in (args.arm or ENCODER_ARMS)}
        found = {"task": "encoder", "errors": measured(encoder.model(), chosen, *data)}
        score.append(args.out, {**found, "environment": machine.facts()})
    elif not args.table:
        _run_all(args)
    records = tables.records(args.out)
    print("\n".join([*table(records), "", *predictors(records, tables.records(args.scores))]))
    if _lengths(records):
        draw(records, args.out.with_suffix(".png"))


def _run_all(args: argparse.Namespace) -> None:
    for seed in args.seed:
        for steps in args.steps:
            setting = task(steps, args.optimizer, args.width)
            for name in args.arm or ARMS:
                key = {"task": setting.name, "arm": name, "seed": seed}
                if not any(key.items() <= each.items() for each in tables.records(args.out)):
                    score.append(args.out, run(setting, name, seed, args.base))


if __name__ == "__main__":
    cli.run(main)
