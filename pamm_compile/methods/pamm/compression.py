"""One projection input compressed, and the weight gradients made from it, as compositions.

The joint-graph pass traces these functions into the graph, the tests run them as they stand: what
is compiled and what is checked is the same text. Only `pamm::assign` and `pamm::contract` are
opaque; everything else here fuses into its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from pamm_compile.methods.draws import sample_rows
from pamm_compile.methods.pamm import operators
from pamm_compile.methods.sampling import Sampling

# k is computed in int64 by generated code. With these bounds no step of it passes 2⁶² for any
# number of rows below 2⁴⁰, more than fit into any memory.
_MOST_DENOMINATOR = 10**6
_MOST = 2**40


class Compressed(NamedTuple):
    """What is saved for the backward pass in place of an input X of shape [b, n]."""

    generators: Tensor
    """C, [k, n], dtype of X; in float16 its rows are multiplied by powers of two."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """f, [b], the generator of every token."""
    scale: Tensor
    """α with the gate ε and the correction β folded in, in float16 into C; [b], dtype of X."""


def _bounded(above: int, below: int) -> tuple[int, int]:
    """Return a fraction ≥ 1 in small numbers: itself, or a convergent of its continued fraction."""
    # In integers, which Dynamo follows where it would not follow Fraction's own limit_denominator.
    if above >= _MOST * below:
        return _MOST, 1
    earlier, last = (0, 1), (1, 0)
    while below and earlier[1] + above // below * last[1] <= _MOST_DENOMINATOR:
        whole, left = above // below, above % below
        earlier, last = last, (earlier[0] + whole * last[0], earlier[1] + whole * last[1])
        above, below = below, left
    return last


def num_generators(
    tokens: int | torch.SymInt, ratio: Fraction, min_generators: int
) -> int | torch.SymInt:
    """Return how many generators represent `tokens` rows.

    Equivalent to: `min(tokens, max(min_generators, ceil(tokens / ratio)))`, also for a symbolic
    number of tokens. A ratio of a denominator above 10⁶ is taken to the last convergent of its
    continued fraction below that: 3.3333333333333335 means 10/3.

    Args:
        tokens: b, below 2⁴⁰.
        ratio: b / k, at least 1.
        min_generators: lower bound, at least 1.

    Returns:
        k, in [1, b].

    Source: arXiv 2506.02939 §3.
    """
    above, below = _bounded(ratio.numerator, ratio.denominator)
    k = (tokens * below + above - 1) // above
    if min_generators > 1:
        k = torch.sym_min(tokens, torch.sym_max(k, min(min_generators, _MOST)))
    return k


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
    if x.dtype == torch.float16:
        generators = _of_size_one(generators)
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
    if x.dtype == torch.float16:
        # α is as large as entries of X, and leaves no room for β; C does.
        generators, beta = (generators * beta).to(x.dtype), torch.ones_like(beta)
    return Compressed(generators, index, torch.where(dropped, 0.0, scale * beta).to(scale.dtype))


def _of_size_one(generators: Tensor) -> Tensor:
    """Return rows multiplied by powers of two, so that the mean of their squares is in [1, 4).

    α is then no larger than the largest entry of its token, and B̃ no larger than what it is
    multiplied to: in float16 both could else overflow where the exact gradient does not. Zero rows
    and those that are not finite stay as they are.
    """
    wide = generators.float()
    size = wide.square().mean(dim=1, keepdim=True).sqrt()
    usable = (size > 0) & (size < math.inf)
    power = torch.where(usable, size, 1.0).log2().floor()
    return (wide * torch.exp2(-power)).to(generators.dtype)


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
