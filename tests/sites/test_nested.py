"""Graphs inside the graph: regions compiled once, branches, loops; and graphs of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pamm_compile

N = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.qkv, self.o = nn.LayerNorm(N), nn.Linear(N, 3 * N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(attended.transpose(1, 2).flatten(-2))


class Nested(nn.Module):
    """Layer by layer through one region; Dynamo inlines its first call."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.region = torch.compiler.nested_compile_region(lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.region(layer, x)
        return x


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.gate = Block(), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return torch.cond(x.sum() > 0, lambda x: self.gate(x), lambda x: 2 * self.gate(x), (x,))


def _gradients(model: nn.Module, backend: Any, x: Tensor) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model.zero_grad()
    call = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    call(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _check(model: nn.Module, backend: pamm_compile.Backend, x: Tensor) -> None:
    exact, ours = _gradients(model, None, x), _gradients(model, backend, x)
    assert exact.keys() == ours.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("base", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_around_a_nested_region(base: str) -> None:
    """With ratio=1, by definition exact."""
    backend = pamm_compile.backend(ratio=1, min_tokens=1, goal="any", base=base)
    backend.report.clear()
    _check(Nested(), backend, torch.randn(2, 64, N))
    assert [site.parameters for site in backend.report.compressed] == [("layers.0.qkv.weight",)]
    inside = {n.what for n in backend.report.notes if n.reason == "NESTED_REGION"}
    assert {"layers.1.qkv.weight", "layers.2.o.weight"} <= inside


def test_gradients_around_branches() -> None:
    backend = pamm_compile.backend(ratio=1, min_tokens=1, goal="any", base="aot_eager", seed=3)
    backend.report.clear()
    _check(Branches(), backend, torch.randn(2, 64, N))
    assert len(backend.report.compressed) == 1
    notes = {n.what: n.detail for n in backend.report.notes if n.reason == "NESTED_REGION"}
    assert notes == {"gate.weight": "higher_order::cond"}


def _loss(weights: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, weights, (x,)).square().mean()


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_that_differentiates_itself(strict: bool) -> None:
    model, x = Block(), torch.randn(2, 64, N)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    backend = pamm_compile.backend(min_tokens=1, base="aot_eager", strict=strict, seed=4)
    backend.report.clear()
    compiled = torch.compile(lambda w, x: torch.func.grad(_loss)(w, model, x), backend=backend)
    if strict:
        with pytest.raises(Exception, match=r"strict=True.*\n.*OWN_GRADIENTS"):
            compiled(weights, x)
    else:
        want = torch.func.grad(_loss)(weights, model, x)
        assert all(torch.equal(got, want[name]) for name, got in compiled(weights, x).items())
    (graph,) = backend.report.graphs
    assert graph.state is pamm_compile.State.OWN_GRADIENTS
    assert not graph.training
    assert graph.summary() == "the graph computes gradients itself: left as it is"


def test_a_function_that_calls_autograd_itself() -> None:
    model, x = Block(), torch.randn(2, 64, N)
    backend = pamm_compile.backend(min_tokens=1, base="aot_eager", seed=5)
    backend.report.clear()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.compile(step, backend=backend)(x)
    for ours, exact in zip(got, step(x), strict=True):
        torch.testing.assert_close(ours, exact)
    states = {graph.state for graph in backend.report.graphs}
    assert pamm_compile.State.OWN_GRADIENTS in states
