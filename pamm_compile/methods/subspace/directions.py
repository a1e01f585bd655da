"""The directions along which most of an input lies, found on some of its rows."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from pamm_compile.methods.draws import sample_rows
from pamm_compile.methods.sampling import site_seed

# Of the Gram matrix's trace: what has less of it is lost in its rounding anyway.
_SHIFT = {torch.float64: 1e-12, torch.float32: 1e-5}
_TINY = 1e-30
_NO_ROW = 2**30
"""A number of none of the sampled rows, whose weights are hashes of theirs."""


def principal_directions(x: Tensor, r: int, seed: Tensor, *, rows: int, iterations: int) -> Tensor:
    """Return orthonormal rows that span most of what sampled rows of an input hold.

    Equivalent to, with S = x[rows] and random weights, the rows of S summed in r groups by them,
    orthonormalised; then `iterations` times: Q Sᵀ S, orthonormalised. Where the sampled rows span
    fewer than r directions, what is left over is shorter than 1, down to 0: Q Qᵀ ≤ I always.

    Args:
        x: [b, n], floating point.
        r: directions, at most n.
        seed: 0-dimensional int64 tensor in [0, 2³¹).
        rows: sampled rows a direction; as many as x has at most, from b = 2r on.
        iterations: at least 0.

    Returns:
        Q, [r, n], float32, or float64 if x is. Of a 16-bit x the iterations multiply in bfloat16.
    """
    return _orthonormal(_span(x, r, seed, rows, iterations))


def drawn_directions(
    x: Tensor, r: int, seed: Tensor, *, candidates: int, rows: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return r of so many principal directions, drawn, and by what to multiply coefficients.

    Args:
        x: as in `principal_directions`; so are seed, rows, of a candidate, and iterations.
        r: fewer than the candidates.
        candidates: at most n.

    Returns:
        Q, [r, n], orthonormal rows or shorter, and weights of at least 1, [r].
    """
    # An iteration begins with what is orthonormal and squares sizes; sums of rows do not.
    power = 2 if iterations else 1
    return draw(_span(x, candidates, seed, rows, iterations), r, seed, power=power)


def draw(y: Tensor, r: int, seed: Tensor, *, power: int) -> tuple[Tensor, Tensor]:
    """Return r of the principal axes of some rows, drawn, and what their odds divide.

    Equivalent to, but that draws are spread evenly, so that they are r:

        _, sizes, axes = torch.linalg.svd(y)
        odds = min(1, sizes ** (1 / power) / t), with t such that they sum to r
        return axes[draws], 1 / odds[draws]

    The expectation of Qᵀ diag(1 / odds) Q is the projection on what `y` spans.

    Args:
        y: [m, n].
        r: fewer than m.
        seed: 0-dimensional int64 tensor in [0, 2³¹).
        power: of what they are the principal axes of, which the rows are.

    Returns:
        Q, [r, n], and weights of at least 1, [r], both in the dtype of `y`.

    Source: sampling in proportion to size, with systematic draws (W. G. Madow, 1949).
    """
    z = y.to(_wide(y))
    m, gram = len(z), z @ z.T
    # LAPACK refuses what is not finite, which `z` then hands on to the gradients.
    identity = torch.eye(m, dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(torch.where(gram.isfinite().all(), gram, identity))
    values, axes = values.flip(0).clamp(min=0), vectors.flip(1).T
    shift = _SHIFT[z.dtype] * values.sum() + _TINY
    # Of nothing at all every direction is as good as another.
    odds = _odds((values + shift) ** (0.5 / power), r)
    start = site_seed(seed, _NO_ROW).to(odds.dtype) * 2.0**-31
    places = torch.arange(r, device=y.device) + start
    # Directions are intervals as long as their odds, end to end, and a place draws the one that it
    # is in. In numbers: with indices or padded masks Inductor makes C++ that does not compile.
    ends = functional.pad(odds.cumsum(0)[:-1], (0, 1), value=math.inf)
    passed = (ends <= places[:, None]).to(odds.dtype)
    pick = functional.pad(passed[:, :-1], (1, 0), value=1.0) - passed
    kept = (pick / (values + shift).sqrt()) @ axes @ z
    return kept.to(y.dtype), (1 / (pick @ odds)).to(y.dtype)


def _span(x: Tensor, count: int, seed: Tensor, rows: int, iterations: int) -> Tensor:
    """Return so many rows that span what `principal_directions` does, not yet orthonormal."""
    tokens = x.shape[0]
    if isinstance(tokens, int):
        # Two of each at least, so that no row can be missed where there are fewer than directions.
        rows = min(rows, max(2, tokens // count))
    sampled = x[sample_rows(tokens, rows * count, seed, "stratified")]
    sampled = sampled if x.dtype == torch.float64 else sampled.float()
    # Squares of what is very large or very small would leave float32.
    peak = sampled.abs().amax()
    sampled = sampled / torch.where(peak > 0, peak, 1.0)
    # `seed & 0` makes this a function of memory: of an index alone it would take 32 bits on a GPU.
    number = torch.arange(rows * count, device=x.device) + (seed & 0)
    weight = site_seed(seed, cast(int, number)).to(sampled.dtype) * 2.0**-30 - 1
    span = (weight[:, None] * sampled).view(rows, count, x.shape[1]).sum(0)
    # Directions need not be exact, only orthonormal: rounding them adds less to the gradient's
    # error than 4-bit coefficients do, and float32 matmuls are what a GPU is slowest at.
    narrow = torch.bfloat16 if x.dtype.itemsize == 2 else sampled.dtype
    rounded = sampled.to(narrow)
    for _ in range(iterations):
        span = ((_orthonormal(span).to(narrow) @ rounded.T) @ rounded).to(sampled.dtype)
    return span


def _odds(sizes: Tensor, r: int) -> Tensor:
    """Return the odds of being among r drawn, by falling sizes: proportional to them, at most 1."""
    left = sizes.flip(0).cumsum(0).flip(0)
    places = torch.arange(len(sizes), device=sizes.device)
    # What would have more than its share of the places left is certain of one.
    certain = ((sizes * (r - places) > left) & (places < r)).sum()
    rest = left.gather(0, certain[None])
    return torch.where(places < certain, 1.0, (sizes * (r - certain) / rest).clamp(max=1.0))


def _wide(like: Tensor) -> torch.dtype:
    # No setting of matmuls' precision touches float64.
    return torch.float32 if like.device.type == "mps" else torch.float64


def _orthonormal(y: Tensor) -> Tensor:
    """Return rows that span what those of `y` span: L⁻¹ y, with L Lᵀ = y yᵀ + a little."""
    # float64 stands the squared condition of y.
    wide = _wide(y)
    z = y.to(wide)
    for _ in range(1 if wide == torch.float64 else 3):
        # The sum of squares is the trace of the Gram matrix.
        shift = _SHIFT[wide] * z.square().sum() + _TINY
        gram = z @ z.T + shift * torch.eye(z.shape[0], dtype=wide, device=z.device)
        factor = torch.linalg.cholesky_ex(gram).L
        z = torch.linalg.solve_triangular(factor, z, upper=False)
    return z.to(y.dtype)
