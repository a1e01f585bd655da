"""Chains of the parts in `generated`, drawn by number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pamm_testing.generated import _PLAIN, PARTS, Part, Said, _Picked, _Tied


@dataclass
class Generated:
    """A module, its inputs, and what may be said of its weights."""

    parts: list[str]
    module: nn.Module
    batch: dict[str, Any]
    said: Said


class _Chain(nn.Module):
    def __init__(self, parts: list[Part], glue: list[str], n: int, classes: int) -> None:
        super().__init__()
        self.parts, self.glue = nn.ModuleList(parts), glue
        self.head = nn.Linear(n, classes)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        for part, glue in zip(self.parts, self.glue, strict=True):
            h = F.layer_norm(x, x.shape[-1:]) if "norm" in glue else x
            more = (numbers,) if isinstance(part, _Picked | _Tied) else ()
            y = part(h, *more)
            x = x + y if "residual" in glue else y
        return self.head(x).square().mean()


def generate(seed: int) -> Generated:
    """Return the module of a number, the same every time."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    n, length, batch = draw.choice([8, 16, 24]), draw.choice([6, 10, 13]), draw.choice([2, 3])
    # Every kind in turn, and a neighbour.
    names = list(PARTS)
    chosen = [names[seed % len(names)], *draw.sample(names, draw.choice([0, 1]))]
    draw.shuffle(chosen)
    parts = [PARTS[name](n, length, draw) for name in chosen]
    glue = [draw.choice(["", "norm", "residual", "norm residual"]) for _ in parts]
    module = _Chain(parts, glue, n, draw.choice([3, n]))
    said: Said = {"head.weight": _PLAIN | {"NARROW_INPUT"}}
    for number, part in enumerate(parts):
        said |= {f"parts.{number}.{name}": reasons for name, reasons in part.said.items()}
    inputs = {
        "x": torch.randn(batch, length, n).requires_grad_(draw.random() < 0.5),
        "numbers": torch.randint(0, 3 * n, (batch, n)),
    }
    parts_ = [f"{name} {how}" for name, how in zip(chosen, glue, strict=True)]
    return Generated(parts_, module, inputs, said)
