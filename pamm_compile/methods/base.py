"""What a method is: how an input of projections is stored, and weight gradients are made from it.

A method is plain PyTorch. It never sees a graph: the pass traces `store` into the forward pass and
`weight_gradients` into the backward pass, for whatever it finds.

    forward:   X ── store(X, seed, outputs) ── stored                         saved, in place of X
    backward:  stored, [dZ_1 … dZ_p] ── weight_gradients ── [dW_1 … dW_p]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from pamm_compile.size import Cost, Size

TOGETHER = 2**28
"""Bytes of weight gradients that are copied to be remembered together, at most."""


@runtime_checkable
class Method(Protocol):
    """How an input X [b, n] is stored, and its weight gradients are made.

    Frozen dataclasses of plain values make good methods: what is traced may depend on nothing but
    their fields and the arguments.
    """

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced, as text; part of every cache key."""
        ...

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return what is saved for the backward pass in place of an input.

        Traced with fake tensors whose sizes may be symbolic: no data-dependent control flow.

        Args:
            x: [b, n], floating point, b ≥ 1.
            seed: 0-dimensional int64 tensor in [0, 2³¹), of this site and these activations.
            outputs: m_p, columns of each projection's output.

        Returns:
            At least one tensor. NaN and Inf in `x` must reach the weight gradients.
        """
        ...

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return the weight gradients of all projections that read one stored input.

        Equivalent to, with X̂ the input that `stored` stands for: `[g.T @ X̂ for g in grads]`, and
        `X̂.T @ g` where transposed.

        Args:
            stored: what `store` returned.
            grads: dZ_p, [b, m_p] each.
            transposed: per projection, whether the gradient is wanted as [n, m_p], not [m_p, n].

        Returns:
            One matrix per projection.
        """
        ...

    def stored_bytes(self, size: Size) -> int:
        """Return the bytes of what `store` returns."""
        ...

    def cost(self, size: Size) -> Cost:
        """Return what `store` and `weight_gradients` together cost."""
        ...

    def describe(self, size: Size) -> str:
        """Return what a report shows of this site in a few characters, such as "k = 64"."""
        ...


@runtime_checkable
class Remembering(Method, Protocol):
    """A method that may remember something of one step's weight gradients for the next steps.

        backward of every T-th step:   dW_1 … dW_p ── remember ── memory
                                       dW_p, memory ── lost ── what the steps between add
        the steps between:             X, memory ── store_along ── stored
                                       stored, memory, [dZ] ── weight_gradients_along ── [dW]
                                       dW_p, lost ── restored ── the gradient that optimizers see

    `store` and `weight_gradients` are those of the first steps, of every T-th, and of sites whose
    weight gradients nobody can show; a report gives their bytes, which are the most that any step
    keeps. Two graphs are compiled, and a backend calls one or the other.
    """

    every: int
    """T, backward passes from one that is remembered to the next."""
    warmup: int
    """Backward passes at the start that are all as those that are remembered, at least 1."""

    def directions(self, features: int, outputs: Sequence[int]) -> int:
        """Return the rows of the memory, [rows, n]; 0 where nothing is to be remembered."""
        ...

    def remembered_bytes(self, size: Size) -> int:
        """Return the bytes of the memory and of all that is lost, which are held all the time."""
        ...

    def remember(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the memory, [rows, n], float32; run eagerly, outside of any graph.

        Args:
            gradients: dW_p, [m_p, n], summed over all sites that share these weights; or those of
                s sites that are alike, [s, m_p, n], of which the memory is [s, rows, n].
        """
        ...

    def lost(self, gradient: Tensor, memory: Tensor) -> Tensor | None:
        """Return what the steps between are to add to theirs; None where that is nothing.

        Args:
            gradient: dW_p, [m_p, n], of which `memory` was made; not necessarily finite.
            memory: what `remember` returned.
        """
        ...

    def restored(self, gradient: Tensor, lost: Tensor) -> Tensor:
        """Return a gradient of a step between with what is added to it.

        Args:
            gradient: of any shape.
            lost: what `lost` returned, in this shape.
        """
        ...

    def store_along(self, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        """Return what is saved for the backward pass, as `store` does, the memory aside."""
        ...

    def weight_gradients_along(
        self,
        stored: Sequence[Tensor],
        memory: Tensor,
        grads: Sequence[Tensor],
        transposed: Sequence[bool],
    ) -> list[Tensor]:
        """Return the weight gradients as `weight_gradients` does, of what `store_along` saved."""
        ...
