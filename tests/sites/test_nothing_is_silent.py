"""What is said of weights that nothing can be done about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pamm_testing.attention import QKV, Attention, attend, example, linear
from pamm_testing.forms import join_heads, split_heads
from pamm_testing.graphs import look
from torch import Tensor, nn
from torch.nn import functional as F


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
