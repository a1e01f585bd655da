"""An input in 8 or 4 bits, as plain functions and as a traced graph."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pamm_testing.in_a_model import trained_with
from torch import Tensor

import pamm_compile
from pamm_compile import Quantized, recommend
from pamm_compile.devices import device_named, exact_seconds, site_seconds
from pamm_compile.errors import InvalidOptionError
from pamm_compile.methods.base import Method
from pamm_compile.private.scaled import has_scaled_matmul
from pamm_compile.sites.cost import saved_time
from pamm_compile.size import Size

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METHODS = (Quantized(8), Quantized(4), Quantized(8, float8=True))
WITHIN = {METHODS[0]: 0.012, METHODS[1]: 0.2, METHODS[2]: 0.05}
"""Of heavy tails, relative to the exact gradient."""

seeds = st.integers(0, 2**31 - 1)
methods = st.sampled_from(METHODS)
floats = st.sampled_from(FLOATS)
tokens_ = st.integers(1, 300)
widths = st.sampled_from([1, 7, 16, 32])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations(seed: int, b: int, n: int) -> Tensor:
    """As a GELU puts them out: few are large, columns and tokens differ in size."""
    x = torch.nn.functional.gelu(2 * normal(seed, b, n) - 1)
    return x * normal(seed + 1, b, 1).exp() * normal(seed + 2, 1, n).exp()


def gradients(
    method: Quantized, x: Tensor, grads: list[Tensor], transposed: list[bool]
) -> list[Tensor]:
    stored = method.store(x, torch.tensor(3), [grad.shape[1] for grad in grads])
    return method.weight_gradients(stored, grads, transposed)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.quick
def test_it_is_a_method() -> None:
    assert isinstance(Quantized(), Method)
    assert len({method.fingerprint for method in (*METHODS, Quantized(8, float8=False))}) == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 3}, "bits"),
        ({"bits": 8.0}, "bits"),
        ({"bits": None}, "bits"),
        ({"float8": 1}, "float8"),
        ({"float8": "yes"}, "float8"),
        ({"bits": 4, "float8": True}, "float8"),
    ],
)
def test_options_that_are_not_allowed_say_so(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{named}=.* is not allowed: {named} must be"):
        Quantized(**options)


def reference(bits: int, x: Tensor) -> Tensor:
    """X̂ as the docstring has it, in float64, but that steps are rounded up to bfloat16.

    Unrounded, the largest entry of a column, which counts most, would be exact.
    """
    half = 2 ** (bits - 1)
    decoded = []
    for block in x.double().split(64):
        root = block.sign() * block.abs().sqrt()
        peak = root.abs().amax(0)
        step = torch.where(peak > 0, peak, 1.0) * (1 + 2**-7) / (half - 0.5)
        step = step.float().bfloat16().double()
        root = ((root / step).floor() + 0.5) * step * (peak > 0)
        decoded.append(root.sign() * root.square())
    return torch.cat(decoded)


@given(seeds, tokens_, widths, st.sampled_from([4, 8]))
@settings(max_examples=40)
def test_every_root_is_within_half_a_step(seed: int, b: int, n: int, bits: Any) -> None:
    x = activations(seed, b, n)
    (found,) = gradients(Quantized(bits), x, [torch.eye(b)], [False])
    for block, of_block in zip(x.double().split(64), found.double().split(64), strict=True):
        root = block.abs().sqrt()
        # Scales are rounded up, by 12 thousandths at most.
        most = 1.012 * root.amax(0) / (2 ** (bits - 1) - 0.5) / 2
        rounding = 1e-5 * block.abs().amax(0)
        assert ((of_block - block).abs() <= most * (2 * root + most) + rounding).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_as_far_off_as_the_plain_reference(bits: Any) -> None:
    x = activations(0, 4096, 64)
    (found,) = gradients(Quantized(bits), x, [torch.eye(4096)], [False])
    assert error(found, x) == pytest.approx(error(reference(bits, x), x), rel=0.01)


@given(seeds, tokens_, st.sampled_from([16, 41, 48]), floats)
@settings(max_examples=40)
def test_in_float8_it_is_the_plain_reference(seed: int, b: int, n: int, dtype: torch.dtype) -> None:
    x, dz = activations(seed, b, n).to(dtype), normal(seed + 3, b, 6, dtype=dtype)
    (found,) = gradients(METHODS[2], x, [dz], [False])
    if dtype == torch.float64:
        # Not in float8, but in eight bits.
        assert error(found, dz.T @ x) < 0.1
        return
    s = x.float().abs().amax(1) / 448
    scaled = s[:, None] * dz.float()
    t = scaled.abs().amax() / 448
    codes = (x.float() * (1 / s)[:, None]).to(torch.float8_e4m3fn).double()
    of_grad = (scaled * (1 / t)).to(torch.float8_e4m3fn).double()
    assert error(found, t.double() * (of_grad.T @ codes)) < 5e-3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_heavy_tails_stay_within_the_bound(method: Quantized, dtype: torch.dtype) -> None:
    """3 % of 8 bits is what docs promise; on these inputs even steps are further off."""
    x, dz = activations(0, 4096, 64).to(dtype), normal(9, 4096, 32, dtype=dtype)
    found, flipped = gradients(method, x, [dz, dz], [False, True])
    exact = dz.double().T @ x.double()
    assert error(found, exact) < WITHIN[method]
    assert error(flipped.T, exact) < WITHIN[method]
    assert found.dtype == dtype


@given(seeds, tokens_, methods, st.lists(st.booleans(), min_size=1, max_size=3))
@settings(max_examples=30)
def test_several_projections_are_as_each_alone(
    seed: int, b: int, method: Quantized, transposed: list[bool]
) -> None:
    x = activations(seed, b, 16)
    grads = [normal(seed + i, b, 4 + i) for i in range(len(transposed))]
    together = gradients(method, x, grads, transposed)
    for found, grad, flip in zip(together, grads, transposed, strict=True):
        (alone,) = gradients(method, x, [grad], [False])
        assert torch.allclose(found, alone.T if flip else alone, rtol=1e-2, atol=1e-4)


@given(
    seeds, tokens_, widths, methods, floats, st.sampled_from([math.nan, math.inf, -math.inf]),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=80)
def test_what_is_not_finite_reaches_the_gradient(
    seed: int, b: int, n: int, method: Quantized, dtype: torch.dtype, bad: float, in_x: bool
) -> None:
    x, dz = normal(seed, b, n, dtype=dtype), normal(seed + 1, b, 4, dtype=dtype)
    spoilt = x if in_x else dz
    spoilt[seed % b, seed % spoilt.shape[1]] = bad
    (found,) = gradients(method, x, [dz], [False])
    reached = found[:, seed % n] if in_x else found[seed % 4]
    assert not reached.isfinite().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_columns_and_tokens_of_zeros_give_zeros(method: Quantized, dtype: torch.dtype) -> None:
    x, dz = normal(0, 130, 16, dtype=dtype), normal(1, 130, 5, dtype=dtype)
    x[:, 3], dz[:, 2] = 0, 0
    (found,) = gradients(method, x, [dz], [False])
    assert found.isfinite().all()
    assert not found[:, 3].any()
    assert not found[2].any()
    (found,) = gradients(method, torch.zeros_like(x), [dz], [False])
    assert not found.any()


@given(seeds, tokens_, st.integers(1, 33), methods, floats)
@settings(max_examples=60)
def test_stored_bytes_are_those_stored(
    seed: int, b: int, n: int, method: Quantized, dtype: torch.dtype
) -> None:
    stored = method.store(normal(seed, b, n, dtype=dtype), torch.tensor(seed), (9, 4))
    size = Size(b, n, (9, 4), dtype)
    assert method.stored_bytes(size) == sum(each.nbytes for each in stored)
    assert (method.describe(size) == "float8") == (stored[0].dtype == torch.float8_e4m3fn)
    assert method.cost(size).flops > 0


@pytest.mark.parametrize(("method", "share"), [(Quantized(8), 0.52), (Quantized(4), 0.27)])
def test_bytes_are_a_half_and_a_quarter_of_those_in_16_bits(
    method: Quantized, share: float
) -> None:
    size = Size(16384, 2048, (2048,), torch.bfloat16)
    assert method.stored_bytes(size) <= share * size.bytes


@pytest.mark.parametrize("features", [48, 41])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_graph_serves_any_number_of_tokens(method: Quantized, features: int) -> None:
    torch._dynamo.reset()
    model = torch.nn.Linear(features, 12, bias=False)
    backend = pamm_compile.backend(rules={"linear": method}, base="aot_eager", goal="any")
    compiled = torch.compile(model, backend=backend)
    first = activations(0, 300, features)
    torch._dynamo.mark_dynamic(first, 0)
    compiled(first).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for b in (300, 257, 512):
            x = activations(b, b, features)
            model.zero_grad()
            out = compiled(x)
            out.square().sum().backward()
            (wanted,) = gradients(method, x, [2 * out.detach()], [False])
            assert model.weight.grad is not None
            assert error(model.weight.grad, wanted) < 1e-3
            assert not torch.equal(wanted, 2 * out.detach().T @ x)


@pytest.mark.parametrize(
    "method",
    [
        METHODS[0],
        *(pytest.param(method, marks=pytest.mark.everything) for method in METHODS[1:]),
    ],
    ids=str,
)
def test_in_a_model_all_else_stays_bitwise_and_codes_are_saved_at_any_budget(
    method: Quantized,
) -> None:
    captured, exact, ours = trained_with(method)
    compressed = captured.report.sites
    changed = {name for site in compressed for name in site.parameters}
    assert all(error(ours.grads[n], exact.grads[n]) < 0.15 for n in changed)
    code = torch.float8_e4m3fn if method.float8 else torch.uint8
    for graphs in (captured, captured.at_budget[0.5]):
        # Decoded it would be saved at several times the size.
        codes = [node for node in graphs.saved() if node.meta["val"].dtype == code]
        assert len(codes) == len(compressed)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("outputs", [(4096,), (2048, 512, 512), (64, 64, 64, 64)])
def test_a_cpu_gains_no_time(method: Quantized, outputs: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert saved_time(method, Size(8192, 2048, outputs, dtype)) <= 0


def test_under_speed_a_cpu_declines_it_and_says_why() -> None:
    torch._dynamo.reset()
    backend = pamm_compile.backend(rules="linear=quantized:8", base="aot_eager", goal="speed")
    model = torch.nn.Linear(48, 12, bias=False)
    torch.compile(model, backend=backend)(activations(0, 300, 48)).sum().backward()
    (site,) = backend.report.sites
    assert site.reason == "UNPROFITABLE"
    assert "× the exact time, by the cost model" in site.detail


@pytest.mark.parametrize("features", [2048, 8192])
def test_a_gpu_gains_time_where_it_multiplies_in_float8(features: int) -> None:
    size = Size(16384, features, (2048, 2048), torch.bfloat16, "cuda")
    hopper, ampere = device_named("h100"), device_named("a100")
    exact = exact_seconds(size, hopper)
    assert 0.5 * exact < site_seconds(Quantized(), size, hopper) < exact
    assert site_seconds(Quantized(float8=False), size, hopper) > exact
    assert site_seconds(Quantized(4), size, hopper) > exact
    assert site_seconds(Quantized(), size, ampere) > exact_seconds(size, ampere)
    odd = replace(size, features=features + 1)
    assert site_seconds(Quantized(), odd, hopper) < exact_seconds(odd, hopper)


def test_a_gpu_without_float8_is_not_taken_for_one_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = Size(16384, 2048, (2048, 2048), torch.bfloat16, "cuda")
    for has in (False, True):
        monkeypatch.setattr("pamm_compile.sites.cost.has_scaled_matmul", lambda _, has=has: has)
        assert (saved_time(Quantized(), size) > 0) == has


@pytest.mark.parametrize(
    ("capability", "has"), [(80, False), (89, True), (90, True), ("gfx942", False)]
)
def test_which_devices_multiply_in_float8(
    capability: Any, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interface:
        is_available = staticmethod(lambda: True)
        get_compute_capability = staticmethod(lambda _: capability)

    monkeypatch.setattr(
        "pamm_compile.private.scaled._get_interface_for_device", lambda _: Interface
    )
    assert has_scaled_matmul(torch.device("cuda")) == has
    assert not has_scaled_matmul(torch.device("cpu"))


def test_recommend_finds_it_where_an_error_of_a_hundredth_is_asked_for() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 64, bias=False), torch.randn(512, 64)
    found = recommend(model, x, max_error=0.02, draws=1, loss=lambda out: out.square().mean())
    assert found.rules == {"linear": Quantized(8)}
