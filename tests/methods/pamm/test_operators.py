"""The operators as torch sees them: schema, fakes, shape checks, symbolic shapes."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pamm_compile.methods.pamm import assign, contract, index_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.uint8, torch.int16, torch.int32)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 2), (40, 16, 5)])
def test_opcheck_assign(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    b, n, k = shape
    x = torch.randn(b, n, dtype=dtype)
    torch.library.opcheck(assign, (x, x[:k].clone(), torch.uint8))


@pytest.mark.parametrize("index", INDICES)
def test_opcheck_assign_index_dtypes(index: torch.dtype) -> None:
    torch.library.opcheck(assign, (torch.randn(6, 4), torch.randn(3, 4), index))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("widths", [(1,), (4, 2, 2)])
@pytest.mark.parametrize("index", INDICES)
def test_opcheck_contract(dtype: torch.dtype, widths: tuple[int, ...], index: torch.dtype) -> None:
    f = torch.randint(3, (9,), dtype=index)
    grads = [torch.randn(9, m, dtype=dtype) for m in widths]
    torch.library.opcheck(contract, (f, torch.randn(9, dtype=dtype), grads, 3))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fake", [False, True])
def test_result_shapes_and_dtypes(dtype: torch.dtype, fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad():
        x = torch.ones(9, 4, dtype=dtype)
        f, a, cosine = assign(x, x[:3], torch.int16)
        sums = contract(f, a, [x, x[:, :1]], 3)
    assert (f.shape, f.dtype) == ((9,), torch.int16)
    assert (a.shape, a.dtype) == ((9,), dtype)
    assert (cosine.shape, cosine.dtype) == ((9,), wide(dtype))
    assert (sums.shape, sums.dtype) == ((3, 5), wide(dtype))
    assert all(t.is_contiguous() for t in (f, a, cosine, sums))


def test_scale_and_gradients_may_differ_in_dtype() -> None:
    f = torch.tensor([0, 1, 1], dtype=torch.uint8)
    grad = torch.ones(3, 2, dtype=torch.bfloat16)
    torch.library.opcheck(contract, (f, torch.ones(3), [grad], 2))
    assert contract(f, torch.ones(3), [grad], 2).tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("x", "generators", "index", "message"),
    [
        ((4, 2, 3), (2, 3), torch.uint8, r"x must be \[b, n\], got \[4, 2, 3\]"),
        ((4, 3), (3,), torch.uint8, r"generators must be \[k, n\] .* got \[3\] of dtype"),
        ((4, 3), (2, 5), torch.uint8, "generators have 5 features, x has 3"),
        ((4, 3), (2, 3), torch.float32, "index_dtype must be one of .* got torch.float32"),
    ],
)
def test_assign_rejects(
    x: tuple[int, ...],
    generators: tuple[int, ...],
    index: torch.dtype,
    message: str,
    fake: bool,
) -> None:
    with FakeTensorMode() if fake else torch.no_grad():
        operands = torch.ones(x), torch.ones(generators)
        with pytest.raises(RuntimeError, match=f"pamm::assign: {message}"):
            assign(*operands, index)


@pytest.mark.parametrize("fake", [False, True])
def test_assign_rejects_generators_of_another_dtype(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad():
        x, generators = torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(2, 3)
        with pytest.raises(
            RuntimeError, match=r"of dtype torch.bfloat16, got .* of dtype torch.float32"
        ):
            assign(x, generators, torch.uint8)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("index", "scale", "grads", "message"),
    [
        (
            torch.zeros(4),
            (4,),
            [(4, 2)],
            r"index must be \[b\] .* got \[4\] of dtype torch.float32",
        ),
        (torch.zeros(4, 1).int(), (4,), [(4, 2)], r"index must be \[b\] .* got \[4, 1\]"),
        (torch.zeros(4).int(), (1,), [(4, 2)], r"scale must be \[b\] .* got \[1\] for \[4\]"),
        (torch.zeros(4).int(), (4, 1), [(4, 2)], r"scale must be \[b\] .* got \[4, 1\] for \[4\]"),
        (torch.zeros(4).int(), (4,), [], "grads must not be empty"),
        (torch.zeros(4).int(), (4,), [(4, 2), (4,)], r"grads must be matrices \[b, m\]"),
        (torch.zeros(4).int(), (4,), [(4, 2), (5, 2)], r"grads have \[4, 5\] rows, index has 4"),
    ],
)
def test_contract_rejects(
    index: Tensor,
    scale: tuple[int, ...],
    grads: list[tuple[int, ...]],
    message: str,
    fake: bool,
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        operands = torch.ones(scale), [torch.ones(shape) for shape in grads]
        with pytest.raises(RuntimeError, match=f"pamm::contract: {message}"):
            contract(index, *operands, 2)


def test_contract_rejects_gradients_of_two_dtypes() -> None:
    f, a = torch.zeros(4, dtype=torch.uint8), torch.ones(4)
    grads = [torch.ones(4, 2), torch.ones(4, 2, dtype=torch.bfloat16)]
    with pytest.raises(RuntimeError, match=r"of one dtype, got .*float32.*bfloat16"):
        contract(f, a, grads, 2)


def test_symbolic_shapes_survive_tracing() -> None:
    """One traced graph serves every number of tokens, features and generators."""

    def both(x: Tensor, generators: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        f, a, cosine = assign(x, generators, torch.int32)
        return f, a, cosine, contract(f, a, [grad], generators.shape[0])

    def operands(b: int, n: int, k: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(b, n), torch.randn(k, n), torch.randn(b, m)

    traced = make_fx(both, tracing_mode="symbolic")(*operands(12, 6, 4, 5))
    targets = [node.target for node in traced.graph.nodes]
    assert assign in targets
    assert contract in targets
    for shape in [(12, 6, 4, 5), (31, 7, 2, 3), (5, 9, 8, 11)]:
        given = operands(*shape)
        for got, want in zip(traced(*given), both(*given), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("k", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_index_dtype_is_the_smallest_that_fits(k: int, dtype: torch.dtype) -> None:
    assert index_dtype(k) == dtype
    assert k - 1 <= torch.iinfo(dtype).max


def test_index_dtype_of_a_symbolic_number_does_not_fix_its_value() -> None:
    seen = []

    def trace(x: Tensor) -> Tensor:
        seen.append(index_dtype(x.shape[0]))
        return x.new_zeros(x.shape[0])

    traced = make_fx(trace, tracing_mode="symbolic")(torch.ones(5))
    assert seen == [torch.int32]
    assert traced(torch.ones(9)).shape == (9,)
