"""A trial as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pamm_compile.errors import MissingPackageError


def draw(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    gaps: Mapping[str, float],
    noise: float,
    costs: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw every arm's training losses, its distance from exact, and its costs by exact's.

    Args:
        path: of the picture.
        losses: of every step, by arm; of the exact arm first.
        gaps: in the final loss, by compressed arm.
        noise: distance of two exact runs' final losses.
        costs: of every compressed arm, by exact's, by their names.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        canvas: Any = importlib.import_module("matplotlib.backends.backend_agg")
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingPackageError(
            "a picture needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    # Without pyplot, whose settings and open figures are the user's.
    figure = figures.Figure(figsize=(10, 6), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["losses", "gaps"], ["steps", "costs"]])
    exact = next(iter(losses.values()))
    colors = {name: f"C{index}" for index, name in enumerate(losses)}
    for name, each in losses.items():
        axes["losses"].plot(each, label=name, color=colors[name], linewidth=0.8)
        if name in gaps:
            above = [a - b for a, b in zip(each, exact, strict=True)]
            axes["steps"].plot(above, color=colors[name], linewidth=0.8)
    axes["losses"].set(title="training loss", xlabel="step")
    axes["losses"].legend(fontsize="small")
    axes["steps"].axhline(0, color=colors[next(iter(losses))], linewidth=0.8)
    axes["steps"].set(title="above exact, on the same batch", xlabel="step")

    names = list(gaps)
    axes["gaps"].axvspan(-noise, noise, color="0.85", label="between two exact runs")
    axes["gaps"].axvline(0, color="black", linewidth=0.8)
    axes["gaps"].barh(names, list(gaps.values()), 0.4, color=[colors[name] for name in names])
    axes["gaps"].set(title="final loss, above exact")
    axes["gaps"].invert_yaxis()
    axes["gaps"].locator_params(axis="x", nbins=4)
    axes["gaps"].margins(x=0.1, y=0.4)
    axes["gaps"].legend(fontsize="small", loc="lower right")

    kinds = list(next(iter(costs.values())))
    height = 0.8 / len(names)
    for row, name in enumerate(names):
        at = [index + (row - (len(names) - 1) / 2) * height for index in range(len(kinds))]
        bars = axes["costs"].barh(at, list(costs[name].values()), height, color=colors[name])
        axes["costs"].bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
    axes["costs"].axvline(1, color="black", linewidth=0.8)
    axes["costs"].set_yticks(range(len(kinds)), kinds)
    axes["costs"].margins(x=0.1)
    axes["costs"].invert_yaxis()
    axes["costs"].set(title="by the exact arm's")
    figure.savefig(path, dpi=120)
