"""A layer of attention with room for anything between its projections and its product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pamm_testing.forms import HEAD, split_heads
from pamm_testing.zoo import BATCH, LENGTH, WIDTH

QKV = {"q.weight", "k.weight", "v.weight"}


def example(width: int = WIDTH) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, LENGTH, width)}


def linear(m: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, m, bias=False)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(HEAD), dim=-1) @ v


class Attention(nn.Module):
    """Self-attention with room for anything between its projections and its product."""

    def __init__(self, between: Callable[..., Any] | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (linear() for _ in range(3))
        self.between = between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        projected = self.q(h), self.k(h), self.v(h)
        if self.between is not None:
            projected = self.between(self, h, *projected)
        return attend(*map(split_heads, projected)).square().mean()
