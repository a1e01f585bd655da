"""Tables, verdicts and pictures of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from examples.benchmarks import verdict
from examples.benchmarks.arms import EVERY_ARM, PAPER, REFERENCE, Arm
from examples.benchmarks.models import NAMES
from examples.benchmarks.tables import mebibytes
from examples.benchmarks.timing import paired_ratios, quartiles

Model = Mapping[str, Any]
METRICS = {"peak": "peak_bytes", "saved": "saved_bytes"}


def measured(model: Model) -> dict[str, Model]:
    """Return the arms of a model that have all figures."""
    return {
        name: arm
        for name, arm in model["arms"].items()
        if arm.get("times_s") and "peak_bytes" in arm
    }


def conclude(model: dict[str, Any]) -> None:
    """Add to a model's record what follows from its arms' figures."""
    arms = measured(model)
    if REFERENCE not in arms:
        return
    reference = arms[REFERENCE]
    for arm in arms.values():
        ratio = quartiles(paired_ratios(arm["times_s"], reference["times_s"]))
        arm["time_ratio"] = ratio._asdict()
        arm["step_s"] = statistics.median(arm["times_s"])
        arm["throughput_ratio"] = 1 / ratio.median
        for metric, field in METRICS.items():
            arm[f"{metric}_ratio"] = arm[field] / reference[field]
    for mine, theirs in twins(arms):
        times = (arms[name]["times_s"] for name in (mine, theirs))
        ratios = paired_ratios(*times)
        arms[mine]["time_ratio_at_same_setting"] = quartiles(ratios)._asdict()
    pamm = [arm.name for arm in EVERY_ARM if arm.approximates and arm.name in arms]
    exact = [arm.name for arm in EVERY_ARM if not arm.approximates and arm.name in arms]
    model["verdicts"], model["pareto"] = {}, {}
    for metric, field in METRICS.items():
        figures = {n: verdict.Figures(arm[field], arm["times_s"]) for n, arm in arms.items()}
        model["verdicts"][metric] = {n: verdict.verdict(n, figures, exact) for n in pamm}
        model["pareto"][metric] = verdict.pareto(
            {n: (arm[field], arm["time_ratio"]["median"]) for n, arm in arms.items()}
        )


def twins(arms: Mapping[str, Model]) -> list[tuple[str, str]]:
    """Return, of every PAMM arm, its name and that of the exact arm of the same setting."""
    exact = {
        (arm.budget, arm.mode, arm.float8): arm.name
        for arm in EVERY_ARM
        if arm.compiled and not (arm.approximates or arm.aggressive or arm.checkpointed or arm.peer)
    }
    pairs = [
        (arm.name, exact[arm.budget, arm.mode, arm.float8]) for arm in EVERY_ARM if arm.approximates
    ]
    return [pair for pair in pairs if all(name in arms for name in pair)]


def twins_table(model: Model) -> list[str]:
    """Return the lines of a Markdown table of PAMM arms by the exact arms of the same setting."""
    arms = measured(model)
    lines = ["| PAMM by exact at the same setting | saved | peak | time (quartiles) |"]
    lines.append("|---|--:|--:|--:|")
    for mine, theirs in twins(arms):
        saved, peak = (
            arms[mine][field] / arms[theirs][field] for field in ("saved_bytes", "peak_bytes")
        )
        time = arms[mine]["time_ratio_at_same_setting"]
        quartiles = f"{time['median']:.3f} ({time['low']:.3f}–{time['high']:.3f})"
        lines.append(f"| {mine} by {theirs} | {saved:.3f} | {peak:.3f} | {quartiles} |")
    return lines


def sentences(model: Model, metric: str) -> Iterator[str]:
    """Say of every PAMM arm how it stands to the exact arms."""
    words = {
        "dominates": "dominates",
        "dominated_by": "is dominated by",
        "tie": "ties with",
        "trade_off": "trades memory for time against",
    }
    for name, found in model.get("verdicts", {}).get(metric, {}).items():
        parts = [f"{words[kind]} {', '.join(arms)}" for kind, arms in found.items() if arms]
        yield f"{name}: {'; '.join(parts)}."


def model_table(model: Model) -> list[str]:
    """Return the lines of a Markdown table of a model's arms."""
    lines = [
        "| arm | saved MiB | peak MiB | step ms | by compile (quartiles) | loss |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, arm in model["arms"].items():
        if "time_ratio" in arm:
            ratio = arm["time_ratio"]
            seconds = f"{arm['step_s'] * 1e3:.1f}"
            by = f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
        else:
            seconds, by = arm.get("not_timed", "–"), "–"
        if "saved_bytes" in arm:
            saved, peak = map(mebibytes, (arm["saved_bytes"], arm["peak_bytes"]))
            loss = f"{arm['loss']:.4f}"
        else:
            saved, peak, loss = "–", arm.get("error", "–"), "–"
        lines.append(f"| {name} | {saved} | {peak} | {seconds} | {by} | {loss} |")
    return lines


def summarize_quality(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Return, per arm, the losses of all seeds, their means, and the gaps to the exact runs."""
    summary: dict[str, Any] = {}
    for seed in quality.values():
        for name, run in seed.items():
            each = summary.setdefault(name, {"train": [], "validation": [], "gap": []})
            each["train"].append(run["train_loss"])
            each["validation"].append(run["validation_loss"])
            each["gap"].append(run["validation_loss"] - seed[REFERENCE]["validation_loss"])
    for each in summary.values():
        each.update({f"{k}_mean": statistics.fmean(v) for k, v in list(each.items())})
    return summary


def quality_table(quality: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of losses."""
    seeds = ", ".join(quality)
    lines = [
        f"| after the same steps, seeds {seeds} | training loss | validation loss | above exact |",
        "|---|--:|--:|--:|",
    ]
    for name, each in summarize_quality(quality).items():
        train, validation = (
            ", ".join(f"{loss:.3f}" for loss in each[kind]) for kind in ("train", "validation")
        )
        gaps = ", ".join(f"{gap:+.3f}" for gap in each["gap"])
        above = "–" if name == REFERENCE else f"{gaps} (mean {each['gap_mean']:+.3f})"
        lines.append(f"| {name} | {train} | {validation} | {above} |")
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """Write everything that was measured as Markdown."""
    facts = ", ".join(f"{name} {fact}" for name, fact in record["environment"].items())
    lines = ["# Training steps", "", f"`{record['command']}`", "", f"{facts}.", ""]
    for name, model in record["models"].items():
        lines += [f"## {NAMES[name]}", "", f"{model['cuts']}.", "", *model_table(model), ""]
        done = measured(model)
        if done:
            first = next(iter(done.values()))
            lines += [
                f"Peak: {first['peak_source']}; median of {len(first['peaks_bytes'])}. Step: "
                f"forward and backward, no optimizer; {len(first['times_s'])} rounds of all arms "
                "in turn, ratios paired by round.",
                "",
                *twins_table(model),
                "",
            ]
        for metric in METRICS:
            found = list(sentences(model, metric))
            if found:
                front = ", ".join(model["pareto"][metric])
                lines += [f"By {metric} memory and time (front: {front}):", ""]
                lines += [*(f"- {sentence}" for sentence in found), ""]
        if "verdicts" in model:
            lines += [f"![frontier](frontier-{name}.png)", ""]
        if model.get("quality"):
            lines += [*quality_table(model["quality"]), ""]
    for name in record["left_out"]:
        lines.append(f"{NAMES[name]} is left to `partitions.py` on this machine.")
    if record["skipped"]:
        lines += ["", "Not done for want of time: " + ", ".join(record["skipped"]) + "."]
    return "\n".join(lines).rstrip() + "\n"


def plot(model: Model, path: Path) -> None:
    """Draw memory against throughput, both by those of exact torch.compile."""
    arms = measured(model)
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    for axes, metric in zip(panels, METRICS, strict=True):
        _draw(axes, arms, metric, model["pareto"][metric])
    panels[0].set_ylabel("throughput, by that of compile; bars: quartiles")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.suptitle(model["cuts"], wrap=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axes: Any, arms: Mapping[str, Model], metric: str, front: Sequence[str]) -> None:
    points = {name: (arm[f"{metric}_ratio"], arm["throughput_ratio"]) for name, arm in arms.items()}
    steps = [points[name] for name in front]
    axes.plot(
        *zip(*steps, strict=True),
        drawstyle="steps-post",
        color="black",
        linewidth=0.8,
        zorder=0,
        label="not dominated",
    )
    for arm in EVERY_ARM:
        if arm.name not in points:
            continue
        x, y = points[arm.name]
        ratio = arms[arm.name]["time_ratio"]
        axes.errorbar(
            x,
            y,
            yerr=[[y - 1 / ratio["high"]], [1 / ratio["low"] - y]],
            fmt=_marker(arm),
            color=_color(arm),
            capsize=2,
            markersize=7,
            linewidth=0.8,
            alpha=0.8,
            label=arm.name,
        )
    axes.set_xlabel(f"{metric} memory, by that of compile")


def _color(arm: Arm) -> str:
    if arm.approximates:
        return "C3" if arm.rules == PAPER else "C2"
    return "C0" if arm.compiled else "gray"


def _marker(arm: Arm) -> str:
    """Return the same marker for the same setting of torch.compile."""
    if not arm.compiled:
        return "*"
    if arm.aggressive or arm.checkpointed or arm.peer:
        return "P" if arm.aggressive else "X" if arm.checkpointed else "D"
    return {1.0: "o", 0.99: "s", 0.8: "^", 0.5: "v"}[arm.budget]
