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
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from pamm_compile import checks
from pamm_compile.methods.base import Cost, Size
from pamm_compile.methods.draws import sample_rows
from pamm_compile.methods.sampling import site_seed

Bits = Literal[4, 8]

TOKENS_A_SCALE = 256
"""Coefficients of so many tokens along one direction share a scale."""

_MULTIPLE = 8
# Of blocked right-looking algorithms, as libraries for GPUs have them: columns at a time, and
# kernels for each in a Cholesky factorisation (3) and a triangular solve (2). Not measured.
_PANEL, _KERNELS_A_PANEL = 32, 5
_BASIS_LEVELS = 127
# Of the Gram matrix's trace: what has less of it is lost in its rounding anyway.
_SHIFT = {torch.float64: 1e-12, torch.float32: 1e-5}
_TINY = 1e-30
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

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, 2011,
        algorithm 4.4, on sampled rows; the coding is this package's.
    """

    rank: float = 0.125
    bits: Bits | None = 4
    iterations: int = 1
    rows: int = 16

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

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr((self.rank, self.bits, self.iterations, self.rows))

    def directions(self, features: int, outputs: Sequence[int]) -> int:
        """Return r for an input and its projections, at most the number of features."""
        if self.rank >= 1:
            return min(int(self.rank), features)
        wanted = math.ceil(self.rank * min(features, sum(outputs)))
        return min(features, -(-wanted // _MULTIPLE) * _MULTIPLE)

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return codes, scales and phase of A, and codes and scales of Q.

        Without `bits`, A and Q; from r = features on without what is of Q, A being X.
        """
        r = self.directions(x.shape[1], outputs)
        if r == x.shape[1]:
            return (x,) if self.bits is None else tuple(_encode(x, self.bits, seed))
        basis = principal_directions(x, r, seed, rows=self.rows, iterations=self.iterations)
        if self.bits is None:
            basis = basis.to(x.dtype)
            return x @ basis.T, basis
        codes, scales, decoded = _encode_basis(basis, x.dtype)
        return (*_encode(x @ decoded.T, self.bits, seed), codes, scales)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return dW of every projection; what decodes is made once for all of them."""
        dtype = grads[0].dtype
        if self.bits is None:
            coefficients = stored[0].to(dtype)
            basis = stored[1].to(dtype) if len(stored) == 2 else None
        else:
            coefficients = _decode(_Codes(*stored[:3]), self.bits, dtype)
            basis = _decode_basis(stored[3], stored[4], dtype) if len(stored) == 5 else None
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
        s = self.rows * r
        # In float64, which takes twice the time of float32 where both run at full rate.
        squared = 2 * (3 * n * r * r + r**3 // 3)
        # On a GPU a factorisation and a solve go through the matrix in steps that wait for one
        # another, each of a few kernels; that, and not arithmetic, is what they take there.
        waits = 0 if size.device == "cpu" else _KERNELS_A_PANEL * -(-r // _PANEL)
        orthonormal = Cost(squared, 24 * n * r, 4 + waits, squared)
        find = Cost(2 * s * n, s * n * (item + 4), 2, 2 * s * n)
        for _ in range(self.iterations):
            power = 4 * s * n * r
            moved = (2 * s * n + 2 * s * r + 2 * n * r) * item
            find += Cost(power, moved, 2, power if item > 2 else 0) + orthonormal
        find += orthonormal
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
    tokens = x.shape[0]
    if isinstance(tokens, int):
        # Two of each at least, so that no row can be missed where there are fewer than r.
        rows = min(rows, max(2, tokens // r))
    count = rows * r
    sampled = x[sample_rows(tokens, count, seed, "stratified")]
    sampled = sampled if x.dtype == torch.float64 else sampled.float()
    # Squares of what is very large or very small would leave float32.
    peak = sampled.abs().amax()
    sampled = sampled / torch.where(peak > 0, peak, 1.0)
    # `seed & 0` makes this a function of memory: of an index alone it would take 32 bits on a GPU.
    number = torch.arange(count, device=x.device) + (seed & 0)
    weight = site_seed(seed, cast(int, number)).to(sampled.dtype) * 2.0**-30 - 1
    basis = _orthonormal((weight[:, None] * sampled).view(rows, r, x.shape[1]).sum(0))
    # Directions need not be exact, only orthonormal: rounding them adds less to the gradient's
    # error than 4-bit coefficients do, and float32 matmuls are what a GPU is slowest at.
    narrow = torch.bfloat16 if x.dtype.itemsize == 2 else sampled.dtype
    rounded = sampled.to(narrow)
    for _ in range(iterations):
        power = (basis.to(narrow) @ rounded.T) @ rounded
        basis = _orthonormal(power.to(sampled.dtype))
    return basis


def _orthonormal(y: Tensor) -> Tensor:
    """Return rows that span what those of `y` span: L⁻¹ y, with L Lᵀ = y yᵀ + a little."""
    # float64 stands the squared condition of y, and no setting of matmuls' precision touches it.
    wide = torch.float32 if y.device.type == "mps" else torch.float64
    z = y.to(wide)
    for _ in range(1 if wide == torch.float64 else 3):
        # The sum of squares is the trace of the Gram matrix.
        shift = _SHIFT[wide] * z.square().sum() + _TINY
        gram = z @ z.T + shift * torch.eye(z.shape[0], dtype=wide, device=z.device)
        factor = torch.linalg.cholesky_ex(gram).L
        z = torch.linalg.solve_triangular(factor, z, upper=False)
    return z.to(y.dtype)


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
