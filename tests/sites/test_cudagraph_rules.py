"""Inductor's own rules for what CUDA graphs can hold, over rewritten graphs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.graphs import Captured, capturing_backend, step
from pamm_testing.options import make_options
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.fx import GraphModule

import pamm_compile
from pamm_compile.private import aot

RECOMMENDED = (
    "linear=gradients:8:warmup=1",
    "linear=subspace:8",
    "linear=quantized:8",
    "qkv=pamm:4",
)
"""The methods of docs/choosing.md, small."""
# What a factorisation in a graph may be: these launch kernels, and read nothing back.
_FACTORISATIONS = {"aten.linalg_cholesky_ex.default", "aten.linalg_solve_triangular.default"}
_WAITS = ("linalg_eigh", "linalg_qr", "linalg_svd", "geqrf", "_local_scalar_dense", "nonzero")


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_rewritten_graphs_hold_nothing_that_cuda_graphs_cannot(sampling: str) -> None:
    captured = Captured()
    options = make_options(ratio=4, min_tokens=1, epsilon=0.5, sampling=sampling)
    model = Attention(_sdpa(is_causal=True))
    backend = capturing_backend(captured, options, decompose=True)
    batch = {"x": torch.randn(BATCH, LENGTH, WIDTH)}
    step(model, torch.compile(model, backend=backend), batch, lambda out: out.square().mean())
    assert any(site.compressed for site in captured.report.sites)
    for graph in (captured.forward, captured.backward):
        assert graph is not None
        assert get_first_incompatible_cudagraph_node(GraphModule({}, graph)) is None


class _Compiled:
    """The graphs that Inductor gets, and what it is told of their inputs."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.told: list[dict[str, Any]] = []

    def __call__(self, gm: GraphModule, inputs: Any, **told: Any) -> Any:
        self.graphs.append(gm)
        self.told.append(told)
        return aot.boxed_nop(gm, inputs)


def _compiled(rules: str, steps: int) -> _Compiled:
    """Return what Inductor gets of a model in training."""
    seen = _Compiled()
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.GELU(),
                                torch.nn.Linear(2 * WIDTH, WIDTH))  # fmt: skip
    model = Attention(_sdpa(is_causal=True)) if rules.startswith("qkv") else model
    backend = pamm_compile.backend(rules=rules, goal="any", min_tokens=1)

    def fake(gm: GraphModule, inputs: Any, **given: Any) -> Any:
        return compile_fx(gm, inputs, **{**given, "inner_compile": seen})

    with (
        mock.patch("pamm_compile.private.inductor.compile_fx", fake),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        compiled = torch.compile(model, backend=backend)
        for _ in range(steps):
            compiled(torch.randn(BATCH, LENGTH, WIDTH)).square().mean().backward()
    assert backend.report.compressed
    return seen


@pytest.mark.parametrize("rules", RECOMMENDED)
def test_what_is_recommended_can_be_captured(rules: str) -> None:
    seen = _compiled(rules, steps=2)
    # Of gradients two graphs, each in two passes.
    assert len(seen.graphs) == (4 if "gradients" in rules else 2)
    for gm in seen.graphs:
        assert get_first_incompatible_cudagraph_node(gm) is None
        called = {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}
        assert not [name for name in called if any(wait in name for wait in _WAITS)]
        linalg = {name for name in called if "linalg" in name}
        assert linalg <= (_FACTORISATIONS if "subspace" in rules else set())


@pytest.mark.everything
def test_draws_of_candidates_are_what_cannot_be_captured() -> None:
    """The check above can fail: eigenvectors are read back by the host."""
    seen = _compiled("linear=subspace:8:candidates=2", steps=1)
    called = {str(node.target) for gm in seen.graphs for node in gm.graph.nodes}
    assert any("linalg_eigh" in name for name in called)


def test_memories_are_copied_into_a_captured_graph() -> None:
    """Not read where they lie: their addresses change, and Inductor would capture anew.

    Of the backward pass every saved tensor is taken to stay where it is; a memory does, since the
    captured forward pass hands on its own copy.
    """
    seen = _compiled("linear=gradients:8:warmup=1", steps=2)
    passes = list(zip(seen.graphs, seen.told, strict=True))
    whole, along = [gm for gm, told in passes if not told.get("is_backward")]
    inputs = along.graph.find_nodes(op="placeholder")
    memories = inputs[len(whole.graph.find_nodes(op="placeholder")) :]
    assert len(memories) == 2
    (static,) = [told["static_input_idxs"] for gm, told in passes if gm is along]
    assert static
    assert not {inputs[at] for at in static} & set(memories)
    (outputs,) = along.graph.find_nodes(op="output")[0].args
    assert set(memories) <= set(outputs)
    names = {node.name for node in memories}
    backward = [
        {node.name for node in gm.graph.find_nodes(op="placeholder")}
        for gm, told in passes
        if told.get("is_backward")
    ]
    assert [names <= saved for saved in backward].count(True) == 1
