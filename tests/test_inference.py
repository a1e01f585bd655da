"""Export and inference, which PAMM leaves as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor

import pamm_compile


def _square(out: Tensor) -> Tensor:
    return out.square().mean()


def _backend(**more: Any) -> pamm_compile.Backend:
    backend = pamm_compile.backend(**{"ratio": 4, "min_tokens": 1, **more})
    backend.report.clear()
    return backend


def test_inference_is_bitwise_the_uncompressed_one() -> None:
    model = Attention(_sdpa(is_causal=True)).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    backend = _backend(base="aot_eager", seed=33)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
    assert {graph.training for graph in backend.report.graphs} == {False}
    assert backend.report.graphs[0].summary() == "no backward pass: graph left as it is"
    # Evaluated with gradients on, forward is the same all the same.
    assert torch.equal(compiled(x), model(x))
    assert len(backend.report.compressed) == 1


@pytest.mark.parametrize("training", [True, False])
def test_export_is_left_as_it_is(training: bool) -> None:
    model = Attention(_sdpa(is_causal=True)).train(training)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    before = torch.export.export(model, (x,)).graph_module.code
    model.compile(backend=_backend(base="aot_eager", seed=34))
    _square(model(x)).backward()
    exported = torch.export.export(model, (x,))
    assert exported.graph_module.code == before
    assert "pamm" not in before
    assert torch.equal(exported.module()(x), model(x))
