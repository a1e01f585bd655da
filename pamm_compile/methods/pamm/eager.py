"""PAMM in plain PyTorch: the kernels that run where no Triton template does, and the tests' oracle.

Both functions go over the tokens in tiles, so that the b×k score matrix never exists whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Elements of the widest temporary. 8 MiB in fp32 on a CPU: larger blocks leave the caches and are
# fetched from the system, page by page, anew for every tile. 64 MiB elsewhere: fewer launches.
_CPU_TILE_ELEMENTS = 1 << 21
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


def _tiles(device: torch.device, rows: int, row_elements: int, least: int = 1) -> range:
    elements = _CPU_TILE_ELEMENTS if device.type == "cpu" else _TILE_ELEMENTS
    return range(0, rows, max(least, elements // max(1, row_elements)))


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

    Ties go to the lowest index; the scores of equal generators tie as far as the matmul rounds
    their columns alike. A generator whose norm is zero or not finite is chosen only if
    all are such; then scale and cosine are 0. A zero row gets scale 0 and cosine 1 (0·C is exactly
    it). A row whose norm is not finite gets index 0 and scale and cosine NaN, which the weight
    gradient then shows.

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
    c = torch.where(usable[:, None], c, 0)
    lowest = usable.to(torch.uint8).argmax()

    index = torch.empty(x.shape[0], dtype=index_dtype, device=x.device)
    scale = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    cosine = torch.empty(x.shape[0], dtype=compute, device=x.device)
    tiles = _tiles(x.device, x.shape[0], max(x.shape[1], c.shape[0]))
    for start in tiles:
        rows = slice(start, start + tiles.step)
        tile = x[rows].to(compute)
        dot = tile @ c.T
        nearest = dot.abs().mul_(inverse).argmax(dim=1)
        best = dot.gather(1, nearest[:, None])[:, 0]
        # Where all scores are 0, argmax may land on a generator that is not usable.
        nearest = torch.where(best == 0, lowest, nearest)
        best = best * inverse[nearest]
        norm = torch.linalg.vector_norm(tile, dim=1)

        finite = norm.isfinite()
        nan = float("nan")
        alpha = torch.where(norm > 0, best * inverse[nearest], 0)
        cos = torch.where(norm > 0, best / norm, 1)
        # Where argmax lands among NaN scores is nobody's promise.
        index[rows] = torch.where(finite, nearest, 0).to(index_dtype)
        scale[rows] = torch.where(finite, alpha, nan).to(x.dtype)
        cosine[rows] = torch.where(finite, cos, nan)
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
    ends = list(accumulate(grad.shape[1] for grad in grads))
    out = torch.zeros(num_generators, ends[-1], dtype=compute, device=index.device)
    on_cpu = index.device.type == "cpu"
    least = 1
    if on_cpu:
        # Tiles bound the gradient's copy in `compute`, where there is one. Each is added to all of
        # `out`, which is to stay the smaller of the two.
        least = index.shape[0] if grads[0].dtype == compute else 4 * num_generators
    widest = max(grad.shape[1] for grad in grads)
    tiles = _tiles(index.device, index.shape[0], widest, least)
    for start in tiles:
        rows = slice(start, start + tiles.step)
        members, alpha = index[rows].long(), scale[rows].to(compute)
        if on_cpu:
            members, order = torch.sort(members, stable=True)
            alpha = alpha[order]
            bounds = torch.searchsorted(members, torch.arange(num_generators + 1))
        for grad, end in zip(grads, ends, strict=True):
            tile = grad[rows].to(compute)
            part = out[:, end - grad.shape[1] : end]
            if on_cpu:
                # Reads each gradient once; accumulating index_put is 20 times slower here, and
                # its order of summation changes from run to run.
                part += embedding_bag(
                    order,
                    tile,
                    bounds,
                    mode="sum",
                    per_sample_weights=alpha,
                    include_last_offset=True,
                )
            else:
                # Sorts on GPUs, where index_add would use atomics.
                part.index_put_((members,), alpha[:, None] * tile, accumulate=True)
    return out
