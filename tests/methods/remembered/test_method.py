"""Directions of an earlier weight gradient, as plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pamm_compile import GradientSubspace, InvalidOptionError, Quantized, Size
from pamm_compile.devices import device_named, exact_seconds, site_seconds
from pamm_compile.methods.base import Method, Remembering
from pamm_compile.rules import parse_rules


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_directions(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """A gradient of so many directions, the first the largest."""
    sizes = torch.arange(rank, 0, -1).float()
    return (normal(seed, m, rank) * sizes) @ torch.linalg.qr(normal(seed + 1, n, rank)).Q.T


def test_it_is_a_method_that_remembers() -> None:
    assert isinstance(GradientSubspace(), Method)
    assert isinstance(GradientSubspace(), Remembering)
    assert not isinstance(Quantized(), Remembering)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("linear=gradients", GradientSubspace()),
        ("linear=gradients:0.25", GradientSubspace(0.25)),
        ("linear=gradients:64:every=5", GradientSubspace(64, every=5)),
        ("linear=gradients:every=5:carry=0.5", GradientSubspace(every=5, carry=0.5)),
        ("linear=gradients:warmup=1", GradientSubspace(warmup=1)),
    ],
)
def test_rules_name_it(text: str, method: GradientSubspace) -> None:
    assert parse_rules(text)[0].method == method


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": True},
        {"rank": 1.5},
        {"every": 1},
        {"every": 2.5},
        {"carry": 1.5},
        {"carry": -0.1},
        {"carry": "half"},
    ],
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        GradientSubspace(**options)  # type: ignore[arg-type]


def test_options_are_in_the_fingerprint() -> None:
    methods = [GradientSubspace(**options) for options in ({}, {"rank": 0.25}, {"every": 5})]
    methods.append(GradientSubspace(carry=0.25))
    assert len({method.fingerprint for method in methods}) == 4


def test_what_a_gradient_spans_is_remembered() -> None:
    gradient = on_directions(96, 64, 8)
    memory = GradientSubspace(8).remember([gradient])
    assert memory.shape == (8, 64)
    assert torch.allclose(memory @ memory.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(gradient @ memory.T @ memory, gradient, atol=1e-4)


def test_it_is_nearly_the_best_of_so_many_directions() -> None:
    gradient = on_directions(96, 64, 32)
    memory = GradientSubspace(8).remember([gradient])
    sizes = torch.linalg.svdvals(gradient)
    left = float((gradient - gradient @ memory.T @ memory).norm())
    # Two iterations, on sizes that fall by no more than a thirtieth at a time.
    assert left < 1.06 * float(sizes[8:].norm())


def test_a_large_gradient_takes_no_directions_from_a_small_one() -> None:
    small, large = on_directions(48, 64, 4), 1e4 * on_directions(48, 64, 8, seed=7)
    memory = GradientSubspace(8).remember([small, large])
    kept = small @ memory.T @ memory
    assert float((kept - small).norm() / small.norm()) < 0.6


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sizes_do_not_matter(scale: float) -> None:
    gradient = on_directions(32, 24, 4)
    memories = [GradientSubspace(4).remember([each]) for each in (gradient, scale * gradient)]
    assert torch.allclose(memories[0].T @ memories[0], memories[1].T @ memories[1], atol=1e-3)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_of_any_gradient_the_memory_is_orthonormal(value: float) -> None:
    memory = GradientSubspace(4).remember([torch.full((16, 24), value)])
    assert torch.allclose(memory @ memory.T, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flip", [False, True])
def test_gradients_are_made_along_the_memory(dtype: torch.dtype, flip: bool) -> None:
    method, x = GradientSubspace(8), normal(0, 40, 24, dtype=dtype)
    grads = [normal(p, 40, m, dtype=dtype) for p, m in enumerate((16, 32), 1)]
    memory = method.remember([g.float().T @ x.float() for g in grads]).to(dtype)
    stored = method.store_along(x, memory)
    assert [tuple(each.shape) for each in stored] == [(40, 8)]
    made = method.weight_gradients_along(stored, memory, grads, [flip, False])
    for grad, dw, is_flipped in zip(grads, made, (flip, False), strict=True):
        wanted = grad.double().T @ x.double() @ memory.double().T @ memory.double()
        found = (dw.T if is_flipped else dw).double()
        assert float((found - wanted).norm() / wanted.norm()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_lost_is_restored_by_the_length_of_what_is_kept(dtype: torch.dtype) -> None:
    method, gradient = GradientSubspace(8, carry=0.5), normal(0, 96, 64, dtype=dtype)
    memory = method.remember([gradient]).to(torch.bfloat16 if dtype.itemsize == 2 else dtype)
    lost = method.lost(gradient, memory)
    assert lost is not None
    kept = gradient.double() @ memory.double().T @ memory.double()
    wanted = 3 * kept + 1.5 * (gradient.double() - kept)
    found = method.restored((3 * kept).to(dtype), lost)
    assert found.dtype == dtype
    assert lost.dtype == torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < torch.finfo(torch.bfloat16).eps


def test_nothing_is_carried_of_a_gradient_of_zeros_or_without_carry() -> None:
    gradient = torch.zeros(16, 24)
    method = GradientSubspace(4, carry=0.5)
    lost = method.lost(gradient, method.remember([gradient]))
    assert lost is not None
    assert not bool(lost.any())
    method = GradientSubspace(4)
    assert method.lost(gradient, method.remember([gradient])) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_gradient(value: float) -> None:
    method, x = GradientSubspace(4), normal(0, 20, 12)
    memory = method.remember([normal(1, 16, 12)])
    x[3, 5] = value
    made = method.weight_gradients_along(
        method.store_along(x, memory), memory, [normal(2, 20, 16)], [False]
    )
    assert not bool(made[0].isfinite().any())


def test_without_a_memory_it_is_eight_bits() -> None:
    x, grads = normal(0, 64, 32), [normal(1, 64, 16)]
    made = []
    for method in (GradientSubspace(), Quantized(8)):
        stored = method.store(x, torch.tensor(1), [16])
        made.append(method.weight_gradients(stored, grads, [False])[0])
    assert torch.equal(*made)


def test_bytes_are_the_most_of_any_step() -> None:
    size, grads = Size(256, 64, (64, 32), torch.float32), [normal(1, 64, 64), normal(2, 32, 64)]
    method = GradientSubspace(carry=0.5)
    memory = method.remember(grads)
    lost = [method.lost(grad, memory) for grad in grads]
    kept = memory.nbytes + sum(each.nbytes for each in lost if each is not None)
    assert method.stored_bytes(size) == Quantized(8).stored_bytes(size)
    assert method.remembered_bytes(size) == kept
    assert GradientSubspace().remembered_bytes(size) == memory.nbytes


def test_there_is_nothing_to_remember_of_as_many_directions_as_features() -> None:
    assert GradientSubspace(64).directions(64, [64]) == 0
    size = Size(256, 64, (64,), torch.float32)
    assert GradientSubspace(64).cost(size) == Quantized(8).cost(size)
    assert GradientSubspace(64).describe(size) == "8 bits"


def test_the_model_of_an_h100_prefers_it_to_exact_gradients() -> None:
    device = device_named("h100")
    size = Size(16384, 2048, (2048, 2048, 2048), torch.bfloat16, "cuda")
    often, seldom = (site_seconds(GradientSubspace(every=every), size, device) for every in (2, 10))
    assert seldom < often
    assert seldom < 0.5 * exact_seconds(size, device)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    tokens=st.integers(1, 60),
    features=st.integers(2, 40),
    outputs=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    rank=st.one_of(st.floats(0.01, 0.9), st.integers(1, 40)),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_of_any_sizes_gradients_lie_along_orthonormal_directions(
    seed: int, tokens: int, features: int, outputs: list[int], rank: float, scale: float
) -> None:
    method = GradientSubspace(rank)
    assume(method.directions(features, outputs))
    x = normal(seed, tokens, features)
    grads = [normal(seed + p, tokens, m) * scale for p, m in enumerate(outputs, 1)]
    memory = method.remember([grad.T @ x for grad in grads])
    assert memory.shape[1] == features
    assert len(memory) <= method.directions(features, outputs)
    assert torch.allclose(memory @ memory.T, torch.eye(len(memory)), atol=1e-4)
    stored = method.store_along(x, memory)
    made = method.weight_gradients_along(stored, memory, grads, [False] * len(grads))
    for grad, dw in zip(grads, made, strict=True):
        wanted = grad.double().T @ x.double() @ memory.double().T @ memory.double()
        size = grad.double().norm() * x.double().norm()
        assert float((dw.double() - wanted).norm() / size) < 1e-5
