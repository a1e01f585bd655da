"""PAMM once more, as plain loops over Python floats: the oracle of these tests.

It shares no code with the package, is written from the formulas of the paper, and is slow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Rows = list[list[float]]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def norm(a: list[float]) -> float:
    return math.sqrt(dot(a, a))


def cosines(row: list[float], generators: Rows) -> list[float | None]:
    """|cos(row, C_j)| for every j; None where C_j is zero, 0 for a zero row."""
    return [
        None if norm(c) == 0 else abs(dot(row, c)) / (norm(row) * norm(c)) if norm(row) else 0.0
        for c in generators
    ]


def alpha(row: list[float], generator: list[float]) -> float:
    """The multiple of the generator that is closest to the row."""
    square = dot(generator, generator)
    return dot(row, generator) / square if square else 0.0


def nearest(row: list[float], generators: Rows) -> int:
    """The lowest index of the largest |cos|, zero generators last."""
    scores = [-1.0 if cos is None else cos for cos in cosines(row, generators)]
    return scores.index(max(scores))


def residual(row: list[float], generator: list[float]) -> float:
    """‖row − α·generator‖ / ‖row‖, and 0 for a zero row."""
    a = alpha(row, generator)
    rest = [p - a * q for p, q in zip(row, generator, strict=True)]
    return norm(rest) / norm(row) if norm(row) else 0.0


def contract(index: list[int], scale: list[float], grad: Rows, k: int) -> Rows:
    """B̃_j = Σ_{i: f_i = j} α_i dZ_i."""
    sums = [[0.0] * len(grad[0]) for _ in range(k)]
    for j, a, row in zip(index, scale, grad, strict=True):
        for column, value in enumerate(row):
            sums[j][column] += a * value
    return sums


def weight_gradient(
    x: Tensor, grad: Tensor, sampled: list[int], epsilon: float = math.inf
) -> tuple[Tensor, float]:
    """Return PAMM's dW [m, n] in float64, and how close any row came to the gate ε.

    The second value is the smallest |residual − ε|: where it is no more than rounding, either
    decision about that row is right.
    """
    rows: Rows = x.double().tolist()
    grads: Rows = grad.double().tolist()
    generators = [rows[i] for i in sampled]
    index = [nearest(row, generators) for row in rows]
    scale = [alpha(row, generators[j]) for row, j in zip(rows, index, strict=True)]
    rest = [residual(row, generators[j]) for row, j in zip(rows, index, strict=True)]
    kept = [i in sampled or r <= epsilon for i, r in enumerate(rest)]
    beta = len(rows) / sum(kept)
    scale = [beta * a if keep else 0.0 for a, keep in zip(scale, kept, strict=True)]
    sums = contract(index, scale, grads, len(generators))
    b_tilde = torch.tensor(sums, dtype=torch.float64)
    c = torch.tensor(generators, dtype=torch.float64)
    others = [abs(r - epsilon) for i, r in enumerate(rest) if i not in sampled]
    return b_tilde.T @ c, min(others, default=math.inf)
