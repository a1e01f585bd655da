"""Verdicts on made-up figures."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pamm_compile.trials.verdict import Figures, Gap, Quartiles, Slope, Worth, verdict

# 25 further steps fit into the time of 100; a hundredth of loss is ten steps.
GOOD = Figures(
    name="arm",
    loss=Gap(0.01, 0.002),
    slope=Slope(-0.001, 0.0001),
    steps=100,
    time=Quartiles(0.79, 0.8, 0.81),
    saved=0.7,
)


@pytest.mark.parametrize(
    ("changes", "worth", "parts"),
    [
        ({}, Worth.YES, ("0.01 above", ", more than", "25 further steps", "10 steps behind")),
        ({"loss": Gap(0.001, 0.002)}, Worth.YES, ("no more than the 0.002", "1 steps behind")),
        ({"loss": Gap(-0.01, 0.002)}, Worth.YES, ("0.01 below", "10 steps ahead")),
        ({"loss": Gap(0.05, 0.002)}, Worth.NO, ("50 steps behind", "saved bytes are 0.70 ×")),
        # The gap is worth the time, but might as well be three times as large.
        ({"loss": Gap(0.01, 0.02)}, Worth.UNKNOWN, ("noise is 20: no verdict",)),
        ({"loss": Gap(0.024, 0.002)}, Worth.UNKNOWN, ("no verdict",)),
        ({"loss": Gap(0.01, 0.0)}, Worth.UNKNOWN, ("exact runs are equal",)),
        ({"loss": Gap(math.nan, 0.002)}, Worth.NO, ("no longer finite",)),
        ({"slope": Slope(-0.001, 0.0006)}, Worth.UNKNOWN, ("falls too little",)),
        ({"slope": Slope(0.001, 0.0)}, Worth.UNKNOWN, ("falls too little",)),
        ({"slope": Slope(0.0, math.inf)}, Worth.UNKNOWN, ("falls too little",)),
        ({"time": Quartiles(0.9, 0.97, 1.02)}, Worth.NO, ("no less than times scatter", "0.70 ×")),
        ({"time": Quartiles(1.1, 1.2, 1.3)}, Worth.NO, ("longer: no time is gained",)),
        # Times that scatter count, too: at 0.95 five steps are saved, at 0.6 67.
        ({"time": Quartiles(0.6, 0.8, 0.95)}, Worth.UNKNOWN, ("no verdict",)),
        ({"score": Gap(0.01, 0.002)}, Worth.YES, ("score is 0.01 above",)),
        ({"score": Gap(-0.001, 0.002)}, Worth.YES, ("score is 0.001 below", "no more than")),
        ({"score": Gap(-0.01, 0.002)}, Worth.UNKNOWN, ("not shown by the score",)),
    ],
)
def test_verdicts(changes: dict[str, object], worth: Worth, parts: tuple[str, ...]) -> None:
    found = verdict(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    assert found.worth is worth, found.sentence
    for part in parts:
        assert part in found.sentence
    assert found.sentence.startswith("arm: its loss is")
    assert found.sentence.count(".\n") == 0


def test_slopes_know_their_error() -> None:
    line = Slope.of([10, 20, 30, 40], [4.0, 3.0, 2.0, 1.0])
    assert line.value == pytest.approx(-0.1)
    assert line.error == pytest.approx(0, abs=1e-9)
    assert line.falls
    # By hand: residuals 1, -3, 3, -1 halves around a fall of 0.6 a step.
    scattered = Slope.of([0, 1, 2, 3], [2.0, -0.6, 1.8, -0.8])
    assert scattered.value == pytest.approx(-0.6)
    rest = [y - (1.5 - 0.6 * x) for x, y in enumerate([2.0, -0.6, 1.8, -0.8])]
    assert scattered.error == pytest.approx(math.sqrt(sum(r * r for r in rest) / 2 / 5))
    assert not scattered.falls
    assert not Slope.of([0, 1], [1.0, 0.0]).falls
