"""Principal directions of X, and coefficients of every token along them in a few bits.

    forward:   S = some rows of X ── subspace iteration ── Q [r, n], orthonormal rows
               A = X Qᵀ ── dither, round ── codes, scales                        saved, with Q
    backward:  codes, scales ── Â [b, r] ── dW = (dZᵀ Â) Q

All of it is plain PyTorch. Inductor fuses everything except matmuls, a Cholesky factorisation and
a triangular solve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pamm_compile import checks
from pamm_compile.methods.codes import Bits, Rows, Steps
from pamm_compile.methods.rank import checked_rank, directions
from pamm_compile.methods.subspace.directions import drawn_directions, principal_directions
from pamm_compile.size import Cost, Size

TOKENS_A_SCALE = 256
"""Coefficients of so many tokens along one direction share a scale."""

# More of either changes nothing but the time.
_MOST_ITERATIONS, _MOST_CANDIDATES = 32, 1024
# Of blocked right-looking algorithms, as libraries for GPUs have them: columns at a time, and
# kernels for each in a Cholesky factorisation (3) and a triangular solve (2). Not measured.
_PANEL, _KERNELS_A_PANEL = 32, 5
_BASIS = Rows()


@dataclass(frozen=True)
class Subspace:
    """Keeps X along the r directions that explain most of it: dW ≈ (dZᵀ Â) Q.

    Equivalent to, up to the rounding of A, with `rows` drawn anew at every step:

        S = X[rows]
        Q = torch.linalg.qr(S.T @ S @ torch.linalg.qr(S.T @ random).Q).Q.T
        A = X @ Q.T
        dW = dZ.T @ A @ Q

    Args:
        rank: r, the directions kept: a number of at least 1, or a share in (0, 1) of min(features,
            outputs of all projections), rounded up to a multiple of 8. From r = features on, X
            itself is kept in `bits`.
        bits: of a coefficient, 4 or 8. 256 tokens of a direction share a scale; a basis entry has
            8 bits. None keeps both in the dtype of X.
        iterations: subspace iterations on the sampled rows, at least 0.
        rows: sampled rows per direction, at least 1; 16 and 51 directions make 816 rows.
        candidates: directions found for each one kept, at least 1. Above 1, every step draws the
            kept ones anew. The odds grow with how much of X lies along a direction, and its
            coefficients are divided by the odds. On average no candidate is left out.

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, 2011,
        algorithm 4.4, on sampled rows; the coding is this package's.
    """

    rank: float = 0.125
    bits: Bits | None = 4
    iterations: int = 1
    rows: int = 16
    candidates: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank))
        # Of 4.0, say, the traced code would be the same, but not the fingerprint.
        if not any(repr(self.bits) == repr(each) for each in (None, 4, 8)):
            hint = "None keeps coefficients and basis in the input's own dtype."
            raise checks.refusal("bits", self.bits, "4, 8 or None", hint)
        hint = "1 is enough for activations of a trained model."
        iterations = checks.integer("iterations", self.iterations, 0, hint, _MOST_ITERATIONS)
        object.__setattr__(self, "iterations", iterations)
        hint = "More rows make better directions for more time."
        object.__setattr__(self, "rows", checks.integer("rows", self.rows, 1, hint))
        allowed = f"a number of at least 1 and at most {_MOST_CANDIDATES}"
        hint = "2 keeps half of the directions found; 1 keeps all."
        candidates = checks.number("candidates", self.candidates, allowed, hint)
        if not 1 <= candidates <= _MOST_CANDIDATES:
            raise checks.refusal("candidates", self.candidates, allowed, hint)
        object.__setattr__(self, "candidates", float(candidates))

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr((self.rank, self.bits, self.iterations, self.rows, self.candidates))

    def directions(self, features: int, outputs: Sequence[int]) -> int:
        """Return r for an input and its projections, at most the number of features."""
        return directions(self.rank, features, outputs)

    def found(self, features: int, outputs: Sequence[int]) -> int:
        """Return the directions of which r are kept: r of them unless there are candidates."""
        r = self.directions(features, outputs)
        return min(features, math.ceil(self.candidates * r))

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return codes, scales and phase of A, and codes and scales of Q.

        Without `bits`, return A and Q. From r = features on, A is X, and there is no Q.
        """
        r = self.directions(x.shape[1], outputs)
        if r == x.shape[1]:
            return (x,) if self.bits is None else _coefficients(self.bits).encode(x, seed)
        found, weights = self.found(x.shape[1], outputs), None
        if found > r:
            # As many sampled rows in all as without candidates, but two of each at least.
            rows = max(min(2, self.rows), self.rows * r // found)
            basis, weights = drawn_directions(
                x, r, seed, candidates=found, rows=rows, iterations=self.iterations
            )
        else:
            basis = principal_directions(x, r, seed, rows=self.rows, iterations=self.iterations)
        if self.bits is None:
            decoded = basis.to(_product_dtype(x.dtype))
        else:
            codes, scales, decoded = _BASIS.encode_and_round(basis, _product_dtype(x.dtype))
        coefficients = x.to(decoded.dtype) @ decoded.T
        if weights is not None:
            coefficients = coefficients * weights.to(coefficients.dtype)
        if self.bits is None:
            return coefficients, decoded
        return (*_coefficients(self.bits).encode(coefficients, seed), codes, scales)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return dW of every projection; coefficients and basis are decoded once for all."""
        projected = len(stored) == (2 if self.bits is None else 5)
        dtype = _product_dtype(grads[0].dtype) if projected else grads[0].dtype
        grads = [grad.to(dtype) for grad in grads]
        if self.bits is None:
            coefficients = stored[0].to(dtype)
            basis = stored[1].to(dtype) if projected else None
        else:
            coefficients = _coefficients(self.bits).decode(stored[:3], dtype)
            basis = _BASIS.decode(stored[3:], dtype) if projected else None
        if basis is None:
            return [
                coefficients.T @ grad if flip else grad.T @ coefficients
                for grad, flip in zip(grads, transposed, strict=True)
            ]
        parts = [grad.T @ coefficients for grad in grads]
        if len(parts) > 1 and not any(transposed):
            # One matmul for all: the row blocks of its result are contiguous.
            whole = torch.cat(parts) @ basis
            return list(whole.split([part.shape[0] for part in parts]))
        return [
            basis.T @ part.T if flip else part @ basis
            for part, flip in zip(parts, transposed, strict=True)
        ]

    def stored_bytes(self, size: Size) -> int:
        """Return the bytes of codes, scales, phase and basis."""
        b, n = size.tokens, size.features
        r = self.directions(n, size.outputs)
        projected = r < n
        if self.bits is None:
            return (b * r + projected * r * n) * size.dtype.itemsize
        basis = _BASIS.nbytes(r, n) if projected else 0
        return _coefficients(self.bits).nbytes(b, r) + basis

    def cost(self, size: Size) -> Cost:
        """Return the cost of directions, coefficients and weight gradients."""
        b, n, m, item = size.tokens, size.features, sum(size.outputs), size.dtype.itemsize
        p = len(size.outputs)
        r = self.directions(n, size.outputs)
        kept = self.stored_bytes(size)
        decode = Cost(4 * b * r, kept + b * r * item, 0 if self.bits is None else 1)
        if r == n:
            encode = Cost(4 * b * r, 2 * b * r * item + kept, 0 if self.bits is None else 2)
            exact = Cost(2 * b * n * m, (p * b * n + b * m + n * m) * item, p)
            return encode + decode + exact
        found = self.found(n, size.outputs)
        s = self.rows * r
        # In float64, which takes twice the time of float32 where both run at full rate.
        squared = 2 * (3 * n * found * found + found**3 // 3)
        # On a GPU a factorisation and a solve go through the matrix in steps that wait for one
        # another, each of a few kernels; that, and not arithmetic, is what they take there.
        waits = 0 if size.device == "cpu" else _KERNELS_A_PANEL * -(-found // _PANEL)
        orthonormal = Cost(squared, 24 * n * found, 4 + waits, squared)
        find = Cost(2 * s * n, s * n * (item + 4), 2, 2 * s * n)
        for _ in range(self.iterations):
            power = 4 * s * n * found
            moved = (2 * s * n + 2 * s * found + 2 * n * found) * item
            find += Cost(power, moved, 2, power if item > 2 else 0) + orthonormal
        find += orthonormal
        if found > r:
            # Eigenvectors take some nine times the cube, in steps that wait as a solve's do.
            find += Cost(18 * found**3, 8 * n * r, 8 + waits, 18 * found**3)
        encode = Cost(
            2 * b * n * r + 4 * b * r,
            (b * n + 3 * b * r) * item + kept,
            1 if self.bits is None else 4,
        )
        multiply = Cost(
            2 * b * r * m + 2 * m * r * n,
            (b * m + p * b * r + 2 * m * r + n * r + n * m) * item,
            p + (2 if p > 1 else 1),
        )
        return find + encode + decode + multiply

    def describe(self, size: Size) -> str:
        """Return r and the bits."""
        r = self.directions(size.features, size.outputs)
        return f"r = {r}" + ("" if self.bits is None else f", {self.bits} bits")


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what products with directions are made in.

    A coefficient is as large as its token is long: in float16 it, and its product with dZ, could
    overflow where the exact gradient does not.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _coefficients(bits: Bits) -> Steps:
    """Return how coefficients are coded: without bias, so that errors of tokens cancel."""
    return Steps(bits, TOKENS_A_SCALE, dithered=True)
