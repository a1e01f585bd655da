"""Principal directions with coded coefficients, as plain functions and as a traced graph."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pamm_testing.in_a_model import trained_with
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pamm_compile.errors import InvalidOptionError
from pamm_compile.methods.base import Method
from pamm_compile.methods.subspace.method import TOKENS_A_SCALE, Subspace
from pamm_compile.private import aot
from pamm_compile.size import Size

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

seeds = st.integers(0, 2**31 - 1)
tokens_ = st.integers(1, 600)
widths = st.integers(1, 24)
ranks = st.integers(1, 30)
bits_ = st.sampled_from([4, 8, None])
more = st.sampled_from([1, 1.4, 3])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def low_rank(seed: int, b: int, n: int, r: int) -> Tensor:
    return normal(seed, b, r) @ normal(seed + 1, r, n)


def gradients(
    method: Subspace, x: Tensor, grads: list[Tensor], seed: int, transposed: list[bool]
) -> list[Tensor]:
    stored = method.store(x, torch.tensor(seed), [grad.shape[1] for grad in grads])
    return method.weight_gradients(stored, grads, transposed)


def approximation(method: Subspace, x: Tensor, seed: int) -> Tensor:
    """X̂, as the weight gradient where dZ is the identity."""
    one = torch.eye(x.shape[0], dtype=x.dtype)
    # Enough outputs that a share is one of the features.
    (found,) = method.weight_gradients(
        method.store(x, torch.tensor(seed), [x.shape[1]]), [one], [False]
    )
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.quick
def test_it_is_a_method() -> None:
    assert isinstance(Subspace(), Method)
    assert Subspace(0.5) == Subspace(0.5)
    assert Subspace(4).fingerprint != Subspace(4, bits=8).fingerprint
    assert Subspace(4).fingerprint != Subspace(4, candidates=2).fingerprint
    # One share, however it is written.
    assert Subspace(64.0).fingerprint == Subspace(64).fingerprint


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -3}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": math.nan}, "rank"),
        ({"rank": math.inf}, "rank"),
        ({"rank": "8"}, "rank"),
        ({"bits": 3}, "bits"),
        ({"bits": True}, "bits"),
        ({"iterations": -1}, "iterations"),
        ({"iterations": 1.0}, "iterations"),
        ({"rows": 0}, "rows"),
        ({"candidates": 0.5}, "candidates"),
        ({"candidates": math.inf}, "candidates"),
        ({"candidates": "2"}, "candidates"),
    ],
)
def test_options_that_are_not_allowed_say_so(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{named}=.* is not allowed: {named} must be"):
        Subspace(**options)


@pytest.mark.parametrize(
    ("rank", "features", "outputs", "r"),
    [
        (0.1, 512, (512, 512), 56),
        (0.1, 2048, (512,), 56),
        (0.25, 64, (64,), 16),
        (0.9, 20, (50,), 20),
        (5, 512, (512,), 5),
        (600, 512, (512,), 512),
        (1, 512, (512,), 1),
    ],
)
def test_a_rank_is_a_share_or_a_number(
    rank: float, features: int, outputs: tuple[int, ...], r: int
) -> None:
    assert Subspace(rank).directions(features, outputs) == r


@given(seeds, tokens_, widths, st.integers(1, 6), bits_, st.sampled_from([0, 1, 2]))
@settings(max_examples=60)
def test_what_lies_in_few_directions_is_exact_up_to_the_coding(
    seed: int, b: int, n: int, r: int, bits: Any, iterations: int
) -> None:
    x = low_rank(seed, b, n, r)
    # Rows that hardly differ may leave a direction that no float32 can tell from rounding.
    singular = torch.linalg.svdvals(x.double())[: min(b, n, r)]
    assume(singular.min() > 0.03 * singular.max())
    found = approximation(Subspace(r, bits=bits, iterations=iterations), x, seed)
    within = {None: 1e-4, 8: 0.02, 4: 0.3}[bits]
    assert error(found, x) < within


@given(seeds, tokens_, widths, st.sampled_from(FLOATS))
@settings(max_examples=40)
def test_at_full_rank_without_bits_gradients_are_exact(
    seed: int, b: int, n: int, dtype: torch.dtype
) -> None:
    x, dz = normal(seed, b, n, dtype=dtype), normal(seed + 1, b, 5, dtype=dtype)
    plain, flipped = gradients(Subspace(n, bits=None), x, [dz, dz], seed, [False, True])
    assert torch.equal(plain, dz.T @ x)
    assert torch.equal(flipped, x.T @ dz)


@given(seeds, tokens_, widths, st.sampled_from([4, 8]), st.sampled_from(FLOATS))
@settings(max_examples=40)
def test_at_full_rank_every_entry_is_within_a_step(
    seed: int, b: int, n: int, bits: Any, dtype: torch.dtype
) -> None:
    x = normal(seed, b, n, dtype=dtype)
    found = approximation(Subspace(n, bits=bits), x, seed).double()
    for start in range(0, b, TOKENS_A_SCALE):
        block = slice(start, start + TOKENS_A_SCALE)
        step = x[block].double().abs().amax(0) / (2 ** (bits - 1) - 0.5)
        off = (found[block] - x[block].double()).abs()
        rounding = ROUNDING[dtype] * x[block].double().abs().amax(0)
        assert (off <= 0.51 * step + rounding).all()


def test_coding_is_unbiased() -> None:
    x = normal(0, 300, 7) * torch.logspace(-3, 3, 7)
    draws = 200
    method = Subspace(7, bits=4)
    sums = torch.zeros(300, 7, dtype=torch.float64)
    for seed in torch.randint(2**31, (draws,), generator=torch.Generator().manual_seed(0)):
        codes = method.store(x, seed, [7])
        (found,) = method.weight_gradients(codes, [torch.eye(300)], [False])
        sums += found.double()
    blocks = torch.arange(300) // TOKENS_A_SCALE
    peaks = torch.stack([x[blocks == j].abs().amax(0) for j in range(2)])
    step = (peaks / 7.5)[blocks]
    # An error uniform in a step has the deviation step / √12, its mean over draws less by √draws.
    off = ((sums / draws - x).abs() / (step / math.sqrt(12 * draws))).amax()
    assert off < 5


def test_the_error_of_coding_is_that_of_rounding_to_nearest() -> None:
    x = normal(0, 2048, 16)
    found = approximation(Subspace(16, bits=4), x, 1)
    blocks = x.view(-1, TOKENS_A_SCALE, 16)
    steps = blocks.abs().amax(1, keepdim=True) / 7.5
    expected = (steps.square() / 12).mean().sqrt()
    assert (found - x).square().mean().sqrt() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize(("rank", "candidates"), [(3, 1), (3, 2), (8, 1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_the_gradient(
    dtype: torch.dtype, bits: Any, rank: int, candidates: float, bad: float
) -> None:
    method = Subspace(rank, bits=bits, candidates=candidates)
    grads = [normal(1, 300, 4, dtype=dtype)]
    for row, column in ((0, 0), (131, 7), (299, 3)):
        x = normal(0, 300, 8, dtype=dtype)
        x[row, column] = bad
        (found,) = gradients(method, x, grads, 9, [False])
        assert not found.isfinite().all()
    x, dz = normal(0, 300, 8, dtype=dtype), grads[0].clone()
    dz[17, 2] = bad
    (found,) = gradients(method, x, [dz], 9, [False])
    assert not found.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize(("rank", "candidates"), [(3, 1), (3, 2), (8, 1)])
def test_zeros_give_zeros(dtype: torch.dtype, bits: Any, rank: int, candidates: float) -> None:
    method = Subspace(rank, bits=bits, candidates=candidates)
    x = torch.zeros(520, 8, dtype=dtype)
    assert torch.equal(approximation(method, x, 3), x)
    # Tokens of nothing beside others: exact in a block of their own.
    x[TOKENS_A_SCALE:] = normal(0, 520 - TOKENS_A_SCALE, 8, dtype=dtype)
    found = approximation(method, x, 3)
    assert torch.equal(found[:TOKENS_A_SCALE], x[:TOKENS_A_SCALE])
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("bits", [4, None])
def test_sizes_far_from_1_do_no_harm(scale: float, bits: Any) -> None:
    x = low_rank(0, 300, 16, 4)
    found = approximation(Subspace(4, bits=bits), x * scale, 3)
    assert error(found.double() / scale, x) < (1e-4 if bits is None else 0.2)


def test_directions_hold_what_the_best_hold() -> None:
    spread = torch.logspace(0, -2, 64)
    x = (normal(0, 2048, 64) * spread) @ torch.linalg.qr(normal(1, 64, 64)).Q
    values = torch.linalg.svdvals(x)
    best = float((values[12:].square().sum() / values.square().sum()).sqrt())
    found = error(approximation(Subspace(12, bits=None), x, 5), x)
    assert best <= found < 1.2 * best


@given(seeds, tokens_, widths, ranks, bits_, st.sampled_from(FLOATS), st.booleans(), more)
@settings(max_examples=60)
def test_stored_bytes_are_those_stored(
    seed: int, b: int, n: int, rank: int, bits: Any, dtype: torch.dtype, share: bool, more: float
) -> None:
    method = Subspace(rank / 31 if share else rank, bits=bits, candidates=more)
    stored = method.store(normal(seed, b, n, dtype=dtype), torch.tensor(seed), (9, 4))
    size = Size(b, n, (9, 4), dtype)
    assert method.stored_bytes(size) == sum(each.nbytes for each in stored)
    assert method.cost(size).flops > 0


@given(seeds, st.integers(1, 300), bits_, st.lists(st.booleans(), min_size=1, max_size=3))
@settings(max_examples=30)
def test_several_projections_are_as_each_alone(
    seed: int, b: int, bits: Any, transposed: list[bool]
) -> None:
    method = Subspace(3, bits=bits)
    x = normal(seed, b, 10)
    grads = [normal(seed + i, b, 4 + i) for i in range(len(transposed))]
    stored = method.store(x, torch.tensor(seed), [grad.shape[1] for grad in grads])
    together = method.weight_gradients(stored, grads, transposed)
    for found, grad, flip in zip(together, grads, transposed, strict=True):
        (alone,) = method.weight_gradients(stored, [grad], [False])
        assert torch.allclose(found, alone.T if flip else alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Subspace(6), Subspace(6, candidates=2)])
def test_draws_follow_the_seed_alone(method: Subspace) -> None:
    x, dz = low_rank(0, 400, 32, 20), [normal(2, 400, 8)]
    first = gradients(method, x, dz, 11, [False])[0]
    assert torch.equal(first, gradients(method, x, dz, 11, [False])[0])
    assert not torch.equal(first, gradients(method, x, dz, 12, [False])[0])


def test_candidates_leave_out_less_in_the_mean() -> None:
    """With twice as many candidates the mean of many draws is what all of them hold."""
    x = normal(0, 2048, 32) * torch.logspace(0, -1.5, 32)

    def mean(method: Subspace) -> Tensor:
        draws = torch.randint(2**31, (64,), generator=torch.Generator().manual_seed(1))
        return torch.stack([approximation(method, x, int(seed)) for seed in draws]).mean(0)

    kept, drawn, all_found = (
        error(mean(Subspace(rank, bits=None, candidates=candidates)), x)
        for rank, candidates in ((8, 1), (8, 2), (16, 1))
    )
    assert all_found < 0.5 * kept
    assert drawn < 0.75 * kept


@pytest.mark.parametrize("method", [Subspace(6), Subspace(5, bits=8, candidates=2), Subspace(40)])
def test_one_trace_serves_any_number_of_tokens(method: Subspace) -> None:
    def both(x: Tensor, seed: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
        stored = method.store(x, seed, [dz.shape[1]])
        return (*stored, *method.weight_gradients(stored, [dz], [False]))

    def run(b: int) -> tuple[Tensor, Tensor, Tensor]:
        return normal(b, b, 40), torch.tensor(7), normal(b + 1, b, 12)

    traced = make_fx(both, aot.select_decomp_table(), tracing_mode="symbolic")(*run(300))
    for b in (300, 257, 512, 1001):
        for found, wanted in zip(traced(*run(b)), both(*run(b)), strict=True):
            assert found.dtype == wanted.dtype
            # What is drawn may differ where rows would be repeated; here there are enough.
            assert torch.allclose(found.float(), wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, pytest.param(None, marks=pytest.mark.everything)])
def test_compiled_draws_are_the_eager_ones(bits: Any) -> None:
    method = Subspace(4, bits=bits, candidates=2)

    def both(x: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
        stored = method.store(x, seed, [dz.shape[1]])
        return method.weight_gradients(stored, [dz], [False])[0]

    x = normal(0, 300, 40) * torch.logspace(0, -1, 40)
    compiled = torch.compile(both, fullgraph=True)
    for seed in (7, 8):
        given = (x, torch.tensor(seed), normal(1, 300, 12))
        # An eigenvector may be found the other way round, and its coefficients rounded otherwise.
        assert error(compiled(*given), both(*given)) < (1e-4 if bits is None else 0.05)


@pytest.mark.parametrize(
    ("bits", "candidates"), [(4, 1), pytest.param(None, 2, marks=pytest.mark.everything)]
)
def test_in_a_model_all_else_stays_bitwise_and_codes_are_saved_at_any_budget(
    bits: Any, candidates: float
) -> None:
    captured, _, _ = trained_with(Subspace(4, bits=bits, candidates=candidates))
    compressed = captured.report.sites
    for graphs in (captured, captured.at_budget[0.5]):
        b, n = compressed[0].shape
        of_codes = [
            node.meta["val"].dtype
            for node in graphs.saved()
            # Neither the model's own inputs nor the labels.
            if node.op != "placeholder"
            and isinstance(node.meta["val"], Tensor)
            and node.meta["val"].dtype != torch.int64
            and tuple(node.meta["val"].shape) in {(b, 2), (b, 4), (4, n), (1, 4), (4,), (b,)}
        ]
        # Decoded they would be saved at several times the size.
        kinds = [torch.float32, torch.float32]
        if bits is not None:
            kinds = [torch.uint8, torch.bfloat16, torch.int8, torch.float32]
        assert sorted(map(str, of_codes)) == sorted(map(str, kinds * len(compressed)))
