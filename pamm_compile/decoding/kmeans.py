"""k-means by cosine, out of PAMM's two operators: assign rows to centres, sum what shares one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pamm_compile.methods.pamm import assign, contract, index_dtype


def cosine_kmeans(
    x: Tensor, count: int, iterations: int, sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide rows into clusters, each row to the centroid of largest cosine.

    Equivalent to, with `fitted` evenly spaced rows of `unit`, starting from `count` of those:

        unit = normalize(x.float())
        for _ in range(iterations):
            index = (fitted @ centres.T).argmax(1)
            centres = stack([normalize(fitted[index == j].sum(0)) for j in range(count)])
        index = (unit @ centres.T).argmax(1)
        means = stack([x[index == j].float().mean(0) for j in range(count)])

    A cluster that lost all its rows keeps its direction, and has a mean of zero.

    `pamm::assign` looks for the largest |cosine|, which would put x and -x together. One more
    feature of 1 in rows and centres turns a cosine c into (1 + c) / 2, which is never negative and
    has the same order.

    Args:
        x: [n, d], floating point, n at least 1.
        count: number of clusters, at least 1.
        iterations: updates of the centres; 0 assigns to the rows that it starts from.
        sample: how many rows the centres are fitted to, at most; at least `count` in any case.

    Returns:
        index: [n], int64, in [0, count).
        means: [count, d], float32; the mean of a cluster's rows as they are, not of their
            directions, since scores are inner products.
        sizes: [count], int64.

    Source: arXiv 2412.03213 §III.
    """
    rows = x.shape[0]
    unit = normalize(x.float(), dim=1)
    extended = pad(unit, (0, 1), value=1.0)
    few = min(rows, max(count, sample))
    fitted, fitted_unit = _evenly(extended, few), _evenly(unit, few)
    ones = extended.new_ones(rows)
    centres = _evenly(fitted_unit, count)
    for _ in range(iterations):
        index, _, _ = assign(fitted, pad(centres, (0, 1), value=1.0), index_dtype(count))
        sums = contract(index, ones[:few], [fitted_unit], count)
        norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        centres = torch.where(norm > 0, sums / norm, centres)
    index, _, _ = assign(extended, pad(centres, (0, 1), value=1.0), index_dtype(count))
    sizes = torch.bincount(index.long(), minlength=count)
    means = contract(index, ones, [x.float()], count) / sizes.clamp(min=1)[:, None]
    return index.long(), means, sizes


def _evenly(x: Tensor, count: int) -> Tensor:
    """Take `count` evenly spaced rows: no generator is advanced, and neighbours are alike."""
    return x[torch.arange(count, device=x.device) * x.shape[0] // count]
