"""The tables of predicted times, and that they say what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.benchmarks import device_model
from examples.benchmarks.models import SHAPES
from pamm_compile import GradientSubspace
from pamm_compile.devices import device_named, exact_seconds, site_seconds
from pamm_compile.sites.cost import saved_time


def test_tables_are_labelled_as_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    device_model.main(["--devices", "h100", "mi300x", "--methods", "pamm:256"])
    printed = capsys.readouterr().out
    assert printed.count("a model, not a measurement") == 2
    # No figures of float8 are known of an MI300X.
    assert printed.count("LLaMA-7B") == 2 * 5 + 3 + len(device_model.RANKS)


def test_a_step_takes_as_long_as_its_floating_point_operations() -> None:
    shape, device = SHAPES["llama-1b"], device_named("h100")
    # 1.3 billion parameters, 6 operations a parameter and token.
    assert device_model.step_seconds(shape, device) == pytest.approx(
        6 * 1.31e9 * 16384 / (0.66 * 989.4e12), rel=0.1
    )


def test_a_step_in_float8_is_faster_but_for_what_stays_in_16_bits() -> None:
    shape, device = SHAPES["llama-7b"], device_named("h100")
    exact = device_model.step_seconds(shape, device)
    kept, cast, one = (
        device_model.float8_step_seconds(shape, device, recipe) for recipe in device_model.RECIPES
    )
    assert exact > kept > cast > one > exact / 2
    size = device_model.float8_sizes(shape, device_model.HIGH_PRECISION_DW)["down"]
    rowwise = device_model.float8_sizes(shape, "rowwise")["down"]
    assert exact_seconds(rowwise, device) < exact_seconds(size, device)
    # Where nothing multiplies in float8, the casts are emulated.
    ampere = device_named("a100")
    assert exact_seconds(rowwise, ampere) == exact_seconds(size, ampere)


def test_coefficients_in_float8_gain_only_if_casts_are_free() -> None:
    device = device_named("h100")
    rows = [line.strip("| ").split(" | ") for line in device_model.joined_table(device)[2:]]
    assert len(rows) == len(device_model.MODELS) * len(device_model.RANKS)
    for row in rows:
        usual, float8, casts = map(int, row[2:5])
        assert float8 < usual < float8 + casts
        assert [cell[0] for cell in row[5:]] == ["-", "+"]


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("gradients:0.0625", {"llama-350m": 0.13, "llama-1b": 0.20, "llama-7b": 0.22}),
        ("gradients:0.125", {"llama-350m": 0.09, "llama-1b": 0.14, "llama-7b": 0.15}),
    ],
)
def test_what_remembered_directions_are_predicted_to_save(
    text: str, least: dict[str, float]
) -> None:
    """With every tenth step in 8 bits, and finding the directions."""
    device = device_named("h100")
    for name, share in least.items():
        assert device_model.saved(SHAPES[name], device, text) >= share


@pytest.mark.parametrize("text", ["gradients:0.0625", "gradients:0.125", "subspace:0.125"])
def test_a_narrow_model_is_left_exact_where_it_would_lose(text: str) -> None:
    """What `goal="speed"` compresses of LLaMA-60M saves time, and of others nothing is lost."""
    shape, device = SHAPES["llama-60m"], device_named("h100")
    by_input = {
        target: device_model.saved(shape, device, text, [target])
        for target in device_model.sizes(shape)
    }
    declined = {
        target
        for target, size in device_model.sizes(shape).items()
        if saved_time(device_model.method_of(text), size, device) <= 0
    }
    assert declined == {target for target, share in by_input.items() if share <= 0}
    assert sum(share for target, share in by_input.items() if target not in declined) >= 0


def test_finding_directions_is_part_of_the_time() -> None:
    device = device_named("h100")
    size = device_model.sizes(SHAPES["llama-1b"])["q, k, v"]
    method = GradientSubspace(0.0625)
    alone = replace(size, alike=1)
    assert method.together(size) > method.together(alone) == 1
    # What waits for small matrices waits once for all that are found together.
    assert method.finding_seconds(alone, device) > 3 * method.finding_seconds(size, device)
    found = method.finding_seconds(alone, device) - method.finding_seconds(size, device)
    gained = site_seconds(method, alone, device) - site_seconds(method, size, device)
    assert gained == pytest.approx(found / method.every)
