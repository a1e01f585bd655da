"""Principal directions of X, and coefficients of every token along them in a few bits.

    forward:   S = some rows of X ── subspace iteration ── Q [r, n], orthonormal rows
               A = X Qᵀ ── dither, round ── codes, scales                        saved, with Q
    backward:  codes, scales ── Â [b, r] ── dW = (dZᵀ Â) Q

Plain PyTorch throughout; but for matmuls, a Cholesky factorisation and a triangular solve it fuses.

The codes are subtractively dithered: u, uniform in a rounding step and known to both passes, is
added before rounding and taken off after it. The error is then uniform in a step whatever the value
was, so that coefficients are unbiased, with the variance of rounding to nearest, half that of
stochastic rounding (L. G. Roberts, Picture coding using pseudo-random noise, 1962).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pamm_compile import checks
from pamm_compile.methods.subspace.directions import drawn_directions, principal_directions
from pamm_compile.size import Cost, Size

Bits = Literal[4, 8]

TOKENS_A_SCALE = 256
"""Coefficients of so many tokens along one direction share a scale."""

_MULTIPLE = 8
# Of blocked right-looking algorithms, as libraries for GPUs have them: columns at a time, and
# kernels for each in a Cholesky factorisation (3) and a triangular solve (2). Not measured.
_PANEL, _KERNELS_A_PANEL = 32, 5
_BASIS_LEVELS = 127
# Scales are rounded to bfloat16: up, and so far that rounding v + u cannot reach the next code.
_HEADROOM = 1 + 2**-7
# The fractional parts of 1/ρ and 1/ρ², ρ the plastic number, in 22 bits: multiples of these two
# fill the unit interval evenly along tokens and along directions, and exactly in float32.
_PHASE_BITS = 22
_TOKEN_STEP = 3166187
_DIRECTION_STEP = 2390083


class _Codes(NamedTuple):
    """Coefficients in a few bits."""

    codes: Tensor
    """[b, ceil(r / 2)] or [b, r], uint8."""
    scales: Tensor
    """[ceil(b / TOKENS_A_SCALE), r], bfloat16: the size of a rounding step."""
    phase: Tensor
    """0-dimensional int32, of the dither."""


@dataclass(frozen=True)
class Subspace:
    """Keeps X along r directions that explain it best: dW ≈ (dZᵀ Â) Q.

    Equivalent to, up to the rounding of A, with `rows` drawn anew at every step:

        S = X[rows]
        Q = torch.linalg.qr(S.T @ S @ torch.linalg.qr(S.T @ random).Q).Q.T
        A = X @ Q.T
        dW = dZ.T @ A @ Q

    Args:
        rank: r, directions kept: a share of min(features, outputs of all projections) in (0, 1),
            rounded up to a multiple of 8, or a number of at least 1. From r = features on, X itself
            is kept, in so many bits.
        bits: of a coefficient, 4 or 8, with a scale a direction and 256 tokens, and 8 of a basis
            entry; None keeps both in the dtype of X.
        iterations: subspace iterations on the sampled rows, at least 0.
        rows: sampled rows a direction, at least 1; 16 of 51 directions are 816 rows.
        candidates: directions found for each that is kept, at least 1. Above 1 those kept are drawn
            anew at every step, with odds by how much of X is along them, and their coefficients
            divided by the odds: of what lies along candidates nothing is left out in the mean.

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
        allowed = "a share in (0, 1) or an integer of at least 1"
        hint = "0.1 keeps a tenth of the input's directions, 64 keeps 64."
        rank = checks.number("rank", self.rank, allowed, hint)
        if not (0 < rank < 1 or (rank >= 1 and rank.is_integer())):
            raise checks.refusal("rank", self.rank, allowed, hint)
        object.__setattr__(self, "rank", int(rank) if rank >= 1 else rank)
        # Of 4.0, say, the traced code would be the same, but not the fingerprint.
        if not any(repr(self.bits) == repr(each) for each in (None, 4, 8)):
            hint = "None keeps coefficients and basis in the input's own dtype."
            raise checks.refusal("bits", self.bits, "4, 8 or None", hint)
        hint = "1 is enough for activations of a trained model."
        iterations = checks.integer("iterations", self.iterations, 0, hint)
        object.__setattr__(self, "iterations", iterations)
        hint = "More rows make better directions for more time."
        object.__setattr__(self, "rows", checks.integer("rows", self.rows, 1, hint))
        allowed, hint = "a number of at least 1", "2 draws half of what is found; 1 draws nothing."
        candidates = checks.number("candidates", self.candidates, allowed, hint)
        if not 1 <= candidates < math.inf:
            raise checks.refusal("candidates", self.candidates, allowed, hint)
        object.__setattr__(self, "candidates", float(candidates))

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr((self.rank, self.bits, self.iterations, self.rows, self.candidates))

    def directions(self, features: int, outputs: Sequence[int]) -> int:
        """Return r for an input and its projections, at most the number of features."""
        if self.rank >= 1:
            return min(int(self.rank), features)
        wanted = math.ceil(self.rank * min(features, sum(outputs)))
        return min(features, -(-wanted // _MULTIPLE) * _MULTIPLE)

    def found(self, features: int, outputs: Sequence[int]) -> int:
        """Return the directions of which r are kept: r of them unless there are candidates."""
        r = self.directions(features, outputs)
        return min(features, math.ceil(self.candidates * r))

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return codes, scales and phase of A, and codes and scales of Q.

        Without `bits`, A and Q; from r = features on without what is of Q, A being X.
        """
        r = self.directions(x.shape[1], outputs)
        if r == x.shape[1]:
            return (x,) if self.bits is None else tuple(_encode(x, self.bits, seed))
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
            codes, scales, decoded = _encode_basis(basis, _product_dtype(x.dtype))
        coefficients = x.to(decoded.dtype) @ decoded.T
        if weights is not None:
            coefficients = coefficients * weights.to(coefficients.dtype)
        if self.bits is None:
            return coefficients, decoded
        return (*_encode(coefficients, self.bits, seed), codes, scales)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return dW of every projection; what decodes is made once for all of them."""
        projected = len(stored) == (2 if self.bits is None else 5)
        dtype = _product_dtype(grads[0].dtype) if projected else grads[0].dtype
        grads = [grad.to(dtype) for grad in grads]
        if self.bits is None:
            coefficients = stored[0].to(dtype)
            basis = stored[1].to(dtype) if projected else None
        else:
            coefficients = _decode(_Codes(*stored[:3]), self.bits, dtype)
            basis = _decode_basis(stored[3], stored[4], dtype) if projected else None
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
        codes = b * (-(-r // 2) if self.bits == 4 else r)
        scales = 2 * r * -(-b // TOKENS_A_SCALE)
        return codes + scales + 4 + projected * r * (n + 4)

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


def _encode_basis(basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes, a float32 scale a row, and what the two stand for.

    NaN and Inf make a scale that is not finite.
    """
    basis = basis.float()
    scales = basis.abs().amax(1) / _BASIS_LEVELS
    whole = (basis * _reciprocal(scales)[:, None]).round()
    # Not decoded from the codes: were the backward pass to compute the very same, the partitioner
    # would save what both passes read in place of computing it twice.
    return whole.to(torch.int8), scales, (whole * scales[:, None]).to(dtype)


def _decode_basis(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    decoded: Tensor = (codes * scales[:, None]).to(dtype)
    return decoded


def _encode(a: Tensor, bits: Bits, seed: Tensor) -> _Codes:
    """Round coefficients, dithered.

    Args:
        a: [b, r], floating point; NaN and Inf make a scale that is not finite.
        bits: of a code.
        seed: 0-dimensional int64 tensor in [0, 2³¹).
    """
    a = a.float()
    tokens, r = a.shape
    blocks = (tokens + TOKENS_A_SCALE - 1) // TOKENS_A_SCALE
    padded = functional.pad(a.abs(), (0, 0, 0, blocks * TOKENS_A_SCALE - tokens))
    peaks = padded.view(blocks, TOKENS_A_SCALE, r).amax(1)
    half = 2 ** (bits - 1)
    scales = (peaks * (_HEADROOM / (half - 0.5))).to(torch.bfloat16)
    phase = seed & (2**_PHASE_BITS - 1)
    steps = _by_token(_reciprocal(scales.float()), tokens)
    codes = (a * steps + _dither(tokens, r, phase) + half).floor().to(torch.uint8)
    if bits == 4:
        pairs = (r + 1) // 2
        high = codes[:, pairs:]
        high = functional.pad(high, (0, 1)) if r % 2 else high
        codes = codes[:, :pairs] | (high << 4)
    return _Codes(codes, scales, phase.to(torch.int32))


def _decode(stored: _Codes, bits: Bits, dtype: torch.dtype) -> Tensor:
    codes, scales, phase = stored
    r = scales.shape[1]
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=1)[:, :r]
    tokens, half = codes.shape[0], 2 ** (bits - 1)
    whole = codes.float() - (half - 0.5) - _dither(tokens, r, phase.long())
    decoded: Tensor = (whole * _by_token(scales.float(), tokens)).to(dtype)
    return decoded


def _dither(tokens: int, r: int, phase: Tensor) -> Tensor:
    """Return [b, r] in [−½, ½): uniform where the phase is, and evenly spread for any phase.

    Args:
        tokens: b.
        r: directions.
        phase: 0-dimensional int64.
    """
    mask = 2**_PHASE_BITS - 1
    # Functions of memory: of an index alone they would take 32 bits on a GPU, and be the same in
    # both passes, to be saved for the second.
    nothing = phase & 0
    token = torch.arange(tokens, device=phase.device) + nothing
    direction = torch.arange(r, device=phase.device) + nothing
    along = ((token * _TOKEN_STEP + phase) & mask).float() * 2.0**-_PHASE_BITS
    across = ((direction * _DIRECTION_STEP) & mask).float() * 2.0**-_PHASE_BITS
    both: Tensor = along[:, None] + across
    return both - both.floor() - 0.5


def _by_token(blocks: Tensor, tokens: int) -> Tensor:
    """Return, for every token, the row of its block."""
    count, r = blocks.shape
    return blocks[:, None].expand(count, TOKENS_A_SCALE, r).reshape(-1, r)[:tokens]


def _reciprocal(scales: Tensor) -> Tensor:
    # 0 for scales of nothing, and for those that are not finite: no NaN is then made an integer,
    # and in the decoded values it is the scale that carries it.
    usable = (scales > 0) & (scales < math.inf)
    return torch.where(usable, 1 / scales, 0.0)
