"""The tables of predicted times, and that they say what they are."""

from __future__ import annotations

import pytest

from examples.benchmarks import device_model
from examples.benchmarks.models import SHAPES
from pamm_compile.devices import device_named


def test_tables_are_labelled_as_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    device_model.main(["--devices", "h100", "mi300x", "--methods", "pamm:256"])
    printed = capsys.readouterr().out
    assert printed.count("a model, not a measurement") == 2
    assert printed.count("LLaMA-7B") == 2 * 5


def test_a_step_takes_as_long_as_its_floating_point_operations() -> None:
    shape, device = SHAPES["llama-1b"], device_named("h100")
    # 1.3 billion parameters, 6 operations a parameter and token.
    assert device_model.step_seconds(shape, device) == pytest.approx(
        6 * 1.31e9 * 16384 / (0.66 * 989.4e12), rel=0.1
    )
