"""Matmuls with a parameter, written in the ways people write them.

Each is a `Product`, however it is written, so that a test can put another one in its place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Product(nn.Module):
    """x·Wᵀ + bias; `matrix()` is W as [m, n], whatever the parameters look like."""

    bias: nn.Parameter | None

    def matrix(self) -> Tensor:
        raise NotImplementedError


def weight_of(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(fan_in))


def bias_of(width: int, wanted: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(width) / 10) if wanted else None


class Dense(Product):
    def __init__(self, n: int, m: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight_of(m, n, fan_in=n), bias_of(m, bias)

    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv1D(Product):
    """GPT-2's: the weight is stored transposed."""

    def __init__(self, n: int, m: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight_of(n, m, fan_in=n), bias_of(m, bias)

    def matrix(self) -> Tensor:
        return self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Einsum(Product):
    """One weight [heads, n, head]."""

    def __init__(self, n: int, m: int, bias: bool, head: int) -> None:
        super().__init__()
        self.weight, self.bias = weight_of(m // head, n, head, fan_in=n), bias_of(m, bias)

    def matrix(self) -> Tensor:
        return self.weight.transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("bsn,hnd->bshd", x, self.weight).flatten(2)
        return out if self.bias is None else out + self.bias


class PerHead(nn.Module):
    """One small product for each head."""

    def __init__(self, n: int, m: int, bias: bool, head: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Dense(n, head, bias) for _ in range(m // head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class Rows(Product):
    """Some rows of a weight that several products share, as nn.MultiheadAttention has it."""

    def __init__(
        self, packed: nn.Parameter, packed_bias: nn.Parameter | None, start: int, end: int
    ) -> None:
        super().__init__()
        self.weight, self.packed_bias, self.rows = packed, packed_bias, slice(start, end)

    @property
    def bias(self) -> Any:
        return None if self.packed_bias is None else self.packed_bias[self.rows]

    def matrix(self) -> Tensor:
        return self.weight[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[self.rows], self.bias)


class Concatenated(Product):
    """Several weights, one matmul."""

    def __init__(self, n: int, widths: list[int]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight_of(m, n, fan_in=n) for m in widths)
        self.bias = None

    def matrix(self) -> Tensor:
        return torch.cat(list(self.weights))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat(list(self.weights)))


class LoRA(nn.Module):
    """A frozen product with a trained low-rank addition."""

    def __init__(self, base: Dense, dropout: float) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        self.a, self.b = Dense(n, 2, False), Dense(2, m, False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(F.dropout(x, self.dropout)))
