"""Estimators with an error of a known kind, and remedies for what `Subspace` leaves out.

Most store X̂ itself, dense, and count the bytes that a method would need that did better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from examples.studies.estimators import Estimator, gradients
from pamm_compile import Subspace
from pamm_compile.methods.sampling import site_seed
from pamm_compile.methods.subspace.directions import principal_directions
from pamm_compile.size import Size


def _draw(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


class Dense(Estimator):
    """What stores X̂ itself."""

    def approximate(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Tensor:
        """Return X̂ of an input [b, n]."""
        raise NotImplementedError

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return (self.approximate(x, seed, outputs),)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        return gradients(lambda grad: grad.T @ stored[0], grads, transposed)


class Noisy(Estimator):
    """The exact gradient and unbiased noise."""

    def length(self, exact: Tensor, grad: Tensor, x: Tensor, seed: Tensor) -> Tensor:
        """Return the root mean square of the noise in dZᵀX, which is `exact`."""
        raise NotImplementedError

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return x, seed

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        x, seed = stored
        draw = _draw(seed)

        def noisy(grad: Tensor) -> Tensor:
            exact = grad.T @ x
            noise = torch.randn(exact.shape, generator=draw)
            return exact + self.length(exact, grad, x, seed) * noise

        return gradients(noisy, grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return size.bytes


@dataclasses.dataclass(frozen=True)
class Noise(Noisy):
    """Noise whose length is a share of the gradient's."""

    share: float

    def length(self, exact: Tensor, grad: Tensor, x: Tensor, seed: Tensor) -> Tensor:
        return self.share * exact.square().mean().sqrt()


@dataclasses.dataclass(frozen=True)
class Unbiased(Noisy):
    """Noise as long as the error of r directions: the same error, without its direction."""

    r: int

    def length(self, exact: Tensor, grad: Tensor, x: Tensor, seed: Tensor) -> Tensor:
        basis = _directions(x, self.r, seed)
        return (exact - grad.T @ x @ basis.T @ basis).square().mean().sqrt()


@dataclasses.dataclass(frozen=True)
class Rounded(Dense):
    """X rounded stochastically, with one scale a token: unbiased, and nothing is left out."""

    bits: int

    def approximate(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Tensor:
        step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (self.bits - 1) - 1)
        return (x / step + torch.rand(x.shape, generator=_draw(seed))).floor() * step

    def stored_bytes(self, size: Size) -> int:
        return size.tokens * (size.features * self.bits // 8 + 2)


def _directions(x: Tensor, r: int, seed: Tensor) -> Tensor:
    """Return the rows of Q, as the package finds them."""
    return principal_directions(x, min(r, x.shape[1]), seed, rows=16, iterations=1)


class _Directions(Dense):
    """Counts the bytes of as many directions of `Subspace`; nothing is rounded here."""

    r: int

    def stored_bytes(self, size: Size) -> int:
        return Subspace(self.r).stored_bytes(size)


@dataclasses.dataclass(frozen=True)
class Tail(_Directions):
    """r directions, of which some are random ones of what the others leave over.

    Scaled by (features left over / random directions) ** damp: unbiased at 1, and at 0 what is
    least wrong in a single step.
    """

    r: int
    random: int
    damp: float = 0.0

    def approximate(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Tensor:
        first = _directions(x, self.r - self.random, seed)
        rest = torch.randn(self.random, x.shape[1], generator=_draw(site_seed(seed, 1)))
        rest = torch.linalg.qr((rest - rest @ first.T @ first).T).Q.T
        factor = ((x.shape[1] - len(first)) / self.random) ** self.damp
        return x @ first.T @ first + factor * (x @ rest.T @ rest)

    def stored_bytes(self, size: Size) -> int:
        # Random directions are made again in the backward pass.
        return Subspace(self.r).stored_bytes(size) - self.random * (size.features + 4)


@dataclasses.dataclass(frozen=True)
class Lottery(_Directions):
    """r of share · r directions, drawn with odds by their size, and reweighted: less bias."""

    r: int
    share: float = 2.0
    draws: int = 1
    """X̂ is their mean: less noise, the same bias, and more bytes than are counted."""

    def approximate(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Tensor:
        basis = _directions(x, int(self.share * self.r), seed)
        # Rotated to the principal axes of X within their span, whose sizes set the odds.
        _, sizes, axes = torch.linalg.svd(x @ basis.T, full_matrices=False)
        basis = axes @ basis
        certain = torch.zeros_like(sizes, dtype=torch.bool)
        odds = torch.ones_like(sizes)
        for _ in range(len(sizes)):
            left = sizes[~certain].sum().clamp(min=1e-30)
            odds = torch.where(certain, 1.0, sizes * (self.r - certain.sum()) / left)
            if not (odds > 1).any():
                break
            certain |= odds >= 1
        shifts = torch.rand(self.draws, 1, generator=_draw(site_seed(seed, 1)))
        place = odds.cumsum(0) - shifts
        drawn = (place.floor() != (place - odds).floor()).float().mean(0)
        return (x @ basis.T * (drawn / odds)) @ basis


@dataclasses.dataclass(frozen=True)
class Centred(_Directions):
    """The mean token exactly, and r directions of what tokens differ from it by."""

    r: int

    def approximate(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Tensor:
        mean = x.mean(0)
        basis = _directions(x - mean, self.r, seed)
        return mean + (x - mean) @ basis.T @ basis


@dataclasses.dataclass(frozen=True)
class Restored(_Directions):
    """r directions, and X̂ made as long as X."""

    r: int

    def approximate(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Tensor:
        basis = _directions(x, self.r, seed)
        found = x @ basis.T @ basis
        return found * (x.norm() / found.norm().clamp(min=1e-30))


@dataclasses.dataclass(frozen=True)
class Shares(Estimator):
    """The package's `Subspace`, of another rank for the input of every target.

    A share of the input's features; which target it is the sizes say.
    """

    qkv: float
    o: float
    gate_up: float
    down: float
    bits: Literal[4, 8] | None = 4
    candidates: float = 1.0
    rows: int = 16

    def of(self, features: int, outputs: Sequence[int]) -> Subspace:
        """Return the method of one input."""
        if features > max(outputs):
            share = self.down
        elif max(outputs) > features:
            share = self.gate_up
        else:
            share = self.qkv if len(outputs) > 1 else self.o
        return Subspace(
            max(1, round(share * features)),
            bits=self.bits,
            rows=self.rows,
            candidates=self.candidates,
        )

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return self.of(x.shape[1], outputs).store(x, seed, outputs)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        # What is stored says the rank.
        return Subspace(1, bits=self.bits).weight_gradients(stored, grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return self.of(size.features, size.outputs).stored_bytes(size)
