"""Directions that hold most of an input, and draws among them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pamm_compile.methods.subspace.directions import draw, principal_directions

seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@given(seeds, st.integers(1, 600), st.integers(1, 24), st.integers(1, 30))
@settings(max_examples=40)
def test_directions_are_orthonormal_or_shorter(seed: int, b: int, n: int, r: int) -> None:
    r = min(r, n)
    x = normal(seed, b, n)
    basis = principal_directions(x, r, torch.tensor(seed), rows=4, iterations=1)
    gram = basis @ basis.T
    assert torch.linalg.eigvalsh(gram.double()).max() < 1 + 1e-5
    if b >= 4 * r:
        assert torch.allclose(gram, torch.eye(r), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_directions_of_16_bits_are_nearly_those_of_32(dtype: torch.dtype, scale: float) -> None:
    """Where one direction is 300 times as strong as the last that is kept, with an offset."""
    spectrum = torch.logspace(0, -2.5, 48)
    x = scale * (normal(1, 512, 48) * spectrum @ torch.linalg.qr(normal(2, 48, 48)).Q + 0.1)
    narrow = x.to(dtype)
    wide = narrow.double()

    def left_over(of: Tensor) -> float:
        basis = principal_directions(of, 24, torch.tensor(5), rows=8, iterations=1).double()
        return error(wide @ basis.T @ basis, wide)

    assert left_over(narrow) < 1.15 * left_over(narrow.float())


@given(seeds, st.integers(2, 20), st.integers(1, 19))
@settings(max_examples=40)
def test_what_is_drawn_is_orthonormal_and_within_the_span(seed: int, m: int, r: int) -> None:
    r = min(r, m - 1)
    basis = torch.linalg.qr(normal(seed, 24, m)).Q.T
    rows = normal(seed + 1, m, m) * torch.logspace(0, -2, m) @ basis
    kept, weights = draw(rows, r, torch.tensor(seed), power=1)
    assert kept.shape == (r, 24)
    assert torch.allclose(kept @ kept.T, torch.eye(r), atol=1e-3)
    assert torch.allclose(kept @ basis.T @ basis, kept, atol=1e-3)
    assert (weights >= 1).all()


def test_the_mean_of_draws_is_all_of_the_span() -> None:
    basis = torch.linalg.qr(normal(0, 24, 10)).Q.T
    rows = torch.linalg.qr(normal(1, 10, 10)).Q * torch.logspace(0, -1, 10) @ basis
    seeds = torch.randint(2**31, (2000,), generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(24, 24, dtype=torch.float64)
    for seed in seeds:
        kept, weights = draw(rows, 4, seed, power=1)
        mean += ((kept.T * weights) @ kept).double() / len(seeds)
    # What is least likely has odds of a seventh: a deviation of 0.06 over 2,000 draws.
    assert error(mean, basis.T @ basis) < 0.06


@pytest.mark.parametrize("power", [1, 2])
def test_odds_are_by_size_and_what_is_large_is_certain(power: int) -> None:
    """Sizes 100, 3, 2, 1 and two places: the first has one, the rest 1/2, 1/3 and 1/6 of one."""
    sizes = torch.tensor([3.0, 100, 1, 2])
    rows = torch.nn.functional.pad(torch.diag(sizes**power), (0, 2))
    counts: dict[int, list[float]] = {}
    seeds = torch.randint(2**31, (1200,), generator=torch.Generator().manual_seed(0))
    for seed in seeds:
        kept, weights = draw(rows, 2, seed, power=power)
        for row, weight in zip(kept, weights, strict=True):
            assert row.norm() == pytest.approx(1, rel=1e-4)
            counts.setdefault(int(row.abs().argmax()), []).append(float(weight))
    assert len(counts[1]) == len(seeds)
    for direction, odds in ((1, 1.0), (0, 1 / 2), (3, 1 / 3), (2, 1 / 6)):
        assert counts[direction] == pytest.approx([1 / odds] * len(counts[direction]), rel=1e-3)
        assert len(counts[direction]) / len(seeds) == pytest.approx(odds, abs=0.05)


@pytest.mark.parametrize("size", [0.0, 1e-20])
def test_rows_of_nothing_or_of_one_direction_are_drawn_from_too(size: float) -> None:
    kept, weights = draw(torch.full((4, 6), size), 2, torch.tensor(3), power=2)
    assert kept.isfinite().all()
    assert torch.linalg.eigvalsh(kept @ kept.T).max() < 1 + 1e-5
    assert weights.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_handed_on(bad: float) -> None:
    rows = normal(0, 4, 6)
    rows[2, 3] = bad
    kept, weights = draw(rows, 2, torch.tensor(3), power=2)
    assert not kept.isfinite().all()
    assert weights.isfinite().all()
