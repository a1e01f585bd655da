"""Seeds, row sampling and the number of generators."""

import math
import random
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pamm_compile.methods.pamm.compression import num_generators
from pamm_compile.methods.sampling import content_seed, sample_rows, site_seed

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLINGS = ("stratified", "uniform")

seeds = st.integers(0, 2**31 - 1)
ratios = st.fractions(min_value=1, max_value=1000, max_denominator=100)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(1, 10**9), ratios, st.integers(1, 100))
def test_num_generators_is_ceil_of_a_rational(tokens: int, ratio: Fraction, least: int) -> None:
    k = num_generators(tokens, ratio, least)
    assert k == min(tokens, max(least, math.ceil(Fraction(tokens) / ratio)))
    assert 1 <= k <= tokens


@pytest.mark.parametrize(
    ("tokens", "ratio", "least", "k"),
    [
        (3, Fraction(256), 1, 1),
        (256, Fraction(256), 1, 1),
        (257, Fraction(256), 1, 2),
        (3, Fraction(256), 16, 3),
        (100, Fraction(5, 2), 1, 40),
        (100, Fraction(1), 1, 100),
        # 15.000000000000002 in floating point, and so 16.
        (21, Fraction("1.4"), 1, 15),
    ],
)
def test_num_generators_by_hand(tokens: int, ratio: Fraction, least: int, k: int) -> None:
    assert num_generators(tokens, ratio, least) == k


def _ratios(count: int) -> list[float]:
    """As users write them and as Python divides, up to the largest number there is."""
    drawn = random.Random(0)
    kinds = (
        lambda: drawn.randint(1, 4096) / drawn.randint(1, 4096) + 1,
        lambda: drawn.uniform(1, 8),
        lambda: 10 ** drawn.uniform(0, 12),
        lambda: 10 ** drawn.uniform(0, 308),
        lambda: float(drawn.randint(1, 10**6)),
        lambda: round(drawn.uniform(1, 1000), drawn.randint(1, 9)),
    )
    known = [10 / 3, 8192 / 2458, 4096 / 480, 4096 / 96, sys.float_info.max, 1 + 2**-52, math.pi]
    return known + [kinds[i % len(kinds)]() for i in range(count - len(known))]


def test_every_ratio_gives_a_number_of_generators_in_range() -> None:
    for ratio in _ratios(2000):
        for tokens in (1, 2, 4672, 2**20 + 3, 2**31 - 1, 2**31):
            k = num_generators(tokens, Fraction(repr(ratio)), 1)
            assert 1 <= k <= tokens
            # Long decimals are rounded to short fractions, which moves k by what rounding moves.
            assert abs(k - tokens / ratio) <= 1 + tokens / ratio * 1e-6


@pytest.mark.parametrize("denominator", [1, 3, 480, 2458, 10**6])
def test_the_quotient_of_two_integers_is_taken_for_their_fraction(denominator: int) -> None:
    tokens = 2**31 - 1
    for numerator in (denominator, denominator + 1, 10 * denominator + 7, 8192 * denominator // 3):
        exact = Fraction(max(numerator, denominator), denominator)
        written = Fraction(repr(exact.numerator / exact.denominator))
        assert num_generators(tokens, written, 1) == math.ceil(tokens / exact)


@pytest.mark.slow
def test_compiled_numbers_of_generators_are_the_eager_ones_for_any_ratio() -> None:
    """In Inductor's int64, for symbolic sizes; with a stride of 0, 2³¹ rows cost nothing."""
    ratios = [Fraction(repr(ratio)) for ratio in _ratios(200)]

    def count(x: Tensor, seed: Tensor) -> Tensor:
        found = [num_generators(x.shape[0], ratio, 1) for ratio in ratios]
        found += [num_generators(x.shape[0], ratio, 10**30) for ratio in ratios[:2]]
        return torch.stack([seed.new_full((), k) for k in found])

    seed, row = torch.tensor(1), torch.zeros(1)
    # As in the joint-graph pass; Dynamo would take long over the arithmetic of 200 fractions.
    traced = make_fx(count, tracing_mode="symbolic")(row.expand(4673), seed)
    compiled = torch.compile(traced, fullgraph=True, dynamic=True)
    for tokens in (4673, 2, 65537, 2**20 + 3, 2**31 - 1, 2**31):
        x = row.expand(tokens)
        assert torch.equal(compiled(x, seed), count(x, seed))


# Each is compiled anew, which is what these tests take their time for.
REPEATED = pytest.mark.everything


@REPEATED
@pytest.mark.parametrize("ratio", [10 / 3, 4096 / 96, sys.float_info.max])
def test_compiled_rows_of_a_long_decimal_are_the_eager_ones(ratio: float) -> None:
    exact = Fraction(repr(ratio))

    def draw(x: Tensor, seed: Tensor) -> Tensor:
        k = num_generators(x.shape[0], exact, 1)
        return sample_rows(x.shape[0], k, seed, "stratified")

    compiled = torch.compile(draw, fullgraph=True, dynamic=True)
    seed, row = torch.tensor(2**31 - 1), torch.zeros(1)
    for tokens in (4673, 9216, 73_785, 1_000_003, 184_001):
        x = row.expand(tokens)
        assert torch.equal(compiled(x, seed), draw(x, seed))


@pytest.mark.parametrize("least", [1, 16])
def test_num_generators_of_a_symbolic_number_of_tokens(least: int) -> None:
    ratio = Fraction(5, 2)
    traced = make_fx(
        lambda x: x.new_zeros(num_generators(x.shape[0], ratio, least)), tracing_mode="symbolic"
    )(torch.ones(100))
    for tokens in (2, 7, 99, 100, 1001):
        k = num_generators(tokens, ratio, least)
        assert traced(torch.ones(tokens)).shape == (k,)


@given(seeds, st.integers(1, 500), ratios)
def test_stratified_rows_ascend_one_in_every_interval(
    seed: int, tokens: int, ratio: Fraction
) -> None:
    k = num_generators(tokens, ratio, 1)
    rows = sample_rows(tokens, k, torch.tensor(seed), "stratified").tolist()
    assert len(rows) == k
    for j, row in enumerate(rows):
        assert j * tokens // k <= row < math.ceil(Fraction((j + 1) * tokens, k))
    assert rows == sorted(rows)
    if tokens % k == 0:
        assert len(set(rows)) == k


@given(seeds, st.integers(1, 500), ratios)
def test_uniform_rows_are_distinct(seed: int, tokens: int, ratio: Fraction) -> None:
    k = num_generators(tokens, ratio, 1)
    rows = sample_rows(tokens, k, torch.tensor(seed), "uniform").tolist()
    assert len(rows) == len(set(rows)) == k
    assert min(rows) >= 0
    assert max(rows) < tokens


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tokens", [1, 37, 2**20 + 3])
def test_as_many_generators_as_rows_are_all_rows(sampling: str, tokens: int) -> None:
    rows = sample_rows(tokens, tokens, torch.tensor(12345), sampling)
    assert torch.equal(rows.sort().values, torch.arange(tokens))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_product_overflows_for_millions_of_rows(sampling: str) -> None:
    tokens, k = 2**22 - 5, 2**21 - 1
    rows = sample_rows(tokens, k, torch.tensor(2**31 - 1), sampling)
    assert rows.min() >= 0
    assert rows.max() < tokens
    if sampling == "stratified":
        # A stratum is 2.00 rows: two neighbours share a row at its border now and then.
        low = torch.arange(k) * tokens // k
        assert ((rows - low >= 0) & (rows - low <= 2)).all()
    else:
        assert rows.unique().numel() == k


@given(seeds, st.integers(1, 1000))
def test_no_product_overflows_for_two_billion_rows(seed: int, k: int) -> None:
    """The formula in Python's integers, with the draws read off a range of 2²⁴ rows a stratum."""
    tokens = 2**31 - 1
    draws = sample_rows(k << 24, k, torch.tensor(seed), "stratified") - (torch.arange(k) << 24)
    rows = sample_rows(tokens, k, torch.tensor(seed), "stratified").tolist()
    want = [((j << 24) + u) * tokens // (k << 24) for j, u in enumerate(draws.tolist())]
    assert rows == want


def chi_square_limit(freedom: int) -> float:
    """Six standard deviations above the mean: wrong odds are far above, chance never is."""
    return freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("tokens", "k"), [(40, 8), (41, 8), (30, 1), (24, 23)])
def test_every_row_is_equally_likely(sampling: str, tokens: int, k: int) -> None:
    draws = 4000
    x = normal(0, tokens, 8)
    counts: Counter[int] = Counter()
    for salt in range(draws):
        counts.update(sample_rows(tokens, k, content_seed(x, salt), sampling).tolist())
    mean = draws * k / tokens
    statistic = sum((counts[row] - mean) ** 2 / mean for row in range(tokens))
    if sampling == "uniform":
        # Draws without replacement vary less, and add up to k every time.
        statistic /= (1 - k / tokens) * tokens / (tokens - 1)
    assert statistic < chi_square_limit(tokens - 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_are_independent_of_each_other(sampling: str) -> None:
    """Rows of two strata, and of two successive salts, against the product of their odds."""
    x, tokens, k = normal(0, 64, 8), 64, 8
    draws = [sample_rows(tokens, k, content_seed(x, s), sampling) % 8 for s in range(4001)]
    if sampling == "stratified":
        within = Counter((d[0].item(), d[1].item()) for d in draws[:-1])
        mean = 4000 / 64
        statistic = sum((within[p, q] - mean) ** 2 / mean for p in range(8) for q in range(8))
        assert statistic < chi_square_limit(63)
    across = Counter(
        (now.min().item(), then.max().item())
        if sampling == "uniform"
        else (now[0].item(), then[0].item())
        for now, then in pairwise(draws)
    )
    left, right = Counter(), Counter()
    for (p, q), count in across.items():
        left[p] += count
        right[q] += count
    cells = [(p, q, left[p] * right[q] / 4000) for p in left for q in right]
    # Pearson's statistic wants cells that are not nearly empty.
    cells = [(p, q, mean) for p, q, mean in cells if mean >= 5]
    statistic = sum((across[p, q] - mean) ** 2 / mean for p, q, mean in cells)
    assert statistic < chi_square_limit(len(cells))


@given(st.integers(1, 200), st.integers(1, 20), st.sampled_from(FLOATS), seeds)
def test_seed_is_in_range_and_repeats(b: int, n: int, dtype: torch.dtype, salt: int) -> None:
    x = normal(b, b, n, dtype=dtype)
    seed = content_seed(x, salt)
    assert seed.shape == ()
    assert seed.dtype == torch.int64
    assert 0 <= seed.item() < 2**31
    assert torch.equal(seed, content_seed(x.clone(), salt))
    assert torch.equal(seed, content_seed(x.T.contiguous().T, salt))


@pytest.mark.parametrize("dtype", FLOATS)
def test_another_salt_and_another_x_give_another_seed(dtype: torch.dtype) -> None:
    x = normal(0, 100, 16, dtype=dtype)
    tiny = x.clone()
    tiny[0, 0] *= 1 + torch.finfo(dtype).eps if dtype != torch.float64 else 1 + 2**-23
    others = [x, -x, 2 * x, x.flip(0), x.flip(1), x[:99], tiny, x.abs(), torch.zeros_like(x)]
    seen = {content_seed(other, 0).item() for other in others}
    assert len(seen) == len(others)
    assert len({content_seed(x, salt).item() for salt in range(1000)}) == 1000


@pytest.mark.parametrize("dtype", FLOATS)
def test_seeds_of_round_values_differ(dtype: torch.dtype) -> None:
    """The low bits of such values are all zero."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randint(4, (64, 8), generator=generator).to(dtype) for _ in range(200)]
    assert len({content_seed(x, 0).item() for x in xs}) == 200


def test_the_seed_looks_at_the_whole_of_x() -> None:
    """Every 64th part of the rows, every quarter of the columns."""
    x = normal(0, 640, 16)
    for row in range(0, 640, 10):
        for column in range(0, 16, 4):
            other = x.clone()
            other[row, column] += 1
            assert content_seed(other, 0) != content_seed(x, 0)


def test_sites_that_share_a_seed_draw_independently() -> None:
    shared = torch.tensor(2**31 - 1)
    sites = [site_seed(shared, number) for number in range(1000)]
    assert len({seed.item() for seed in sites}) == 1000
    assert all(0 <= seed < 2**31 for seed in sites)
    counts = Counter(sample_rows(64, 1, seed, "stratified").item() // 8 for seed in sites)
    statistic = sum((counts[part] - 125) ** 2 / 125 for part in range(8))
    assert statistic < chi_square_limit(7)
    draws = [sample_rows(64, 8, seed, "stratified") % 8 for seed in sites]
    within = Counter((now[0].item(), then[0].item()) for now, then in pairwise(draws))
    statistic = sum((within[p, q] - 999 / 64) ** 2 / (999 / 64) for p in range(8) for q in range(8))
    assert statistic < chi_square_limit(63)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=REPEATED)])
def test_compiled_seed_and_rows_are_the_eager_ones(dtype: torch.dtype) -> None:
    """Of an input, and of a normalised X made inside the graph, with symbolic shapes."""

    def draw(x: Tensor) -> tuple[Tensor, ...]:
        tokens = x.shape[0]
        k = num_generators(tokens, Fraction(7, 2), 3)
        seed = content_seed(x, 5)
        return seed, *(sample_rows(tokens, k, seed, sampling) for sampling in SAMPLINGS)

    compiled = torch.compile(draw, fullgraph=True, dynamic=True)
    for tokens in (64, 37, 1000):
        x = normal(tokens, tokens, 24, dtype=dtype)
        for got, want in zip(compiled(x), draw(x), strict=True):
            assert torch.equal(got, want)
