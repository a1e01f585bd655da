"""The two kernels against the naive oracle, and their behaviour at every edge."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pamm_testing import naive_pamm as naive
from torch import Tensor

from pamm_compile.methods.pamm import assign, contract, eager

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NON_FINITE = (math.nan, math.inf, -math.inf)

seeds = st.integers(0, 2**32 - 1)
floats = st.sampled_from(FLOATS)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def small_integers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values whose sums and products are exact, many of them zero or in proportion."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def compute_eps(dtype: torch.dtype) -> float:
    return torch.finfo(eager.accumulation_dtype(dtype)).eps


@given(seeds, st.integers(1, 40), st.integers(1, 24), st.integers(1, 12), floats)
def test_assign_is_the_naive_assignment(
    seed: int, b: int, n: int, k: int, dtype: torch.dtype
) -> None:
    x, c = normal(seed, b, n, dtype=dtype), normal(seed + 1, k, n, dtype=dtype)
    index, scale, cosine = assign(x, c, torch.int32)
    rows, generators = x.double().tolist(), c.double().tolist()
    # A dot product of n terms, then three roundings.
    bound = (n + 4) * compute_eps(dtype)
    for i, j in enumerate(index.tolist()):
        cosines = [cos for cos in naive.cosines(rows[i], generators) if cos is not None]
        # Two generators within rounding of each other are both right.
        assert cosines[j] >= max(cosines) - bound
        assert abs(abs(cosine[i].item()) - cosines[j]) <= bound
        alpha = naive.alpha(rows[i], generators[j])
        size = naive.norm(rows[i]) / naive.norm(generators[j])
        half_ulp = abs(alpha) * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
        assert abs(scale[i].item() - alpha) <= bound * size + half_ulp
        assert math.copysign(1, scale[i]) == math.copysign(1, cosine[i])


@pytest.mark.quick
@given(seeds, st.integers(1, 30), st.integers(1, 6), st.integers(1, 8))
def test_assign_is_exactly_the_naive_assignment_of_small_integers(
    seed: int, b: int, n: int, k: int
) -> None:
    """Zero rows, zero generators and exact ties included; only parallel generators may swap."""
    x, c = small_integers(seed, b, n), small_integers(seed + 1, k, n)
    index, scale, cosine = assign(x, c, torch.int32)
    rows, generators = x.tolist(), c.tolist()
    for i, j in enumerate(index.tolist()):
        want = naive.nearest(rows[i], generators)
        assert any(rows[i]) or scale[i] == 0
        assert any(generators[j]) or not any(map(any, generators))
        if j != want:
            cosines = naive.cosines(rows[i], generators)
            # 1e-14 is rounding: different cosines of vectors this small are further apart.
            assert cosines[j] == pytest.approx(cosines[want], abs=1e-14)
        assert scale[i].item() == pytest.approx(naive.alpha(rows[i], generators[j]), abs=1e-14)
        rest = naive.residual(rows[i], generators[j])
        assert 1 - cosine[i].item() ** 2 == pytest.approx(rest**2, abs=1e-13)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [3, 8, 17, 70])
@pytest.mark.parametrize("n", [1, 16, 50])
def test_duplicate_generators_give_the_lowest_index(dtype: torch.dtype, k: int, n: int) -> None:
    """In small integers: a matmul may round equal columns of other values differently."""
    distinct = small_integers(0, k, n, dtype=dtype)
    x = small_integers(1, 100, n, dtype=dtype)
    alone = assign(x, distinct, torch.int32)
    twice = assign(x, torch.cat([distinct, distinct, distinct.flip(0)]), torch.int32)
    for got, want in zip(twice, alone, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_duplicate_generators_represent_a_row_alike(dtype: torch.dtype) -> None:
    c, x = normal(0, 17, 50, dtype=dtype), normal(1, 100, 50, dtype=dtype)
    index, scale, cosine = assign(x, c, torch.int32)
    twice = assign(x, torch.cat([c, c]), torch.int32)
    assert torch.equal(twice[0] % 17, index)
    # α may differ in the last place, as a matmul may round equal columns differently.
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 60 * compute_eps(dtype)}
    torch.testing.assert_close(twice[1], scale, **rounding)
    torch.testing.assert_close(twice[2], cosine, rtol=0, atol=60 * compute_eps(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_row_gets_scale_0_and_cosine_1(dtype: torch.dtype) -> None:
    x = normal(0, 5, 4, dtype=dtype)
    x[2] = 0
    index, scale, cosine = assign(x, x[:2], torch.uint8)
    assert (scale[2], cosine[2]) == (0, 1)
    assert index[2] < 2
    assert (scale != 0).sum() == 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_generator_is_chosen_only_where_all_are_zero(dtype: torch.dtype) -> None:
    x = normal(0, 50, 3, dtype=dtype)
    # The last two rows are zero, and orthogonal to every generator.
    x[-2:] = torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=dtype)
    c = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=dtype)
    index, scale, _ = assign(x, c, torch.uint8)
    assert set(index.tolist()) <= {1, 3}
    assert scale[-2:].tolist() == [0, 0]

    index, scale, cosine = assign(x, torch.zeros_like(c), torch.uint8)
    assert not index.any()
    assert not scale.any()
    assert cosine.tolist() == [0] * 48 + [1, 0]


def test_the_sign_of_a_row_is_in_its_scale() -> None:
    c = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[-3.0, 0.0], [0.0, 5.0], [0.0, -1.0]])
    index, scale, cosine = assign(x, c, torch.uint8)
    assert index.tolist() == [0, 1, 1]
    assert scale.tolist() == [-3.0, 2.5, -0.5]
    assert cosine.tolist() == [-1.0, 1.0, -1.0]


@given(seeds, st.integers(2, 30), st.integers(2, 16), st.integers(1, 6))
def test_generators_need_not_be_rows_and_variants_follow(seed: int, b: int, n: int, k: int) -> None:
    """‖X_i‖, the residual and a norm-keeping scale come from (α, cosine) and C alone."""
    x, c = normal(seed, b, n), normal(seed + 1, k, n)
    index, scale, cosine = assign(x, c, torch.int32)
    chosen = c[index.long()]
    norms, sizes = x.norm(dim=1), chosen.norm(dim=1)
    # α and the cosine share their rounding, of a product that may nearly cancel.
    tolerance = 1e-13 / cosine.abs().min().item()
    torch.testing.assert_close(scale.abs() * sizes / cosine.abs(), norms, rtol=tolerance, atol=0)
    rest = (x - scale[:, None] * chosen).norm(dim=1)
    torch.testing.assert_close(rest**2, norms**2 * (1 - cosine**2), rtol=1e-9, atol=1e-12)
    keeping = (scale / cosine.abs())[:, None] * chosen
    torch.testing.assert_close(keeping.norm(dim=1), norms, rtol=tolerance, atol=0)


@given(seeds, st.integers(1, 30), st.integers(1, 8), st.integers(1, 8))
def test_assign_does_not_depend_on_the_order_of_rows(seed: int, b: int, n: int, k: int) -> None:
    x, c = small_integers(seed, b, n), small_integers(seed + 1, k, n)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    for here, there in zip(
        assign(x[order], c, torch.int32), assign(x, c, torch.int32), strict=True
    ):
        assert torch.equal(here, there[order])


@given(seeds, st.integers(-8, 8), st.sampled_from([-1, 1]), floats)
def test_scaling_rows_scales_alpha_alone(
    seed: int, exponent: int, sign: int, dtype: torch.dtype
) -> None:
    """By a power of two, so that every comparison is exact."""
    factor = sign * 2.0**exponent
    x, c = normal(seed, 20, 8, dtype=dtype), normal(seed + 1, 4, 8, dtype=dtype)
    index, scale, cosine = assign(x, c, torch.int32)
    by_rows = assign(x * factor, c, torch.int32)
    by_generators = assign(x, c * factor, torch.int32)
    by_both = assign(x * factor, c * factor, torch.int32)
    if dtype == torch.float16:
        # Its subnormals are within reach and round.
        torch.testing.assert_close(by_rows[1], scale * factor, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(by_generators[1], scale / factor, rtol=1e-3, atol=1e-7)
        return
    for got, alpha, cos in [
        (by_rows, scale * factor, cosine * sign),
        (by_generators, scale / factor, cosine * sign),
        (by_both, scale, cosine),
    ]:
        assert torch.equal(got[0], index)
        assert torch.equal(got[1], alpha)
        assert torch.equal(got[2], cos)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_row_gets_nan_and_leaves_the_others_alone(
    dtype: torch.dtype, value: float
) -> None:
    c, x = normal(0, 4, 6, dtype=dtype), normal(1, 9, 6, dtype=dtype)
    clean = assign(x, c, torch.uint8)
    x[5, 2] = value
    index, scale, cosine = assign(x, c, torch.uint8)
    others = torch.arange(9) != 5
    assert scale[5].isnan()
    assert cosine[5].isnan()
    assert index[5] == 0
    for got, want in zip((index, scale, cosine), clean, strict=True):
        assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_generator_is_not_chosen(dtype: torch.dtype, value: float) -> None:
    x, c = normal(0, 9, 6, dtype=dtype), normal(1, 4, 6, dtype=dtype)
    c[0, 3] = value
    index, scale, cosine = assign(x, c, torch.uint8)
    assert (index > 0).all()
    assert scale.isfinite().all()
    assert cosine.isfinite().all()

    index, scale, _ = assign(x, torch.full_like(c, value), torch.uint8)
    assert not index.any()
    assert not scale.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """512 terms summed in 8 or 11 bits would be off by far more."""
    x, c = normal(0, 64, 512, dtype=dtype), normal(1, 5, 512, dtype=dtype)
    index, scale, cosine = assign(x, c, torch.uint8)
    want = assign(x.double(), c.double(), torch.uint8)
    assert torch.equal(index, want[0])
    torch.testing.assert_close(scale.double(), want[1].to(dtype).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(cosine.double(), want[2], rtol=0, atol=1e-6)


@given(
    seeds,
    st.integers(1, 40),
    st.integers(1, 9),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    floats,
    st.sampled_from([torch.uint8, torch.int16, torch.int32]),
)
def test_contract_is_the_naive_sum(
    seed: int, b: int, k: int, widths: list[int], dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randint(k, (b,), generator=generator).to(index_dtype)
    a = normal(seed, b, dtype=dtype)
    grads = [normal(seed + 1 + p, b, m, dtype=dtype) for p, m in enumerate(widths)]
    got = contract(f, a, grads, k)
    joined = torch.cat(grads, dim=1).double().tolist()
    args = f.tolist(), a.double().tolist()
    want = torch.tensor(naive.contract(*args, joined, k), dtype=torch.float64)
    # What a sum of products can be off by: terms × eps × the sum of their magnitudes.
    absolute = [list(map(abs, row)) for row in joined]
    size = torch.tensor(naive.contract(args[0], list(map(abs, args[1])), absolute, k))
    assert ((got.double() - want).abs() <= (b + 1) * compute_eps(dtype) * size).all()


@given(seeds, st.integers(1, 30), st.integers(1, 6), st.integers(-4, 4), st.integers(-4, 4))
def test_contract_is_linear_in_the_gradients(seed: int, b: int, k: int, p: int, q: int) -> None:
    """In integers, hence exactly."""
    f = small_integers(seed, b).abs().clamp(max=k - 1).to(torch.uint8)
    a = small_integers(seed + 1, b)
    g, h = small_integers(seed + 2, b, 5), small_integers(seed + 3, b, 5)
    got = contract(f, a, [p * g + q * h], k)
    assert torch.equal(got, p * contract(f, a, [g], k) + q * contract(f, a, [h], k))


@given(seeds, st.integers(1, 30), st.integers(1, 6))
def test_contract_does_not_depend_on_the_order_of_rows(seed: int, b: int, k: int) -> None:
    f = small_integers(seed, b).abs().clamp(max=k - 1).to(torch.uint8)
    a, g = small_integers(seed + 1, b), small_integers(seed + 2, b, 5)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(contract(f[order], a[order], [g[order]], k), contract(f, a, [g], k))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_non_finite_gradient_comes_through(
    dtype: torch.dtype, value: float, alpha: float
) -> None:
    """Also where the row was dropped; and only in its own column."""
    f = torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    a = torch.tensor([1, 1, alpha, 1], dtype=dtype)
    grad = normal(0, 4, 3, dtype=dtype)
    grad[2, 1] = value
    sums = contract(f, a, [grad], 2)
    assert not sums[1, 1].isfinite()
    assert sums[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_scale_comes_through(value: float) -> None:
    f = torch.tensor([0, 1, 1], dtype=torch.uint8)
    sums = contract(f, torch.tensor([1, value, 1]), [torch.zeros(3, 2)], 2)
    assert not sums[1].isfinite().any()


def test_a_generator_without_tokens_sums_to_zero() -> None:
    f = torch.tensor([2, 2], dtype=torch.uint8)
    sums = contract(f, torch.ones(2), [torch.ones(2, 3)], 5)
    assert sums.sum(dim=1).tolist() == [0, 0, 6, 0, 0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_tiles_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows with a ragged last one, against one tile; integers, hence exactly."""
    x, c = small_integers(0, 53, 16, dtype=dtype), small_integers(1, 5, 16, dtype=dtype)
    grads = [small_integers(2, 53, 16, dtype=dtype), small_integers(3, 53, 4, dtype=dtype)]

    def run() -> tuple[Tensor, ...]:
        f, a, cosine = assign(x, c, torch.uint8)
        return f, a, cosine, contract(f, small_integers(4, 53, dtype=dtype), grads, 5)

    whole = run()
    monkeypatch.setattr(eager, "_CPU_TILE_ELEMENTS", 8 * 16)
    assert len(eager._tiles(x.device, 53, 16)) == 7
    for got, want in zip(run(), whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("k", [300, 40000])
def test_many_generators(k: int) -> None:
    c = normal(0, k, 32, dtype=torch.float32)
    picked = torch.tensor([0, 255, 256, 299, k - 1])
    index, scale, _ = assign(c[picked] * -2, c, torch.int32)
    assert index[3] == 299
    assert index[4] == k - 1
    torch.testing.assert_close(scale, torch.full((5,), -2.0))
    sums = contract(index, scale, [torch.ones(5, 1)], k)
    assert sums[k - 1].item() == pytest.approx(-2 if k > 300 else -4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_are_reproducible_to_the_bit(dtype: torch.dtype) -> None:
    x, c = normal(0, 3000, 48, dtype=dtype), normal(1, 20, 48, dtype=dtype)
    grad = normal(2, 3000, 40, dtype=dtype)
    first = assign(x, c, torch.uint8)
    sums = contract(first[0], first[1], [grad, grad[:, :7]], 20)
    for _ in range(3):
        for got, want in zip(assign(x, c, torch.uint8), first, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(contract(first[0], first[1], [grad, grad[:, :7]], 20), sums)


def test_operands_need_not_be_contiguous() -> None:
    x, c, grad = normal(0, 6, 9).T, normal(1, 6, 3).T, normal(2, 5, 9).T
    packed = assign(x.contiguous(), c.contiguous(), torch.uint8)
    for got, want in zip(assign(x, c, torch.uint8), packed, strict=True):
        torch.testing.assert_close(got, want)
    want = contract(packed[0], packed[1], [grad.contiguous()], 3)
    torch.testing.assert_close(contract(packed[0], packed[1], [grad], 3), want)
