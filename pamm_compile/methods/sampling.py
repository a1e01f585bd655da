"""Which rows of an input a method looks at: seeds from the input's own bits, and draws from seeds.

Every value here is an integer, computed in int64, and the range of each is stated where it is made:
generated code reads the rows without looking at their numbers.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

Sampling = Literal["stratified", "uniform"]

_MASK = 0x7FFFFFFF
_STRIDE = 0x1E3779B9
_FRACTION_BITS = 24
_PROBED_ROWS = 64
_PROBED_COLUMNS = 4
_BITS = {2: torch.int16, 4: torch.int32}


def _mix(h: Tensor) -> Tensor:
    # A 31-bit finaliser: products stay below 2⁶³, so int64 never overflows on any device.
    h = h ^ (h >> 16)
    h = (h * 0x045D9F3B) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x2C1B3C6D) & _MASK
    return h ^ (h >> 16)


def _spread(place: Tensor, places: int, size: int) -> Tensor:
    """Return `place * size // places`, in [0, size) for a place in [0, places)."""
    # Split, because Inductor computes functions of an index in 32 bits on a GPU: here no product
    # passes `size` or places².
    return place * (size // places) + place * (size % places) // places


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
    rows = _spread(probe, _PROBED_ROWS, x.shape[0])
    entries = x[rows, _spread(column, _PROBED_COLUMNS, x.shape[1])]
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
    # Inductor computes functions of an index alone in 32 bits on a GPU; `seed & 0` is the zero that
    # makes this one a function of memory, and so of 64 bits.
    j = torch.arange(k, device=seed.device) + (seed & 0)
    u = _mix((seed + _STRIDE * (j + 1)) & _MASK) >> (31 - _FRACTION_BITS)
    # floor((j + u)·b/k) in integers, u having 24 bits after the point. Split so that no product
    # passes b·2²⁴ or k², both below 2⁶³ for any b up to 2³¹. In [0, b), since (j + u)/k is at most
    # 1 − 2⁻²⁴/k and only the result is rounded, downwards.
    share, left = tokens // k, tokens % k
    whole, rest = j * share + j * left // k, j * left % k
    return whole + ((rest << _FRACTION_BITS) + u * tokens) // (k << _FRACTION_BITS)
