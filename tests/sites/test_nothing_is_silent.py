"""What is said of weights that nothing can be done about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pamm_testing.attention import QKV, Attention, attend, example, linear
from pamm_testing.forms import join_heads, split_heads
from pamm_testing.graphs import look
from torch import Tensor, nn
from torch.nn import functional as F

import pamm_compile


@torch.library.custom_op("pamm_testing::attention", mutates_args=())
def _unknown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


_unknown.register_fake(lambda q, k, v: torch.empty_like(q))
_unknown.register_autograd(
    lambda ctx, grad: (grad, grad, grad), setup_context=lambda ctx, inputs, output: None
)

_UNRECOGNISED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "linear": lambda q, k, v: F.elu(q) @ (F.elu(k).mT @ v),
    "operator": _unknown,
    "scan": lambda q, k, v: q * (k * v).cumsum(-2),
}


class _Two(nn.Module):
    """A layer of attention, and one of something like it."""

    def __init__(self, attend: Callable[..., Tensor], beside: bool) -> None:
        super().__init__()
        self.first, self.second, self.o = Attention(), Attention(), linear()
        self.attend, self.beside = attend, beside

    def forward(self, x: Tensor) -> Tensor:
        if self.beside:
            x = x + self.first(x)
        h = self.second.norm(x)
        q, k, v = map(split_heads, (self.second.q(h), self.second.k(h), self.second.v(h)))
        return (x + self.o(join_heads(self.attend(q, k, v)))).square().mean()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("how", _UNRECOGNISED)
def test_attention_that_is_not_recognised_is_reported(how: str, beside: bool) -> None:
    found = look(_Two(_UNRECOGNISED[how], beside), example())
    assert {found.reasons.get(f"second.{name}") for name in QKV} == {"UNCLEAR_TARGET"}
    assert ("attention" in found.reasons) != beside
    assert found.compressed == ({f"first.{name}" for name in QKV} if beside else set())


class _Away(Attention):
    """The queries leave the graph, for attention in another one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.o(x))
        return torch.cat([self.q(h), self.k(h), self.v(h)], -1)


def test_projections_whose_attention_is_in_another_graph_are_reported() -> None:
    found = look(_Away(o=linear()), example())
    assert {found.reasons.get(name) for name in QKV} == {"UNCLEAR_TARGET"}


@torch.library.custom_op("pamm_testing::linear", mutates_args=())
def _fast_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.mT


_fast_linear.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)))
_fast_linear.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[0], grad.flatten(0, 1).mT @ grad.flatten(0, 1)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


class _Fast(Attention):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (split_heads(_fast_linear(h, p.weight)) for p in (self.q, self.k, self.v))
        return attend(q, k, v).square().mean()


def test_weights_of_operators_that_are_no_matmuls_are_reported() -> None:
    assert look(_Fast(), example()).reasons == dict.fromkeys(QKV, "NOT_A_PROJECTION")


class _Positions(Attention):
    """Positions are a projection of what the graph computes from nothing."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(x.shape[1])[:, None] / torch.arange(1, x.shape[2] + 1)
        return super().forward(x + self.positions(table.sin()))


def test_projections_of_what_no_input_enters_are_reported() -> None:
    found = look(_Positions(positions=linear()), example(), "linear=pamm:4")
    assert found.compressed == QKV
    assert found.reasons == {"positions.weight": "LEARNED_INPUT"}


class _Scaled(torch.autograd.Function):
    """A base that is not trained, by two scales, with gradients of its own making."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(base, rows, columns)
        return rows[:, :, None] * base * columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:  # type: ignore[override]
        base, rows, columns = ctx.saved_tensors
        of_rows = torch.einsum("kbj,kvj,bj->kb", grad, base, columns)
        return None, of_rows, torch.einsum("kbj,kvj,kb->bj", grad, base, rows)


class _Computed(nn.Module):
    def __init__(self, *, eager: bool) -> None:
        super().__init__()
        self.register_buffer("base", torch.randn(4, 1, 16))
        self.rows, self.columns = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 16))
        self.eager = eager

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.base, self.rows, self.columns)
        made = _Scaled.apply(*weights) if self.eager else self.rows[:, :, None] * self.base
        return F.linear(x, (made if self.eager else made * self.columns).flatten(end_dim=1))


@pytest.mark.parametrize("eager", [True, False], ids=["autograd function", "operators"])
def test_every_scale_of_a_computed_weight_is_named(eager: bool) -> None:
    found = look(_Computed(eager=eager), {"x": torch.randn(8, 16)}, "linear=pamm:4")
    assert found.reasons == {"rows": "COMPUTED_WEIGHT", "columns": "COMPUTED_WEIGHT"}


class _Table(nn.Module):
    """A table of positions, multiplied behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.query = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(torch.arange(x.shape[0]).clamp(max=5))
        torch._dynamo.graph_break()
        return self.query(x) @ rows.T


def test_a_table_that_is_multiplied_in_another_graph_is_reported() -> None:
    backend = pamm_compile.backend(rules="linear=pamm:4", min_tokens=1, base="aot_eager")
    torch.compile(_Table(), backend=backend)(torch.randn(8, 16)).sum().backward()
    (note,) = [note for note in backend.report.notes if note.what == "table.weight"]
    assert note.reason == "PROJECTION_IN_ANOTHER_GRAPH"
    assert "alone leaves the graph" in str(note)
