"""What a trial's figures say in one sentence: is the gap real, and is the time worth it."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Quartiles(NamedTuple):
    """Where the middle half of some figures lies."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Quartiles:
        """Return those of at least two figures."""
        return cls(*statistics.quantiles(figures, n=4, method="inclusive"))


class Slope(NamedTuple):
    """How a loss changes with every step."""

    value: float
    error: float
    """Standard error; infinite where too few figures say how much they scatter."""

    @property
    def falls(self) -> bool:
        """Whether the loss falls by more than twice what its scatter allows."""
        return self.value < 0 and -self.value > 2 * self.error

    @classmethod
    def of(cls, steps: Sequence[float], losses: Sequence[float]) -> Slope:
        """Return that of the line of least squares through losses, and its standard error."""
        if len(steps) < 3:
            return cls(0.0, math.inf)
        value, constant = statistics.linear_regression(steps, losses)
        rest = [y - value * x - constant for x, y in zip(steps, losses, strict=True)]
        scatter = sum(each**2 for each in rest) / (len(steps) - 2)
        mean = statistics.fmean(steps)
        return cls(value, math.sqrt(scatter / sum((x - mean) ** 2 for x in steps)))


class Gap(NamedTuple):
    """How far an arm is from exact, and how far exact runs are from each other."""

    value: float
    noise: float
    """Between exact runs with other data orders: the distance without its sign."""

    @property
    def is_real(self) -> bool:
        """Whether it is larger than between exact runs."""
        return abs(self.value) > self.noise


class Worth(enum.StrEnum):
    """Whether an arm is worth its time: more steps of it by exact steps in equal time."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """What one arm's figures say."""

    worth: Worth
    sentence: str


@dataclass(frozen=True)
class Figures:
    """What a verdict on one arm rests on."""

    name: str
    loss: Gap
    """Arm minus exact, in the loss's unit."""
    slope: Slope
    """Of exact training's loss, by step."""
    steps: int
    """That the arms were trained."""
    time: Quartiles
    """Of a step, by the exact one's."""
    saved: float
    """Bytes held for backward, by the exact ones."""
    score: Gap | None = None
    """Arm minus exact; higher is better."""


def verdict(of: Figures) -> Verdict:
    """Say whether the gap in loss is larger than between exact runs, and whether the time pays.

    In the time of N exact steps an arm takes N / time steps. It is worth its time where these
    further steps are more than those by which exact training leads, which is the gap by the slope
    of the exact loss. Both are ranges: the gap may be off by as much as exact runs are from each
    other, the slope by its standard error, the time by its quartiles. Where the ranges overlap,
    noise allows no verdict.

    Args:
        of: the figures of one arm.

    Returns:
        Whether it is worth it, and a sentence that says why.
    """
    if not math.isfinite(of.loss.value):
        return Verdict(Worth.NO, f"{of.name}: its loss is no longer finite, so nothing is gained.")
    head = f"{of.name}: {_distance('loss', of.loss)}"
    if of.score is not None:
        head += f"; {_distance('score', of.score)}"
    worth, tail = _time(of)
    return Verdict(worth, f"{head}; {tail}.")


def _distance(what: str, gap: Gap) -> str:
    if gap.value == 0:
        return f"its {what} is exact training's"
    side = "above" if gap.value > 0 else "below"
    more = "more" if gap.is_real else "no more"
    return (
        f"its {what} is {abs(gap.value):.2g} {side} exact training's, {more} than the "
        f"{gap.noise:.2g} between exact runs with other data orders"
    )


def _time(of: Figures) -> tuple[Worth, str]:
    saved = f"saved bytes are {of.saved:.2f} × exact's"
    ratio = f"a step takes {of.time.median:.2f} × the time of an exact one"
    if of.loss.noise == 0:
        return Worth.UNKNOWN, (
            f"{ratio}, but the exact runs are equal, so there is no noise to compare with (are all "
            "batches the same?): no verdict on the time"
        )
    if of.time.high >= 1:
        is_slow = of.time.low > 1
        longer = f"{ratio}, which is longer" if is_slow else f"{ratio}, no less than times scatter"
        return Worth.NO, f"{longer}: no time is gained, {saved}"
    if not of.slope.falls:
        return Worth.UNKNOWN, (
            f"{ratio}, but the exact loss falls too little in the last half, by its scatter, to "
            "count the gap in steps: noise allows no verdict on the time"
        )
    least, most = _steps_behind(of.loss, of.slope)
    fewest, further = (of.steps * (1 / ratio - 1) for ratio in (of.time.high, of.time.low))
    behind = of.loss.value / -of.slope.value
    place = "behind" if behind >= 0 else "ahead"
    gained = of.steps * (1 / of.time.median - 1)
    tail = (
        f"{ratio}, so that {gained:.0f} further steps fit into the time of {of.steps}, and it is "
        f"about {abs(behind):.0f} steps {place}"
    )
    if least > further:
        return Worth.NO, f"{tail}: not worth it for the time, {saved}"
    if most >= fewest:
        noise = of.loss.noise / -of.slope.value
        return Worth.UNKNOWN, f"{tail}, where noise is {noise:.0f}: no verdict on the time"
    if of.score is not None and of.score.value < 0 and of.score.is_real:
        return Worth.UNKNOWN, f"{tail}: worth the time by the loss, but not shown by the score"
    return Worth.YES, f"{tail}: worth the time"


def _steps_behind(gap: Gap, slope: Slope) -> tuple[float, float]:
    """Return the fewest and the most steps by which an arm is behind; ahead is negative."""
    flat, steep = -slope.value - slope.error, -slope.value + slope.error
    low, high = gap.value - gap.noise, gap.value + gap.noise
    return low / (steep if low > 0 else flat), high / (flat if high > 0 else steep)
