"""The sizes of one site, and what computing something for it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Size:
    """The sizes of one site, of symbolic shapes those that were compiled with."""

    tokens: int
    """b, rows of X."""
    features: int
    """n, columns of X."""
    outputs: tuple[int, ...]
    """m_p, columns of each projection's output whose weight gradient is made."""
    dtype: torch.dtype
    """Of X."""
    device: str = "cpu"
    """Type of the device that X is on."""
    symbolic: bool = False
    """Whether `tokens` varies from call to call of the compiled graph."""
    casts: int = 0
    """How many casts of X to float8 the exact weight gradients read; 0 if they read X itself."""
    scales: int = 0
    """How many scales these have, all together."""
    remade: bool = False
    """Whether the backward pass makes these casts again, of what is saved for other gradients."""
    scaled: bool = False
    """Whether the exact weight gradients are multiplied in float8."""
    alike: int = 1
    """Sites of these sizes and one method in the graph, this one among them."""

    @property
    def bytes(self) -> int:
        """Bytes of what is saved for the exact weight gradients: X, or its casts if less."""
        if self.remade:
            return 0
        entries = self.tokens * self.features
        own = entries * self.dtype.itemsize
        return min(own, entries * self.casts + 4 * self.scales) if self.casts else own


@dataclass(frozen=True)
class Cost:
    """What a method computes and moves for one site and one step, beyond the forward matmuls."""

    flops: int
    """Floating-point operations, a multiply-add counted as two."""
    bytes: int
    """Bytes read and written in main memory."""
    launches: int
    """Kernels, where each runs for itself."""
    wide_flops: int = 0
    """Of `flops`, those in float32 whatever the dtype of X: a device may be far slower at these."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.wide_flops + other.wide_flops,
        )


def exact_cost(size: Size) -> Cost:
    """Return what the exact weight gradients of a site cost, dW = dZᵀX for each projection."""
    b, n, m = size.tokens, size.features, sum(size.outputs)
    moved = len(size.outputs) * b * n + b * m + n * m
    return Cost(2 * b * n * m, moved * size.dtype.itemsize, len(size.outputs))
