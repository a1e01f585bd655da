"""What the rewrite puts into a graph, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.graphs import Captured, capturing_backend, operators, step
from pamm_testing.options import make_options
from pamm_testing.zoo import BATCH, DECODERS, LAYERS, LENGTH, WIDTH, Case
from torch import Tensor, nn

import pamm_compile
from pamm_compile.graph.insert import BACKWARD, FORWARD


def _capture(model: nn.Module, case: Case | None = None, **options: Any) -> Captured:
    captured = Captured()
    chosen = make_options(**{"ratio": 4, "min_tokens": 1, **options})
    compiled = torch.compile(model, backend=capturing_backend(captured, chosen, decompose=True))
    if case is None:
        batch = {"x": torch.randn(BATCH, LENGTH, WIDTH)}
        step(model, compiled, batch, lambda out: out.square().mean())
    else:
        step(model, compiled, case.batch(), case.loss)
    return captured


def _llama() -> Case:
    return next(case for case in DECODERS if case.name == "llama")


@pytest.mark.quick
def test_three_weight_gradients_become_one_contraction_and_one_matmul() -> None:
    case = _llama()
    model = case.build()
    exact = _capture(model, case, min_tokens=10**6)
    torch._dynamo.reset()
    ours = _capture(model, case)
    assert exact.joint is not None
    assert ours.joint is not None
    before, after = Counter(operators(exact.joint)), Counter(operators(ours.joint))
    assert after["pamm::assign"] == after["pamm::contract"] == LAYERS
    # dWq, dWk and dWv go, the finishing matmul comes.
    assert after["aten::mm"] == before["aten::mm"] - 3 * LAYERS + LAYERS


def test_forward_holds_assign_and_backward_contract() -> None:
    captured = _capture(_llama().build(), _llama())
    assert captured.forward is not None
    assert captured.backward is not None
    forward, backward = operators(captured.forward), operators(captured.backward)
    assert forward.count("pamm::assign") == LAYERS
    assert "pamm::contract" not in forward
    assert backward.count("pamm::contract") == LAYERS
    assert "pamm::assign" not in backward
    assert not any("_assert" in name for name in backward)


def test_one_seed_serves_every_site_of_a_graph() -> None:
    captured = _capture(_llama().build(), _llama())
    assert captured.joint is not None
    # The content of X is read once, at the first site.
    seeds = [n for n in captured.joint.nodes if n.target is torch.ops.pamm.content_seed.default]
    assert len(seeds) == 1


def test_no_random_operator_is_inserted() -> None:
    for sampling in ("stratified", "uniform"):
        captured = _capture(Attention(_sdpa()), sampling=sampling)
        torch._dynamo.reset()
        assert captured.joint is not None
        assert not any("rand" in name for name in operators(captured.joint))


@pytest.mark.parametrize(("epsilon", "gates"), [(None, 0), (0.5, 1)])
def test_the_gate_is_there_only_if_asked_for(epsilon: float | None, gates: int) -> None:
    captured = _capture(Attention(_sdpa()), epsilon=epsilon)
    assert captured.joint is not None
    comparisons = [n for n in captured.joint.nodes if n.target is torch.ops.aten.lt.Scalar]
    assert len(comparisons) == gates


def test_inserted_nodes_carry_what_later_passes_need() -> None:
    captured = _capture(_llama().build(), _llama())
    assert captured.joint is not None
    for node in captured.joint.nodes:
        if node.op == "call_function" and node.target is not (
            torch.ops.aten._assert_tensor_metadata.default
        ):
            assert "val" in node.meta, node
            assert node.meta["partitioner_tag"] in (FORWARD, BACKWARD, "is_backward"), node


def test_saved_bytes_fall_by_what_the_report_says() -> None:
    case = _llama()
    model = case.build()
    exact = _capture(model, case, min_tokens=10**6)
    torch._dynamo.reset()
    ours = _capture(model, case)
    before = sum(site.bytes_before for site in ours.report.sites)
    after = sum(site.bytes_after for site in ours.report.sites)
    # The seed is not saved; nothing else is saved in X's place.
    assert exact.saved_bytes() - ours.saved_bytes() == before - after


class _Columns(nn.Module):
    """Tokens are columns of X, written as W @ X or as Xᵀ @ Wᵀ, or a batch of one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(24, WIDTH) / 8), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "left":
            return self.w @ x
        return (x.mT @ self.w.mT).mT if self.how == "right" else torch.bmm(self.w[None], x[None])[0]


@pytest.mark.parametrize("how", ["left", "right", "batch"])
def test_tokens_may_be_columns(how: str) -> None:
    """With every token a generator, the gradient is exact to rounding."""
    model, x, found = _Columns(how), torch.randn(WIDTH, 48), []
    ours = pamm_compile.backend(rules="linear=pamm:1", min_tokens=1, base="aot_eager", goal="any")
    ours.report.clear()
    for backend in ("aot_eager", ours):
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend=backend)(x).square().mean().backward()
        assert model.w.grad is not None
        found.append(model.w.grad.clone())
    (site,) = ours.report.compressed
    assert (site.parameters, site.shape) == (("w",), (48, WIDTH))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
