"""Variants of `Subspace` and `Pamm` that one number of bytes can buy.

The package's own methods run as they are. Variants share the directions of `Subspace`
(`principal_directions`) and code the coefficients here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pamm_compile import Pamm, Subspace
from pamm_compile.methods.base import Method
from pamm_compile.methods.subspace.directions import principal_directions

STORED = torch.bfloat16
"""What the bytes are counted for."""
_BLOCK = 256

Estimate = Callable[[Sequence[Tensor]], list[Tensor]]
"""Makes dW of every dZ."""


def fit(price: float, available: float) -> int:
    """Return how many directions or generators fit, at least 1."""
    return max(1, int(available / price))


def codes(a: Tensor, bits: int, how: str, block: int, draw: torch.Generator) -> Tensor:
    """Return coefficients as their codes stand for them.

    Args:
        a: [b, r].
        bits: of a code.
        how: "dithered", "near" or "stochastic".
        block: tokens that share a scale.
        draw: what is random.
    """
    tokens, r = a.shape
    half = 2 ** (bits - 1)
    padded = nn.functional.pad(a.abs(), (0, 0, 0, -tokens % block)).view(-1, block, r)
    limit = half - 0.5 if how == "dithered" else half - 1
    scale = (padded.amax(1) / limit).to(STORED).float() * (1 + 2**-7)
    step = scale.repeat_interleave(block, 0)[:tokens].clamp(min=1e-30)
    if how == "near":
        return (a / step).round() * step
    u = torch.rand(a.shape, generator=draw)
    if how == "stochastic":
        return (a / step + u).floor() * step
    return ((a / step + u).floor() + 0.5 - u) * step


def directions(x: Tensor, r: int, draw: torch.Generator, rows: int, iterations: int) -> Tensor:
    """Return the package's directions, rounded to 8 bits as it stores them."""
    seed = torch.randint(2**31, (), generator=draw)
    basis = principal_directions(x, min(r, x.shape[1]), seed, rows=rows, iterations=iterations)
    return eight_bits(basis)


def eight_bits(basis: Tensor) -> Tensor:
    scale = (basis.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (basis / scale).round() * scale


class Variants:
    """Every method of the study for one number of bytes.

    Args:
        available: bytes a token.
        tokens: b.
        features: n of the inputs that the bytes are counted for.
    """

    def __init__(self, available: float, tokens: int, features: int) -> None:
        self.available = available
        self.tokens = tokens
        self.features = features
        # An 8-bit basis and its scale.
        self.basis = (features + 4) / tokens

    def subspace(
        self, bits: int = 4, lead: float = 0.0, block: int = _BLOCK, left: float = 0
    ) -> int:
        price = bits / 8 + lead * (1 - bits / 8) + 2 / block + self.basis
        return fit(price, self.available - left)

    def methods(self) -> dict[str, Callable[[Tensor, Tensor, torch.Generator], Estimate]]:
        """Return what makes an estimate of an input X, and of X some steps before."""
        r = self.subspace()
        of: dict[str, Callable[[Tensor, Tensor, torch.Generator], Estimate]] = {}
        generators = fit(2 * self.features / self.tokens, self.available - 3)
        of[f"Pamm k={generators}"] = lambda x, _, g: _shipped(
            Pamm(max(1.0, x.shape[0] / generators)), x, g
        )
        of[f"Subspace r={r}"] = lambda x, _, g: _shipped(Subspace(r), x, g)
        eight = self.subspace(bits=8)
        of[f"Subspace r={eight}, 8 bits"] = lambda x, _, g: _shipped(Subspace(eight, bits=8), x, g)
        plain = fit(2 + 2 * self.features / self.tokens, self.available)
        of[f"Subspace r={plain}, bits=None"] = lambda x, _, g: _shipped(
            Subspace(plain, bits=None), x, g
        )
        for rows, iterations in ((2, 1), (4, 1), (8, 0), (8, 1), (8, 2), (16, 0), (16, 2), (32, 1)):
            shipped = Subspace(r, rows=rows, iterations=iterations)
            of[f"Subspace r={r}, rows={rows}, iterations={iterations}"] = (
                lambda x, _, g, shipped=shipped: _shipped(shipped, x, g)
            )
        for how in ("near", "stochastic"):
            of[f"r={r}, {how}"] = lambda x, _, g, how=how: self._coded(x, x, r, g, how=how)
        for block in (32, 64, 128, 512, 0):
            fitting = self.subspace(block=block or self.tokens)
            name = f"block={block}" if block else "column"
            of[f"r={fitting}, {name}"] = lambda x, _, g, block=block, fitting=fitting: self._coded(
                x, x, fitting, g, block=block or x.shape[0]
            )
        for lead in (0.125, 0.25):
            fitting = self.subspace(lead=lead)
            of[f"r={fitting}, lead={lead}"] = lambda x, _, g, lead=lead, fitting=fitting: (
                self._coded(x, x, fitting, g, lead=round(lead * fitting))
            )
        three = self.subspace(bits=3)
        of[f"r={three}, 3 bits"] = lambda x, _, g: self._coded(x, x, three, g, bits=3)
        for damp in (0.0, 0.5, 1.0):
            of[f"r={r}, tail=0.125, damp={damp}"] = lambda x, _, g, damp=damp: self._tail(
                x, r, max(1, r // 8), damp, g
            )
        for share in (1.5, 2.0):
            of[f"r={r}, lottery={share}"] = lambda x, _, g, share=share: self._lottery(
                x, r, min(x.shape[1], int(share * r)), g
            )
        for k in (8, 16):
            left = 2 * k * self.features / self.tokens + 3
            if self.available > 2 * left:
                fitting = self.subspace(left=left)
                of[f"r={fitting}, pamm={k}"] = lambda x, _, g, k=k, fitting=fitting: self._rest(
                    x, fitting, k, g
                )
        of[f"r={r}, stale"] = lambda x, before, g: self._coded(x, before, r, g)
        return of

    def _coded(
        self,
        x: Tensor,
        of: Tensor,
        r: int,
        draw: torch.Generator,
        *,
        bits: int = 4,
        how: str = "dithered",
        block: int = _BLOCK,
        lead: int = 0,
    ) -> Estimate:
        basis = directions(of, r, draw, 16, 1)
        a = x @ basis.T
        parts = [codes(a[:, :lead], 8, how, block, draw)] if lead else []
        parts.append(codes(a[:, lead:], bits, how, block, draw))
        return _product(torch.cat(parts, 1), basis)

    def _tail(self, x: Tensor, r: int, random: int, damp: float, draw: torch.Generator) -> Estimate:
        first = directions(x, r - random, draw, 16, 1)
        rest = torch.randn(random, x.shape[1], generator=draw)
        rest = torch.linalg.qr((rest - rest @ first.T @ first).T).Q.T
        basis = torch.cat([first, eight_bits(rest)])
        a = codes(x @ basis.T, 4, "dithered", _BLOCK, draw)
        a[:, r - random :] *= ((x.shape[1] - r + random) / random) ** damp
        return _product(a, basis)

    def _lottery(self, x: Tensor, r: int, candidates: int, draw: torch.Generator) -> Estimate:
        basis = directions(x, candidates, draw, 16, 1)
        # Rotated to the principal axes of X within their span, whose sizes set the odds.
        _, sizes, axes = torch.linalg.svd(x @ basis.T, full_matrices=False)
        basis = axes @ basis
        odds = torch.zeros_like(sizes)
        certain = torch.zeros_like(sizes, dtype=torch.bool)
        for _ in range(candidates):
            scaled = sizes * (r - certain.sum()) / sizes[~certain].sum().clamp(min=1e-30)
            odds = torch.where(certain, 1.0, scaled)
            if not (odds > 1).any():
                break
            certain |= odds >= 1
        place = odds.cumsum(0) - torch.rand((), generator=draw)
        drawn = place.floor() != (place - odds).floor()
        basis = eight_bits(basis[drawn])
        return _product(codes(x @ basis.T, 4, "dithered", _BLOCK, draw) / odds[drawn], basis)

    def _rest(self, x: Tensor, r: int, k: int, draw: torch.Generator) -> Estimate:
        basis = directions(x, r, draw, 16, 1)
        a = codes(x @ basis.T, 4, "dithered", _BLOCK, draw)
        first = _product(a, basis)
        rest = _shipped(Pamm(max(1.0, x.shape[0] / k)), x - a @ basis, draw)
        return lambda grads: [p + q for p, q in zip(first(grads), rest(grads), strict=True)]


def _product(a: Tensor, basis: Tensor) -> Estimate:
    return lambda grads: [dz.T @ a @ basis for dz in grads]


def _shipped(method: Method, x: Tensor, draw: torch.Generator) -> Estimate:
    # In float32, where a CPU is fast; the bytes are those of bfloat16.
    seed = torch.randint(2**31, (), generator=draw)
    stored = method.store(x, seed, (4 * x.shape[1],))
    return lambda grads: method.weight_gradients(stored, grads, [False] * len(grads))
