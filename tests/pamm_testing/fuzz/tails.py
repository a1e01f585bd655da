"""What stands behind the blocks of a random transformer: other ways to multiply by a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pamm_testing.fuzz.products import Dense, Product, weight_of


class Picked(Product):
    """Every second row of a weight, picked by a buffer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.bias = weight_of(2 * n, n, fan_in=n), None
        self.register_buffer("numbers", torch.arange(0, 2 * n, 2))

    def matrix(self) -> Tensor:
        return self.weight[self.numbers]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[self.numbers])


class Columns(Dense):
    """W @ X, tokens in columns."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n, False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.flatten(0, 1).mT).mT.unflatten(0, x.shape[:2])


class Tail(nn.Module):
    """Adds to a stream what one kind of product makes of it."""

    def __init__(self, kind: str, n: int) -> None:
        super().__init__()
        self.kind = kind
        self.w: nn.Parameter | None = None
        """A weight that is multiplied with in a way of its own."""
        sizes = _SIZES[kind](n)
        self.layers = nn.ModuleList(Dense(*size, False) for size in sizes)
        if kind == "picked":
            self.layers.append(Picked(n))
        if kind == "columns":
            self.layers.append(Columns(n))
        if kind in ("latents", "modulated", "bank"):
            shape = {"latents": (3, n), "modulated": (n, n), "bank": (2, n, n)}[kind]
            self.w = weight_of(*shape, fan_in=n)

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, f"_{self.kind}")(x, *self.layers)

    def _pool(self, x: Tensor, a: nn.Module, b: nn.Module, score: nn.Module) -> Tensor:
        weights = score(torch.tanh(a(x)) * torch.sigmoid(b(x))).softmax(1)
        return (weights.mT.to(x.dtype) @ x).mean(1, keepdim=True)

    def _latents(self, x: Tensor, key: nn.Module, value: nn.Module) -> Tensor:
        query = self.w.expand(len(x), -1, -1)
        weights = (query @ key(x).mT).softmax(-1)
        return (weights.to(x.dtype) @ value(x).to(x.dtype)).mean(1, keepdim=True)

    def _slots(self, x: Tensor, scores: nn.Module) -> Tensor:
        s = scores(x)
        return s.softmax(-1).to(x.dtype) @ (s.softmax(1).mT.to(x.dtype) @ x)

    def _kernel(self, x: Tensor, kernel: nn.Module) -> Tensor:
        windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)
        return (windows @ kernel(x).softmax(-1).to(x.dtype)[..., None])[..., 0]

    def _modulated(self, x: Tensor, style: nn.Module) -> Tensor:
        return x @ (self.w * style(x.mean(1))[:, None]).to(x.dtype).mT

    def _bank(self, x: Tensor, gate: nn.Module) -> Tensor:
        weights = gate(x.mean(1)).softmax(-1)[..., None, None]
        return x @ (weights * self.w).sum(1).to(x.dtype).mT

    def _codes(self, x: Tensor, codes: nn.Module) -> Tensor:
        far = codes.weight.square().sum(-1) - 2 * codes(x)
        return codes.weight[far.argmin(-1)]

    def _picked(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    _columns = _picked

    def _narrow(self, x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
        return up(F.gelu(down(x)))


_SIZES: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "pool": lambda n: [(n, n), (n, n), (n, 2)],
    "latents": lambda n: [(n, n), (n, n)],
    "slots": lambda n: [(n, 4)],
    "kernel": lambda n: [(n, 3)],
    "modulated": lambda n: [(n, n)],
    "bank": lambda n: [(n, 2)],
    "codes": lambda n: [(n, 7)],
    "picked": lambda n: [],
    "columns": lambda n: [],
    "narrow": lambda n: [(n, n // 2), (n // 2, n)],
}
