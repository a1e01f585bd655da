"""Who dominates whom: less memory and less time, beyond what measurements scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from examples.benchmarks.timing import paired_ratios, quartiles

TOLERANCE = 0.01
"""Memory that differs by less than this fraction counts as equal."""


class Figures(NamedTuple):
    """What is compared of one arm."""

    memory: float
    """Bytes."""
    seconds: Sequence[float]
    """Of each round."""


def compare_time(mine: Sequence[float], theirs: Sequence[float]) -> int:
    """Return -1 if the first is faster, 1 if slower; 0 if the quartiles of the ratio enclose 1."""
    ratio = quartiles(paired_ratios(mine, theirs))
    return -1 if ratio.high < 1 else 1 if ratio.low > 1 else 0


def compare_memory(mine: float, theirs: float, tolerance: float = TOLERANCE) -> int:
    """Return -1 if the first is smaller, 1 if larger; 0 if they differ by less than the tolerance.

    Args:
        mine: bytes.
        theirs: bytes.
        tolerance: fraction of the larger.
    """
    if abs(mine - theirs) <= tolerance * max(mine, theirs):
        return 0
    return -1 if mine < theirs else 1


def relation(mine: Figures, theirs: Figures) -> str:
    """Return how one arm stands to another.

    Returns:
        "dominates": better in memory or time and not worse in the other; "dominated_by": the other
        way round; "tie": equal in both; "trade_off": better in one, worse in the other.
    """
    signs = {compare_memory(mine.memory, theirs.memory), compare_time(mine.seconds, theirs.seconds)}
    if signs == {0}:
        return "tie"
    if 1 not in signs:
        return "dominates"
    return "dominated_by" if -1 not in signs else "trade_off"


def verdict(arm: str, figures: Mapping[str, Figures], against: Sequence[str]) -> dict[str, Any]:
    """Return the arms that one dominates, is dominated by, ties with, and trades off against."""
    result: dict[str, list[str]] = {
        "dominates": [],
        "dominated_by": [],
        "tie": [],
        "trade_off": [],
    }
    for other in against:
        result[relation(figures[arm], figures[other])].append(other)
    return result


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points that no other is at least as low as in both coordinates.

    Of equal points all stay. In the order of the first coordinate, then of the second.
    """
    front = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(front, key=lambda name: points[name])
