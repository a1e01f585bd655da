"""Every format: what is decoded, how far it may be off, and what it takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pamm_compile.methods import codes
from pamm_compile.methods.codes import Float8, Rows, Steps

Format = Steps | Rows | Float8

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

FORMATS: list[Format] = [
    *(Steps(4, rows, dithered, growing) for rows, dithered, growing in
      [(256, True, False), (64, False, True), (7, True, True), (64, False, False)]),
    *(Steps(8, rows, dithered, growing) for rows, dithered, growing in
      [(256, True, False), (64, False, True), (7, False, False)]),
    Rows(),
    Float8(),
]  # fmt: skip

formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**31 - 1)
tokens_ = st.integers(1, 300)
widths = st.integers(1, 20)
dtypes = st.sampled_from(FLOATS)


def heavy(seed: int, b: int, n: int) -> Tensor:
    """Few large and many small entries, columns of different sizes, some of nothing."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, generator=draw) ** 3 * torch.logspace(-3, 2, n)
    return x * (torch.rand(n, generator=draw) > 0.1)


def encode(coder: Format, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    if isinstance(coder, Steps):
        return coder.encode(x, torch.tensor(seed) if coder.dithered else None)
    return coder.encode(x)


@pytest.mark.quick
@given(formats, seeds, tokens_, widths, dtypes)
@settings(max_examples=100)
def test_entries_are_within_the_bound_and_bytes_are_those_said(
    coder: Format, seed: int, b: int, n: int, dtype: torch.dtype
) -> None:
    x = heavy(seed, b, n).to(dtype)
    stored = encode(coder, x, seed)
    assert coder.nbytes(b, n) == sum(each.nbytes for each in stored)
    decoded = coder.decode(stored, dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype
    off = (decoded.double() - x.double()).abs()
    # A step is added and taken off in float32, of what is as large as the largest.
    info = torch.finfo(dtype)
    # Subnormal results are multiples of the smallest.
    rounding = ROUNDING[dtype] * x.double().abs() + 1e-5 * coder.bound(x).amax()
    rounding += info.smallest_normal * info.eps
    assert (off <= coder.bound(x) + rounding).all()


# A row of few features may hold nothing but its largest entry and zeros, which are codes.
@given(formats, seeds, st.integers(2, 300), st.integers(8, 24))
@settings(max_examples=40)
def test_the_bound_is_not_far_above(coder: Format, seed: int, b: int, n: int) -> None:
    x = heavy(seed, b, n)
    decoded = coder.decode(encode(coder, x, seed), torch.float64)
    off = (decoded - x.double()).abs()
    # Of many entries some come close to half a step.
    assert b * n < 200 or (off / coder.bound(x).clamp(min=1e-99)).amax() > 0.5 or not x.any()


@given(formats, dtypes, st.sampled_from([math.nan, math.inf, -math.inf]), seeds)
@settings(max_examples=60)
def test_what_is_not_finite_is_decoded_as_such(
    coder: Format, dtype: torch.dtype, bad: float, seed: int
) -> None:
    x = heavy(seed, 70, 6).to(dtype)
    x[seed % 70, seed % 6] = bad
    assert not coder.decode(encode(coder, x, seed), dtype)[seed % 70, seed % 6].isfinite()


@pytest.mark.parametrize("coder", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_coded_as_nothing_and_the_largest_stays_finite(
    coder: Format, dtype: torch.dtype
) -> None:
    x = torch.zeros(300, 5, dtype=dtype)
    assert torch.equal(coder.decode(encode(coder, x), dtype), x)
    if dtype != torch.float64:
        x[::2] = torch.finfo(dtype).max * (1 if dtype == torch.float16 else 0.5)
        assert coder.decode(encode(coder, x), dtype).isfinite().all()


def test_growing_steps_reach_as_far_as_float64_needs() -> None:
    coder = Steps(8, 64, growing=True)
    x = heavy(0, 100, 4).double() * 1e60
    off = coder.decode(coder.encode(x), torch.float64) - x
    assert off.norm() < 0.01 * x.norm()


def test_growing_steps_are_better_where_few_are_large() -> None:
    x = heavy(0, 4096, 16)
    even, growing = (Steps(8, 64, growing=growing) for growing in (False, True))
    off = [(c.decode(c.encode(x), torch.float32) - x).norm() for c in (even, growing)]
    assert off[1] < 0.6 * off[0]


@pytest.mark.parametrize(
    "coder", [Steps(4, 64, dithered=True), Steps(8, 64, growing=True)], ids=str
)
def test_one_trace_serves_any_number_of_rows(coder: Steps) -> None:
    def both(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        stored = coder.encode(x, seed)
        return (*stored, coder.decode(stored, x.dtype))

    traced = make_fx(both, tracing_mode="symbolic")(heavy(0, 300, 9), torch.tensor(5))
    for b in (257, 512, 63):
        given = (heavy(b, b, 9), torch.tensor(5))
        for found, wanted in zip(traced(*given), both(*given), strict=True):
            assert torch.equal(found, wanted)


def test_phases_are_what_they_are_said_to_be() -> None:
    plastic = math.cbrt((9 + math.sqrt(69)) / 18) + math.cbrt((9 - math.sqrt(69)) / 18)
    steps = 2**codes._PHASE_BITS
    for number, share in (
        (codes._ROW_STEP, 1 / plastic),
        (codes._COLUMN_STEP, plastic**-2),
    ):
        assert abs(number - steps * share) < 1
        # Odd ones visit every phase.
        assert number % 2 == 1
