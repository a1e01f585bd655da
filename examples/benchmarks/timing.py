"""Times, and what can be said of two of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Quartiles(NamedTuple):
    """Where the middle half of some figures lies."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def quartiles(figures: Sequence[float]) -> Quartiles:
    """Return median and quartiles; of a single figure, three times itself."""
    if len(figures) == 1:
        return Quartiles(*figures * 3)
    return Quartiles(*statistics.quantiles(figures, n=4, method="inclusive"))


def paired_ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratios of two arms' times, round by round.

    A machine that slows down slows both arms of a round: the ratio stays.
    """
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def in_turn(names: Sequence[str], round_: int) -> list[str]:
    """Return names in an order that begins elsewhere every round.

    Whoever comes first finds other caches than whoever comes after another.
    """
    first = round_ % len(names)
    return [*names[first:], *names[:first]]
