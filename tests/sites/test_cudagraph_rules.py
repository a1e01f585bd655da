"""Inductor's own rule for which operators CUDA graphs cannot hold, over rewritten graphs."""

from __future__ import annotations

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.graphs import Captured, capturing_backend, step
from pamm_testing.options import make_options
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.fx import GraphModule


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
