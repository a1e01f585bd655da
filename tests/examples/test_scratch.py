"""The tables of training from random weights: what is compared, and what is left out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from examples.benchmarks import quality, scratch
from examples.benchmarks.scratch import Race, Row

BASE = {"hidden": 128, "steps": 300, "lr": 2e-3, "targets": "linear"}


def run(method: str, seed: int, loss: float, **others: Any) -> dict[str, Any]:
    setting = BASE | others
    return {
        "method": method,
        "seed": seed,
        "setting": setting,
        "validation": loss,
        "bytes_per_token": 14.0,
    }


EXACT = [run("exact", seed, 2.0 + seed) for seed in range(3)]


def test_gaps_are_paired_by_seed_and_setting() -> None:
    records = [*EXACT, *(run("subspace:20", seed, 2.1 + seed, targets="o") for seed in range(3))]
    records += [run("exact", seed, 5.0, optimizer="sgd") for seed in range(3)]
    records += [run("subspace:20", seed, 5.2, optimizer="sgd") for seed in range(3)]
    assert scratch.gaps(records, BASE, Row("", "subspace:20", "o")) == pytest.approx([0.1] * 3)
    sgd = Row("", "subspace:20", others=(("optimizer", "sgd"),))
    assert scratch.gaps(records, BASE, sgd) == pytest.approx([0.2] * 3)
    lines = scratch.table(records, BASE, [Row("o", "subspace:20", "o"), sgd])
    assert lines[2].startswith("| o | 14 | +0.100, +0.100, +0.100 | +0.100 ± 0.000 |")


def test_two_seeds_are_no_row() -> None:
    records = [*EXACT, *(run("rows:4", seed, 3.0) for seed in range(2))]
    assert scratch.gaps(records, BASE, Row("", "rows:4")) == []
    assert len(scratch.table(records, BASE, [Row("few", "rows:4")])) == 2
    assert list(scratch.steps_needed(records, BASE, Race("", "rows:4", 0.8))) == []


def test_steps_to_a_loss_follow_the_slope_between_two_lengths() -> None:
    """A method whose loss falls by a nat for every factor of e, and starts a tenth above."""
    records = list(EXACT)
    for seed in range(3):
        for steps in (300, 330):
            loss = 2.1 + seed - math.log(steps / 300)
            records.append(run("rows:4", seed, loss, steps=steps))
    found = list(scratch.steps_needed(records, BASE, Race("", "rows:4", 0.8)))
    assert [seed for seed, *_ in found] == [0, 1, 2]
    for _, gap, needed in found:
        assert gap == pytest.approx(0.1)
        assert needed == pytest.approx(math.exp(0.1))
    (row,) = scratch.time_to_loss(records, BASE, [Race("few", "rows:4", 0.8)])[2:]
    assert row.endswith("| 0.800 | 0.884, 0.884, 0.884 |")


def test_rows_are_run_by_the_command_that_their_tables_read() -> None:
    row = Row("", "rows:4", "o", (("optimizer", "sgd"), ("lr", 4e-3)))
    args = quality.parse(scratch.command(scratch.STUDY, row))
    wanted = quality.setting(scratch.STUDY) | dict(row.others) | {"targets": "o"}
    assert quality.setting(args) == wanted
    assert args.methods == ["rows:4"]


def test_the_race_stores_a_tenth_of_the_inputs() -> None:
    assert 0.09 < scratch.share_of_bytes(scratch.RACED, scratch.RACE) < 0.1
    assert scratch.share_of_bytes("exact", scratch.RACE) == 1
