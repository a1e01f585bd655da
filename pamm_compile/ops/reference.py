"""PAMM in plain PyTorch: the kernels that run where no Triton template does, and the tests' oracle.

Both functions go over the tokens in tiles, so that the b×k score matrix never exists whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of the widest temporary: 64 MiB in fp32, past which larger tiles gain nothing.
_TILE_ELEMENTS = 1 << 24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic on tensors of `dtype` is carried out in.

    Equivalent to: `torch.float64 if dtype == torch.float64 else torch.float32`.

    Args:
        dtype: a floating-point dtype.

    Returns:
        `torch.float64` for `torch.float64`, `torch.float32` for every other.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(rows: int, row_elements: int) -> range:
    return range(0, rows, max(1, _TILE_ELEMENTS // max(1, row_elements)))


def assign(
    x: Tensor, generators: Tensor, index_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Represent every row of `x` by a multiple of the generator closest to it in |cosine|.

    Equivalent to, for finite rows and non-zero generators:

        dot = x.float() @ generators.float().T
        index = (dot.abs() / generators.float().norm(dim=1)).argmax(dim=1)
        best = dot.gather(1, index[:, None])[:, 0]
        scale = best / generators.float().norm(dim=1)[index] ** 2
        cosine = best / (x.float().norm(dim=1) * generators.float().norm(dim=1)[index])

    Ties go to the lowest index. A generator whose norm is zero or not finite is chosen only if
    all are such; then scale and cosine are 0. A zero row gets scale 0 and cosine 1 (0·C is exactly
    it). A row whose norm is not finite gets scale and cosine NaN, which the weight gradient then
    shows.

    Args:
        x: [b, n], floating point.
        generators: [k, n], same dtype; need not be rows of `x`.
        index_dtype: integer dtype that holds k - 1.

    Returns:
        index: [b], `index_dtype`, in [0, k).
        scale: [b], dtype of `x`; α, such that x[i] ≈ scale[i] · generators[index[i]].
        cosine: [b], float32 (float64 for float64 input), in [-1, 1] up to rounding.

    Source: arXiv 2506.02939 §3, Lemma 1 and Algorithm 1.
    """
    compute = accumulation_dtype(x.dtype)
    c = generators.to(compute)
    squares = c.square().sum(dim=1)
    usable = (squares > 0) & squares.isfinite()
    inverse = torch.where(usable, squares.rsqrt(), 0)

    index = torch.empty(x.shape[0], dtype=index_dtype, device=x.device)
    scale = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    cosine = torch.empty(x.shape[0], dtype=compute, device=x.device)
    tiles = _tiles(x.shape[0], max(x.shape[1], c.shape[0]))
    for start in tiles:
        rows = slice(start, start + tiles.step)
        tile = x[rows].to(compute)
        dot = tile @ c.T
        score = torch.where(usable, dot.abs() * inverse, -1)
        nearest = score.argmax(dim=1)
        best = dot.gather(1, nearest[:, None])[:, 0]
        near = inverse[nearest]
        norm = tile.square().sum(dim=1).sqrt()

        alpha = torch.where(usable[nearest], best * near * near, 0)
        cos = torch.where(usable[nearest], best * near / norm, 0)
        finite = norm.isfinite()
        nan = float("nan")
        # argmax may land on a NaN column for a non-finite row; 0 keeps the index meaningful.
        index[rows] = torch.where(finite, nearest, 0).to(index_dtype)
        scale[rows] = torch.where(finite, torch.where(norm > 0, alpha, 0), nan).to(x.dtype)
        cosine[rows] = torch.where(finite, torch.where(norm > 0, cos, 1), nan)
    return index, scale, cosine


def contract(index: Tensor, scale: Tensor, grads: Sequence[Tensor], num_generators: int) -> Tensor:
    """Sum the scaled output gradients of the tokens that share a generator.

    Equivalent to:

        grad = torch.cat(grads, dim=1).float()
        out = torch.zeros(num_generators, grad.shape[1])
        out.index_add_(0, index.long(), scale.float()[:, None] * grad)

    Args:
        index: [b], integer, in [0, k).
        scale: [b], floating point; α, any correction folded in.
        grads: output gradients, [b, m_p] each, all of one dtype.
        num_generators: k.

    Returns:
        [k, Σ m_p], float32 (float64 for float64 gradients): B̃ of the paper. NaN and Inf in scale
        or in a gradient come through, also where the scale is 0.

    Source: arXiv 2506.02939 §3, Algorithm 2.
    """
    compute = accumulation_dtype(grads[0].dtype)
    widths = [grad.shape[1] for grad in grads]
    out = torch.zeros(num_generators, sum(widths), dtype=compute, device=index.device)
    long_index = index.long()
    alpha = scale.to(compute)
    first = 0
    for grad, width in zip(grads, widths, strict=True):
        tiles = _tiles(grad.shape[0], width)
        for start in tiles:
            rows = slice(start, start + tiles.step)
            # Accumulating index_put sorts on GPUs, where index_add would use atomics.
            out[:, first : first + width].index_put_(
                (long_index[rows],), alpha[rows, None] * grad[rows].to(compute), accumulate=True
            )
        first += width
    return out
