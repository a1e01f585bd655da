"""Small weights beside attention: relative positions, and kernels made for every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pamm_testing.attention import QKV, Attention, example, linear
from pamm_testing.forms import HEAD, split_heads
from pamm_testing.graphs import look
from pamm_testing.zoo import HEADS, LENGTH
from torch import Tensor, nn

# Sums ---------------------------------------------------------------------------------------------


def _buckets(q: Tensor, table: Tensor) -> Tensor:
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp(-2, 2) + 2
    return (q @ table[:5].mT).gather(-1, far.expand(*q.shape[:2], LENGTH, LENGTH))


def _by_token(q: Tensor, table: Tensor) -> Tensor:
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    return torch.einsum("bhtd,tsd->bhts", q, table[far])


def _slopes(q: Tensor, table: Tensor) -> Tensor:
    return (q @ table[:1].mT) * torch.arange(LENGTH)


_POSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "table": lambda q, table: q @ table.mT,
    "buckets": _buckets,
    "slopes": _slopes,
    "by_token": _by_token,
}


class _Relative(Attention):
    """What a small weight makes of the queries is added to the scores; a layer stands in front."""

    def __init__(self, positions: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(front=linear())
        self.table = nn.Parameter(torch.randn(LENGTH, HEAD))
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.front(x))
        q, k, v = map(split_heads, (self.q(h), self.k(h), self.v(h)))
        scores = q @ k.mT + self.positions(q, self.table)
        return (scores.softmax(-1) @ v).square().mean()


@pytest.mark.parametrize("how", _POSITIONS)
def test_positions_relative_to_the_queries(how: str) -> None:
    found = look(_Relative(_POSITIONS[how]), example(), "linear=pamm:4")
    assert found.compressed == QKV | {"front.weight"}
    assert found.reasons["table"] in ("SHARED_INPUT", "UNSUPPORTED_LAYOUT")
    assert found.held("qkv") == QKV


class _Kernels(Attention):
    """A softmax over columns of a weight, in front of a product of activations: no attention."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(torch.sin(x)).reshape(-1, 3, 1).softmax(1)
        values = (
            self.v(self.norm(x)).flatten(0, 1).unflatten(-1, (HEADS, -1, 1)).expand(-1, -1, -1, 3)
        )
        return (values.flatten(0, 1) @ kernel).square().mean()


def test_kernels_made_for_every_token_are_no_attention() -> None:
    found = look(_Kernels(kernel=linear(3 * HEADS)), example(), "linear=pamm:4")
    assert found.compressed == {"kernel.weight", "v.weight"}
    assert not found.held("qkv")


# Operands without a gradient ----------------------------------------------------------------------
