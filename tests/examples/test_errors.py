"""The study of loss against the error of gradients, of records whose answer is known."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from examples.benchmarks import models
from examples.studies import errors

SETTING = errors.task(300).name


def record(arm: str, seed: int, loss: float) -> dict[str, Any]:
    return {"task": SETTING, "arm": arm, "seed": seed, "loss": loss}


def runs() -> list[dict[str, Any]]:
    figures = {name: {"error": e, "lasting": 1 - e} for name, e in (("eight", 0.01), ("four", 0.2))}
    exact = [{**record("exact", seed, 2.0), "errors": figures} for seed in range(3)]
    orders = [record(f"order {n}", seed, 2.03) for n in (1, 2, 3) for seed in range(3)]
    near = [record("eight", seed, 2.01) for seed in range(3)]
    far = [record("four", seed, 2.5 + 0.1 * seed) for seed in range(3)]
    return [*exact, *orders, *near, *far]


def test_a_gap_within_the_noise_is_called_none() -> None:
    table = errors.table(runs())
    by_arm = {cells[0]: cells[1:] for line in table if (cells := line.strip("| ").split(" | "))}
    assert by_arm["X in 8 bits"] == ["0.010", "+0.010, +0.010, +0.010", "+0.010 (none)"]
    assert by_arm["X in 4 bits"] == ["0.200", "+0.500, +0.600, +0.700", "+0.600"]
    assert "Subspace, 1/8, 4 bits" not in by_arm
    assert by_arm["exact, other orders of the batches"][1] == "+0.030 to +0.030"


@pytest.mark.parametrize("other", [("muon",), ("adamw", 512)])
def test_other_settings_have_a_table_of_their_own(other: tuple[Any, ...]) -> None:
    task = errors.task(300, *other).name
    losses = {"exact": 2.0, "four": 2.25}
    others = [{**record(arm, 0, loss), "task": task} for arm, loss in losses.items()]
    assert errors.table([*runs(), *others])[-1] == f"| {task} | X in 4 bits | +0.250 |"
    assert errors.table(runs())[-1].startswith("| exact, other orders")


def test_noise_is_that_of_a_mean_of_three_seeds() -> None:
    assert errors.noise(runs(), SETTING) == pytest.approx(0.03 / math.sqrt(3))


@pytest.mark.parametrize(
    ("other", "wanted"), [([1.0, 2.0, 30.0], 1.0), ([3.0, 2.0, 1.0], -1.0), ([1.0, 3.0, 2.0], 0.5)]
)
def test_correlation_is_of_ranks(other: list[float], wanted: float) -> None:
    assert errors.by_rank([0.1, 0.2, 0.4], other) == pytest.approx(wanted)


def test_a_run_has_errors_where_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_WINDOWS", 2)
    monkeypatch.setattr(errors, "_BYTES", 64)
    tiny = models.Shape("llama", 32, 1, 2, 64, 256, 64)
    setting = dataclasses.replace(errors.task(2), model=lambda: models.build(tiny))
    chosen = {name: errors.METHODS[name] for name in ("eight", "subspace")}
    monkeypatch.setattr(errors, "METHODS", chosen)
    found = errors.run(setting, "exact", 0, "aot_eager")
    assert math.isfinite(found["loss"])
    assert 0 < found["errors"]["eight"]["error"] < 0.05 < found["errors"]["subspace"]["error"]
    assert "errors" not in errors.run(setting, "eight", 0, "aot_eager")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "errors.png"
    errors.draw(runs(), path)
    assert path.stat().st_size > 10_000
