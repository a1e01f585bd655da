"""torch.compile's modes and compiled autograd give the gradients of the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.graphs import step
from pamm_testing.zoo import WIDTH
from torch import Tensor
from torch._dynamo import compiled_autograd

import pamm_compile


def _square(out: Any) -> Tensor:
    return out.square().mean()


def _case() -> tuple[Attention, dict[str, Any]]:
    torch.manual_seed(0)
    return Attention(_sdpa(is_causal=True)), {"x": torch.randn(4, 32, WIDTH)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("pamm", "reduce-overhead"),
        pytest.param("subspace", "max-autotune", marks=pytest.mark.everything),
        pytest.param("pamm", "max-autotune", marks=pytest.mark.everything),
        pytest.param("subspace", "reduce-overhead", marks=pytest.mark.everything),
    ],
)
def test_modes_give_the_same_gradients(method: str, mode: str) -> None:
    """On a CPU neither CUDA graphs nor Triton are involved; the GPU's tests are marked so."""
    model, batch = _case()
    backend = pamm_compile.backend(rules=f"qkv={method}:8", min_tokens=1)
    default = step(model, torch.compile(model, backend=backend), batch, _square)
    torch._dynamo.reset()
    backend.report.clear()
    ours = step(model, torch.compile(model, backend=backend, mode=mode), batch, _square)
    assert len(backend.report.compressed) == 1
    torch.testing.assert_close(ours.loss, default.loss)
    for name, grad in default.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-6)
    exact = step(model, model, batch, _square)
    assert any(not torch.allclose(exact.grads[n], g, rtol=1e-2) for n, g in ours.grads.items())


@pytest.mark.parametrize("rule", ["qkv=pamm:8", "qkv=subspace:8"])
def test_symbolic_sizes_give_the_gradients_of_constant_ones(rule: str) -> None:
    model, _ = _case()
    backend = pamm_compile.backend(rules=rule, min_tokens=1, base="aot_eager")
    dynamic = torch.compile(model, backend=backend, dynamic=True)
    for length in (24, 40):
        batch = {"x": torch.randn(4, length, WIDTH)}
        ours = step(model, dynamic, batch, _square)
    # One graph for both lengths.
    assert len(backend.report.graphs) == len(backend.report.compressed) == 1
    torch._dynamo.reset()
    constant = step(model, torch.compile(model, backend=backend, dynamic=False), batch, _square)
    assert len(backend.report.compressed) == 2
    for name, grad in constant.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-6)
    exact = step(model, model, batch, _square)
    assert any(not torch.allclose(exact.grads[n], g, rtol=1e-2) for n, g in ours.grads.items())


def test_compiled_autograd_gives_the_same_gradients() -> None:
    """It captures our compiled backward graph, with the contraction in it."""
    model, batch = _case()
    backend = pamm_compile.backend(ratio=8, min_tokens=1, base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    plain = step(model, compiled, batch, _square)
    captured = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append(gm.print_readable(print_output=False))
        return gm

    def compile_backward(gm: torch.fx.GraphModule) -> Any:
        return torch.compile(gm, backend=look, dynamic=True)

    with compiled_autograd._enable(compile_backward):
        ours = step(model, compiled, batch, _square)
    assert sum("pamm.contract" in text for text in captured) == 1
    exact = step(model, model, batch, _square)
    assert plain.grads.keys() == ours.grads.keys()
    for name, grad in plain.grads.items():
        assert torch.equal(ours.grads[name], grad), name
    assert any(not torch.equal(exact.grads[n], g) for n, g in ours.grads.items())
