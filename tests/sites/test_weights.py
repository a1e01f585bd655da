"""Weights that are more than a parameter, and gradients that are more than a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from pamm_testing.attention import QKV, Attention, attend, example
from pamm_testing.forms import join_heads, split_heads
from pamm_testing.graphs import look
from pamm_testing.zoo import WIDTH
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import pamm_compile

# Weights made of more than a parameter ------------------------------------------------------------


def _pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


class _Masked(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (split_heads(F.linear(h, p.weight * mask)) for p in (self.q, self.k, self.v))
        return attend(q, k, v).square().mean()


class _Scaled(Attention):
    """The weight of the queries depends on activations: their gradients must stay exact."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = F.linear(h, self.q.weight * h.mean((0, 1)))
        return attend(*map(split_heads, (q, self.k(h), self.v(h)))).square().mean()


@pytest.mark.parametrize(
    "make", [_pruned, parametrizations.spectral_norm, parametrizations.weight_norm]
)
def test_weights_computed_from_parameters_and_buffers(make: Callable[..., Any]) -> None:
    model = Attention()
    for layer in (model.q, model.k, model.v):
        make(layer)
    found = look(model, example())
    (plan,) = found.decision.accepted
    assert [len(plan.site.projections), len(plan.site.gradients)] == [3, 3]
    assert not found.reasons


def test_weights_masked_by_an_argument() -> None:
    mask = (torch.rand(WIDTH, WIDTH) > 0.3).float()
    assert look(_Masked(), {**example(), "mask": mask}).compressed == QKV


def test_a_weight_computed_from_activations_stays_exact_and_says_so() -> None:
    found = look(_Scaled(), example())
    assert found.reasons["q.weight"] == "COMPUTED_WEIGHT"
    # X is read for q's gradient all the same.
    assert found.reasons["k.weight"] == "SHARED_INPUT"


# With and without gradient ------------------------------------------------------------------------


class _Twice(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.cell, self.how = Attention(), how

    def _step(self, z: Tensor) -> Tensor:
        h = self.cell.norm(z)
        q, k, v = map(split_heads, (self.cell.q(h), self.cell.k(h), self.cell.v(h)))
        return z + join_heads(attend(q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detached":
            x = self._step(x).detach()
        else:
            with torch.no_grad():
                x = self._step(x)
        return self._step(x).square().mean()


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_a_use_without_gradient_is_no_unsupported_layout(how: str) -> None:
    found = look(_Twice(how), example())
    assert found.compressed == {f"cell.{name}" for name in QKV}
    assert found.reasons == {f"cell.{name}": "NO_WEIGHT_GRAD" for name in QKV}


# Weight gradients that are more than a product ----------------------------------------------------


class _Accumulated(torch.autograd.Function):
    """x·Wᵀ whose weight gradient is written as one of the forms in `_GRADIENTS`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return dz @ w, _GRADIENTS[ctx.how](dz.flatten(0, 1), x.flatten(0, 1), w), None


def _in_two(dz: Tensor, x: Tensor, w: Tensor) -> Tensor:
    first = torch.addmm(w, dz.mT, x, alpha=0.25)
    return torch.addmm(first, dz.mT, x, beta=2.0, alpha=0.5)


def _batched(dz: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(w[None], dz.mT[None], x[None], beta=0.5, alpha=3.0)[0]


_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda dz, x, w: dz.mT @ x,
    "alpha": lambda dz, x, w: torch.addmm(w, dz.mT, x, alpha=4.0, beta=0.0),
    "beta": lambda dz, x, w: torch.addmm(w, dz.mT, x, beta=0.1),
    "bias": lambda dz, x, w: torch.addmm(w[0], dz.mT, x),
    "in_place": lambda dz, x, w: w.clone().addmm_(dz.mT, x, alpha=2.0),
    "out": lambda dz, x, w: torch.mm(dz.mT, x, out=torch.empty_like(w)),
    "transposed": lambda dz, x, w: torch.addmm(w.mT, x.mT, dz, alpha=0.5).mT,
    "in_two": _in_two,
    "batched": _batched,
    "scaled_input": lambda dz, x, w: dz.mT @ (2 * x),
    "masked_input": lambda dz, x, w: dz.mT @ torch.where(x > 0, x, 0.0),
    "scaled_gradient": lambda dz, x, w: (0.5 * dz).mT @ x,
    "masked_result": lambda dz, x, w: (dz.mT @ x).tril() * 3,
    "scattered": lambda dz, x, w: torch.slice_scatter(w, (dz.mT @ x)[2:], 0, 2),
    "both": lambda dz, x, w: (dz.mT @ x) @ (x.mT @ x) / len(x),
}


class _Custom(nn.Module):
    """One layer for every way to write a weight gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict(
            {how: nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 8) for how in _GRADIENTS}
        )

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for number, (how, w) in enumerate(self.w.items()):
            # An input of its own for each.
            h = F.layer_norm(x, (WIDTH,)) * (1 + number)
            q, k, v = map(split_heads, _Accumulated.apply(h, w, how).chunk(3, -1))
            total = total + attend(q, k, v).square().mean()
        return total


def test_a_weight_gradient_keeps_what_it_is_beside_the_product() -> None:
    """With every token a generator, all gradients are exact to rounding."""
    model, batch, found = _Custom(), example(), []
    ours = pamm_compile.backend(ratio=1, min_tokens=1, base="aot_eager", goal="any")
    ours.report.clear()
    for backend in ("aot_eager", ours):
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend=backend)(**batch).backward()
        found.append({how: w.grad.clone() for how, w in model.w.items()})
    exact, compressed = found
    for how, grad in exact.items():
        error = (compressed[how] - grad).norm() / grad.norm()
        assert error < 1e-5, f"{how}: off by {error:.1e}"
    names = {name.rpartition(".")[2] for s in ours.report.compressed for name in s.parameters}
    assert names >= set(_GRADIENTS) - {"scaled_input", "masked_input", "both", "batched"}
