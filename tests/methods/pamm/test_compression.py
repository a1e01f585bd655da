"""The whole algorithm: compress, then weight gradients, against the oracle and its properties."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pamm_testing import naive_pamm as naive
from torch import Tensor

from pamm_compile.methods.pamm import assign, contract
from pamm_compile.methods.pamm.compression import (
    Compressed,
    compress,
    num_generators,
    weight_gradients,
)
from pamm_compile.methods.sampling import content_seed, sample_rows

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NON_FINITE = (math.nan, math.inf, -math.inf)
EPSILONS = (None, 0.0, 0.5, 1.0)

seeds = st.integers(0, 2**31 - 1)
samplings = st.sampled_from(("stratified", "uniform"))
ratios = st.fractions(min_value=1, max_value=20, max_denominator=7)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient(x: Tensor, grad: Tensor, seed: int = 0, **options: object) -> Tensor:
    compressed = compress(x, torch.tensor(seed), **options)
    return weight_gradients(compressed, [grad], [False])[0]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@given(
    seeds,
    st.integers(1, 40),
    st.integers(1, 10),
    st.integers(1, 6),
    ratios,
    samplings,
    st.sampled_from([None, 0.0, 0.3, 0.7, 0.95, 1.0, 4.0]),
)
def test_the_algorithm_is_the_naive_one(
    seed: int,
    b: int,
    n: int,
    m: int,
    ratio: Fraction,
    sampling: str,
    epsilon: float | None,
) -> None:
    x, grad = normal(seed, b, n), normal(seed + 1, b, m)
    rows = sample_rows(b, num_generators(b, ratio, 1), torch.tensor(seed), sampling).tolist()
    want, margin = naive.weight_gradient(x, grad, rows, math.inf if epsilon is None else epsilon)
    # Nearer to the gate than rounding, a row may fall on either side; for n = 1 all are at 0.
    assume(margin > 1e-7)
    got = gradient(x, grad, seed, ratio=ratio, sampling=sampling, epsilon=epsilon)
    size = grad.norm() * x.norm() * b
    assert (got - want).norm() <= 1e-13 * size


@given(seeds, st.integers(1, 60), ratios, st.integers(1, 9), samplings)
def test_epsilon_0_is_uniform_row_sampling(
    seed: int, b: int, ratio: Fraction, least: int, sampling: str
) -> None:
    """b/k times the sum over the sampled rows alone: CRS with equal probabilities."""
    x, grad = normal(seed, b, 5), normal(seed + 1, b, 3)
    options = {"ratio": ratio, "min_generators": least, "sampling": sampling}
    k = num_generators(b, ratio, least)
    rows = set(sample_rows(b, k, torch.tensor(seed), sampling).tolist())
    want = [[0.0] * 5 for _ in range(3)]
    for i in rows:
        for p in range(3):
            for q in range(5):
                want[p][q] += grad[i, p].item() * x[i, q].item() * b / len(rows)
    got = gradient(x, grad, seed, epsilon=0.0, **options)
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_epsilon_0_keeps_every_generator_whatever_its_rounding(dtype: torch.dtype) -> None:
    """|cos| of a generator with itself comes out below 1 as often as not."""
    x = normal(0, 512, 33, dtype=dtype)
    seed = torch.tensor(7)
    compressed = compress(x, seed, ratio=Fraction(8), epsilon=0.0)
    rows = sample_rows(512, 64, seed, "stratified")
    kept = compressed.scale.nonzero()[:, 0]
    assert torch.equal(kept, rows)
    index, scale = compressed.index[rows].long(), compressed.scale[rows]
    meant = scale[:, None].double() * compressed.generators[index].double()
    # Of float16, β is rounded into C.
    torch.testing.assert_close(meant, 8 * x[rows].double(), rtol=2e-3, atol=1e-3)


@given(seeds, st.sampled_from([1.0, 1.5, math.inf]), samplings)
def test_epsilon_infinity_drops_nothing(seed: int, epsilon: float, sampling: str) -> None:
    x = normal(seed, 50, 7)
    options = {"ratio": Fraction(9), "sampling": sampling}
    compressed = compress(x, torch.tensor(seed), **options)
    index, scale, _ = assign(x, compressed.generators, torch.uint8)
    assert torch.equal(compressed.index, index)
    assert torch.equal(compressed.scale, scale)
    assert (scale != 0).all()
    gated = compress(x, torch.tensor(seed), epsilon=epsilon, **options)
    for got, want in zip(gated, compressed, strict=True):
        assert torch.equal(got, want)


@given(seeds, st.integers(1, 8), st.integers(1, 6), st.sampled_from(EPSILONS))
def test_recovery_is_exact_where_rows_are_multiples_of_generators(
    seed: int, k: int, each: int, epsilon: float | None
) -> None:
    """One direction a stratum, so that every draw finds them all."""
    directions = normal(seed, k, 12)
    factors = 2.0 ** (normal(seed + 1, k * each) * 2).round()
    factors *= normal(seed + 2, k * each).sign()
    x = directions.repeat_interleave(each, dim=0) * factors[:, None]
    grad = normal(seed + 3, k * each, 5)
    # ε = 0 would let rounding decide about rows that are exactly on the gate.
    epsilon = 1e-6 if epsilon == 0 else epsilon
    got = gradient(x, grad, seed, ratio=Fraction(each), epsilon=epsilon)
    assert (got - grad.T @ x).norm() <= 1e-14 * grad.norm() * x.norm()


@given(seeds, st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(EPSILONS))
def test_linearity_in_the_gradient(seed: int, p: float, q: float, epsilon: float | None) -> None:
    x, g, h = normal(seed, 40, 8), normal(seed + 1, 40, 6), normal(seed + 2, 40, 6)
    options = {"ratio": Fraction(5), "epsilon": epsilon}
    got = gradient(x, p * g + q * h, seed, **options)
    want = p * gradient(x, g, seed, **options) + q * gradient(x, h, seed, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@given(seeds, st.sampled_from(EPSILONS))
def test_order_of_rows_does_not_matter(seed: int, epsilon: float | None) -> None:
    """For the same generators, with the gate and β applied as `compress` does, by hand."""
    x, grad, c = normal(seed, 40, 8), normal(seed + 1, 40, 6), normal(seed + 2, 4, 8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    plain, moved = (assign(rows, c, torch.uint8) for rows in (x, x[order]))
    assert torch.equal(moved[0], plain[0][order])
    torch.testing.assert_close(moved[1], plain[1][order], rtol=1e-13, atol=1e-14)
    here = weight_gradients(Compressed(c, *plain[:2]), [grad], [False])[0]
    there = weight_gradients(Compressed(c, *moved[:2]), [grad[order]], [False])[0]
    torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(-20, 20), st.sampled_from([-1, 1]), st.sampled_from(EPSILONS))
def test_scaling_x_scales_the_weight_gradient_alone(
    seed: int, exponent: int, sign: int, epsilon: float | None
) -> None:
    factor = sign * 2.0**exponent
    x, grad = normal(seed, 40, 8, dtype=torch.float32), normal(seed + 1, 40, 6, dtype=torch.float32)
    options = {"ratio": Fraction(5), "epsilon": epsilon}
    plain = compress(x, torch.tensor(seed), **options)
    scaled = compress(x * factor, torch.tensor(seed), **options)
    assert torch.equal(scaled.index, plain.index)
    assert torch.equal(scaled.scale, plain.scale)
    got = weight_gradients(scaled, [grad], [False])[0]
    assert torch.equal(got, factor * weight_gradients(plain, [grad], [False])[0])


@given(
    seeds,
    st.integers(1, 80),
    st.integers(4, 40),
    st.integers(1, 30),
    st.sampled_from(FLOATS),
    samplings,
    st.sampled_from([None, 0.0, 0.5]),
)
def test_ratio_1_is_exact(
    seed: int,
    b: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sampling: str,
    epsilon: float | None,
) -> None:
    x, grad = normal(seed, b, n, dtype=dtype), normal(seed + 1, b, m, dtype=dtype)
    got = gradient(x, grad, seed, ratio=Fraction(1), sampling=sampling, epsilon=epsilon)
    want = grad.double().T @ x.double()
    if dtype == torch.float64:
        assert error(got, want) < 1e-13
    elif dtype == torch.float32:
        assert error(got, want) < 1e-5
    else:
        # α is 1 and B̃ is dZ, both exactly: nothing but the order of one matmul's sum is left,
        # which may tip the final rounding of an entry by one unit.
        own = error(grad.T @ x, want)
        assert error(got, want) <= 1.05 * own + 2**-20


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_a_non_finite_entry_of_x_surfaces_in_every_entry(
    dtype: torch.dtype, value: float, epsilon: float | None, sampling: str
) -> None:
    """In all 24 rows in turn: 4 are generators, most of the others gated at ε = ½."""
    x, grad = normal(0, 24, 5, dtype=dtype), normal(1, 24, 3, dtype=dtype)
    options = {"ratio": Fraction(6), "epsilon": epsilon, "sampling": sampling}
    assert gradient(x, grad, **options).isfinite().all()
    for row in range(24):
        bad = x.clone()
        bad[row, row % 5] = value
        assert not gradient(bad, grad, **options).isfinite().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_non_finite_entry_of_a_gradient_surfaces_in_its_row(
    dtype: torch.dtype, value: float, epsilon: float | None
) -> None:
    x, grad = normal(0, 24, 5, dtype=dtype), normal(1, 24, 3, dtype=dtype)
    x[5] = 0
    options = {"ratio": Fraction(6), "epsilon": epsilon}
    for row in range(24):
        bad = grad.clone()
        bad[row, 1] = value
        got = gradient(x, bad, **options)
        assert not got[1].isfinite().any()
        assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [(0, math.nan), (3, math.inf)])
def test_non_finite_operands_surface_where_no_gradient_flows(bad: tuple[int, float]) -> None:
    x, grad = normal(0, 8, 3), torch.zeros(8, 2, dtype=torch.float64)
    x[bad[0], 0] = bad[1]
    assert not gradient(x, grad, ratio=Fraction(2)).isfinite().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_all_zero_inputs_give_a_zero_gradient(dtype: torch.dtype, epsilon: float | None) -> None:
    x, grad = torch.zeros(12, 5, dtype=dtype), normal(1, 12, 3, dtype=dtype)
    got = gradient(x, grad, ratio=Fraction(4), epsilon=epsilon)
    assert torch.equal(got, torch.zeros(3, 5, dtype=dtype))


def test_zero_rows_are_kept_and_contribute_nothing() -> None:
    """A zero row is a multiple of any generator: no ε drops it, so it counts for β."""
    x, grad = normal(0, 16, 6), normal(1, 16, 3)
    zeros = torch.zeros(8, 6, dtype=torch.float64)
    padded = torch.cat([x[:2], zeros, x[2:]])
    c = x[:4]
    index, scale, cosine = assign(padded, c, torch.uint8)
    for fill in (0.0, 100.0):
        grads = torch.cat([grad[:2], torch.full((8, 3), fill).double(), grad[2:]])
        got = weight_gradients(Compressed(c, index, scale), [grads], [False])[0]
        want = weight_gradients(Compressed(c, *assign(x, c, torch.uint8)[:2]), [grad], [False])[0]
        torch.testing.assert_close(got, want)
    assert (cosine[2:10] == 1).all()

    # One generator, one row orthogonal to it, three zeros.
    x = torch.tensor([[1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    seed = next(
        s for s in range(100) if sample_rows(5, 1, torch.tensor(s), "uniform").tolist() == [0]
    )
    options = {"ratio": Fraction(5), "sampling": "uniform", "epsilon": 0.5}
    compressed = compress(x, torch.tensor(seed), **options)
    # Kept: all but the orthogonal one; β = 5/4.
    assert compressed.scale.tolist() == pytest.approx([1.25, 0, 0, 0, 0])


def test_padding_may_be_sampled_and_is_then_never_chosen() -> None:
    x, grad = normal(0, 32, 6), normal(1, 32, 3)
    x[8:24] = 0
    compressed = compress(x, torch.tensor(0), ratio=Fraction(8))
    zero = (compressed.generators == 0).all(dim=1)
    assert zero.tolist() == [False, True, True, False]
    assert not zero[compressed.index.long()].any()
    assert weight_gradients(compressed, [grad], [False])[0].isfinite().all()


def test_duplicate_rows_are_one_generator() -> None:
    x = torch.tensor([[1.0, 2.0]] * 6 + [[2.0, -1.0]] * 6, dtype=torch.float64)
    grad = normal(0, 12, 3)
    compressed = compress(x, torch.tensor(0), ratio=Fraction(2))
    assert compressed.index.tolist() == [0] * 6 + [3] * 6
    got = weight_gradients(compressed, [grad], [False])[0]
    torch.testing.assert_close(got, grad.T @ x)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("b", [1, 2, 7])
def test_fewer_tokens_than_ratio_leave_one_generator(b: int, epsilon: float | None) -> None:
    x, grad = normal(0, b, 4), normal(1, b, 3)
    compressed = compress(x, torch.tensor(3), ratio=Fraction(256), epsilon=epsilon)
    assert compressed.generators.shape == (1, 4)
    assert not compressed.index.any()
    row = sample_rows(b, 1, torch.tensor(3), "stratified").tolist()
    want, _ = naive.weight_gradient(x, grad, row, math.inf if epsilon is None else epsilon)
    torch.testing.assert_close(gradient(x, grad, 3, ratio=Fraction(256), epsilon=epsilon), want)


def test_min_generators_raises_k_up_to_b() -> None:
    for b, k in ((40, 16), (10, 10)):
        compressed = compress(
            normal(0, b, 4), torch.tensor(0), ratio=Fraction(256), min_generators=16
        )
        assert compressed.generators.shape == (k, 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_what_is_saved(dtype: torch.dtype, epsilon: float | None) -> None:
    x = normal(0, 600, 8, dtype=dtype)
    for ratio, index in ((300, torch.uint8), (2, torch.int16)):
        saved = compress(x, torch.tensor(0), ratio=Fraction(ratio), epsilon=epsilon)
        assert (saved.generators.shape, saved.generators.dtype) == ((600 // ratio, 8), dtype)
        assert (saved.index.shape, saved.index.dtype) == ((600,), index)
        assert (saved.scale.shape, saved.scale.dtype) == ((600,), dtype)
        rows = sample_rows(600, 600 // ratio, torch.tensor(0), "stratified")
        # Rows of float16 are multiplied by powers of two: tests/methods/test_range.py.
        assert dtype == torch.float16 or torch.equal(saved.generators, x[rows])


@given(seeds, st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=4))
def test_projections_are_independent_of_their_company(
    seed: int, projections: list[tuple[int, bool]]
) -> None:
    """Q, K and V together, some wanted transposed, are each alone."""
    x = normal(seed, 30, 6)
    compressed = compress(x, torch.tensor(seed), ratio=Fraction(4))
    grads = [normal(seed + 1 + p, 30, m) for p, (m, _) in enumerate(projections)]
    together = weight_gradients(compressed, grads, [flip for _, flip in projections])
    for got, grad, (m, flip) in zip(together, grads, projections, strict=True):
        alone = weight_gradients(compressed, [grad], [False])[0]
        assert got.shape == ((6, m) if flip else (m, 6))
        torch.testing.assert_close(got.T if flip else got, alone, rtol=1e-12, atol=1e-13)


def test_torch_generator_is_neither_read_nor_advanced() -> None:
    x = normal(0, 64, 8)

    def draw(sampling: str) -> Compressed:
        return compress(x, content_seed(x, 0), ratio=Fraction(8), sampling=sampling)

    for sampling in ("stratified", "uniform"):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = draw(sampling)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(draw(sampling).generators, first.generators)


def test_generators_that_are_no_rows_compose() -> None:
    """One refinement, C_j ← Σ α_i X_i / Σ α_i² over its members, cannot raise the residual."""
    x = normal(0, 200, 16) @ normal(1, 16, 16)
    c = x[:8]

    def residual(generators: Tensor) -> tuple[Tensor, Tensor, float]:
        f, a, _ = assign(x, generators, torch.uint8)
        return f, a, (x - a[:, None] * generators[f.long()]).norm().item()

    f, a, before = residual(c)
    refined = contract(f, a, [x], 8) / contract(f, a, [a[:, None]], 8)
    f, a, after = residual(refined)
    assert after < before
    grad = normal(2, 200, 5)
    got = weight_gradients(Compressed(refined, f, a), [grad], [False])[0]
    torch.testing.assert_close(got, grad.T @ (a[:, None] * refined[f.long()]))


@pytest.mark.parametrize("epsilon", [pytest.param(None, marks=pytest.mark.everything), 0.5])
def test_compiled_is_eager(epsilon: float | None) -> None:
    """Under Inductor, with symbolic shapes, in one graph."""

    def both(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        options = {"ratio": Fraction(7, 2), "min_generators": 2, "epsilon": epsilon}
        compressed = compress(x, content_seed(x, 1), **options)
        return *compressed, *weight_gradients(compressed, [grad, grad], [False, True])

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for b in (50, 33):
        x, grad = normal(b, b, 12, dtype=torch.float32), normal(1, b, 8, dtype=torch.float32)
        for got, want in zip(compiled(x, grad), both(x, grad), strict=True):
            torch.testing.assert_close(got.to(want.dtype), want)
