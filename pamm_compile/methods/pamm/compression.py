"""One projection input compressed, and the weight gradients made from it, as compositions.

The joint-graph pass traces these functions into the graph, the tests run them as they stand: what
is compiled and what is checked is the same text. Only `pamm::assign` and `pamm::contract` are
opaque; everything else here fuses into its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from pamm_compile.methods.pamm import operators

Sampling = Literal["stratified", "uniform"]

_MASK = 0x7FFFFFFF
_STRIDE = 0x1E3779B9
_FRACTION_BITS = 24
_PROBED_ROWS = 64
_PROBED_COLUMNS = 4
_BITS = {2: torch.int16, 4: torch.int32}


class Compressed(NamedTuple):
    """What is saved for the backward pass in place of an input X of shape [b, n]."""

    generators: Tensor
    """C, [k, n], dtype of X."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """f, [b], the generator of every token."""
    scale: Tensor
    """α with the gate ε and the correction β folded in, [b], dtype of X."""


def num_generators(
    tokens: int | torch.SymInt, ratio: Fraction, min_generators: int
) -> int | torch.SymInt:
    """Return how many generators represent `tokens` rows.

    Equivalent to: `min(tokens, max(min_generators, ceil(tokens / ratio)))`, also for a symbolic
    number of tokens.

    Args:
        tokens: b.
        ratio: b / k, at least 1.
        min_generators: lower bound, at least 1.

    Returns:
        k, in [1, b].

    Source: arXiv 2506.02939 §3.
    """
    k = (tokens * ratio.denominator + ratio.numerator - 1) // ratio.numerator
    if min_generators > 1:
        k = torch.sym_min(tokens, torch.sym_max(k, min_generators))
    return k


def _mix(h: Tensor) -> Tensor:
    # A 31-bit finaliser: products stay below 2⁶³, so int64 never overflows on any device.
    h = h ^ (h >> 16)
    h = (h * 0x045D9F3B) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x2C1B3C6D) & _MASK
    return h ^ (h >> 16)


def content_seed(x: Tensor, salt: int) -> Tensor:
    """Return a seed made of the bits of a few entries of `x`.

    Sampling is seeded by what it samples rather than by torch's generator: turning PAMM on then
    leaves the model's own random numbers (dropout masks) as they were, a recomputed or replicated
    X draws the same rows, and a resumed run needs no further state. Activations change from step
    to step, and with them the draw.

    Equivalent to: a 31-bit hash of `salt` and of 64 × 4 entries, `x[rows[:, None], columns]` with
    `rows = arange(64) * b // 64` and `columns = arange(4) * n // 4` (repeated where x is smaller).
    A change anywhere else leaves the draw as it was.

    Args:
        x: [b, n], floating point.
        salt: any non-negative integer below 2³¹; another salt, another draw.

    Returns:
        0-dimensional int64 tensor in [0, 2³¹).
    """
    probe = torch.arange(_PROBED_ROWS, device=x.device)[:, None]
    column = torch.arange(_PROBED_COLUMNS, device=x.device)
    entries = x[probe * x.shape[0] // _PROBED_ROWS, column * x.shape[1] // _PROBED_COLUMNS]
    # The low bits of a float64 would do for a hash, but are all zero where values are round.
    entries = entries.float() if x.dtype == torch.float64 else entries
    # 32 bits, not 31: the sign counts, and the first step of _mix folds it down.
    bits = entries.view(_BITS[entries.element_size()]).long() & 0xFFFFFFFF
    place = probe * _PROBED_COLUMNS + column
    return _mix((_mix(bits ^ _mix(place + 1)).sum() + _mix(place.new_full((), salt))) & _MASK)


def site_seed(seed: Tensor, number: int) -> Tensor:
    """Return a seed of its own for one of several sites that share a content seed.

    Equivalent to: a 31-bit hash of `seed` and `number`.

    Args:
        seed: 0-dimensional int64 tensor in [0, 2³¹).
        number: which site.

    Returns:
        0-dimensional int64 tensor in [0, 2³¹).
    """
    return _mix((seed + _STRIDE * (number + 1)) & _MASK)


def sample_rows(
    tokens: int | torch.SymInt, k: int | torch.SymInt, seed: Tensor, sampling: Sampling
) -> Tensor:
    """Draw the rows that become generators.

    Equivalent to, with u uniform in [0, 1):

        stratified: floor((arange(k) + u) * tokens / k)
        uniform:    randperm(tokens)[:k]

    Args:
        tokens: b.
        k: number of generators, in [1, b].
        seed: 0-dimensional int64 tensor in [0, 2³¹).
        sampling: "stratified" (one draw in each of k equal intervals) or "uniform" (the paper's).

    Returns:
        [k] int64, in [0, b); ascending and, where k divides b, distinct if stratified; distinct if
        uniform.

    Source: arXiv 2506.02939 Algorithm 1 for "uniform"; "stratified" is ours.
    """
    # torch's stubs know no SymInt here.
    tokens, k = cast(int, tokens), cast(int, k)
    if sampling == "uniform":
        keys = _mix((seed + _STRIDE * (torch.arange(tokens, device=seed.device) + 1)) & _MASK)
        return torch.topk(keys, k, sorted=False).indices
    j = torch.arange(k, device=seed.device)
    u = _mix((seed + _STRIDE * (j + 1)) & _MASK) >> (31 - _FRACTION_BITS)
    # floor((j + u)·b/k) in integers, split so that no product passes 2⁶³; j·b is not formed at all,
    # because Inductor computes functions of an index in 32 bits on a GPU.
    share, left = tokens // k, tokens % k
    whole, rest = j * share + j * left // k, j * left % k
    return whole + ((rest << _FRACTION_BITS) + u * tokens) // (k << _FRACTION_BITS)


def compress(
    x: Tensor,
    seed: Tensor,
    *,
    ratio: Fraction,
    min_generators: int = 1,
    sampling: Sampling = "stratified",
    epsilon: float | None = None,
) -> Compressed:
    """Compress an input of projections to sampled rows, an index and a scale per token.

    Equivalent to: `rows = sample_rows(...)`, `C = x[rows]`, `f, α, cos = assign(x, C)`, and with a
    finite ε, `kept = (cos**2 >= 1 - epsilon**2) | is_generator` and
    `α = where(kept, α * b / kept.sum(), 0)`.

    Args:
        x: [b, n], floating point, b ≥ 1.
        seed: 0-dimensional int64, see `content_seed`.
        ratio: b / k.
        min_generators: lower bound of k.
        sampling: see `sample_rows`.
        epsilon: the gate ε ≥ 0; None for ∞, which keeps every token.

    Returns:
        What to save for the backward pass.

    Source: arXiv 2506.02939 §3, Algorithm 1.
    """
    tokens = x.shape[0]
    k = num_generators(tokens, ratio, min_generators)
    rows = sample_rows(tokens, k, seed, sampling)
    generators = x[rows]
    index, scale, cosine = operators.assign(x, generators, operators.index_dtype(k))
    # cosine² ≥ 1 − ε² holds for every row once ε ≥ 1.
    if epsilon is None or epsilon >= 1:
        return Compressed(generators, index, scale)
    # Written so that a NaN cosine is not dropped: non-finite rows must reach the gradient.
    far = cosine.square() < 1 - epsilon**2
    is_generator = torch.zeros_like(far).index_put((rows,), far.new_ones(()))
    dropped = far & ~is_generator
    # In the dtype of the cosine, so that float64 stays float64. Never 0: generators are kept.
    beta = tokens / (tokens - dropped.sum()).to(cosine.dtype)
    return Compressed(generators, index, torch.where(dropped, 0.0, scale * beta).to(scale.dtype))


def weight_gradients(
    compressed: Compressed, grads: Sequence[Tensor], transposed: Sequence[bool]
) -> list[Tensor]:
    """Approximate the weight gradients of all projections that read one compressed input.

    Equivalent to, with x̂ = scale[:, None] * generators[index]: `[g.T @ x̂ for g in grads]`, and
    `x̂.T @ g` where transposed.

    Args:
        compressed: of an input [b, n].
        grads: dZ_p, [b, m_p] each.
        transposed: per projection, whether the gradient is wanted as [n, m_p], not [m_p, n].

    Returns:
        One matrix per projection, in the dtype of the generators.

    Source: arXiv 2506.02939 §3, Algorithm 2.
    """
    generators = compressed.generators
    sums = operators.contract(
        compressed.index, compressed.scale, list(grads), generators.shape[0]
    ).to(generators.dtype)
    widths = [grad.shape[1] for grad in grads]
    if not any(transposed):
        # One matmul for all: the row blocks of its result are contiguous.
        return list((sums.T @ generators).split(widths, dim=0))
    return [
        generators.T @ part if flip else part.T @ generators
        for part, flip in zip(sums.split(widths, dim=1), transposed, strict=True)
    ]
