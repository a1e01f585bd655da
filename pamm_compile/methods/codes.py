"""Matrices in a few bits, for every method: integers, and float8; packed, with scales.

A format codes a matrix [b, n], and has what it needs to be judged: its inverse, its bytes, and how
far the inverse may be off.

    Steps     4 or 8 bits, a scale a column and so many rows
    Rows      8 bits, a scale a row
    Float8    e4m3, a scale a row, or given scales

Plain PyTorch, of fixed structure; NaN and Inf come back as something that is not finite. Nothing is
decoded by operations that also coded it: what both passes compute, the partitioner would save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Bits = Literal[4, 8]

FLOAT8 = torch.float8_e4m3fn

# Scales are rounded to bfloat16: up, and so far that rounding v + u cannot reach the next code.
_HEADROOM = 1 + 2**-7
# The fractional parts of 1/ρ and 1/ρ², ρ the plastic number, in 22 bits: multiples of these two
# fill the unit interval evenly along rows and along columns, and exactly in float32.
_PHASE_BITS = 22
_ROW_STEP = 3166187
_COLUMN_STEP = 2390083

_ROW_LEVELS = 127
_FLOAT8_MOST = torch.finfo(FLOAT8).max
# Of a scale: far below any gradient that counts, and its reciprocal is finite.
_FLOAT8_LEAST = 2.0**-100


@dataclass(frozen=True)
class Steps:
    """Integers of 4 or 8 bits: 2^bits values from peak to peak, in equal or in growing steps.

    Equivalent to, with half = 2^(bits - 1), for every column and each `rows` rows of it:

        y = x, or sign(x) * sqrt(abs(x))
        step = abs(y).amax() / (half - 0.5)
        codes = floor(y / step + u + half)
        y ≈ (codes - (half - 0.5) - u) * step

    With dithering, u is uniform in [-0.5, 0.5) and known to both: the error is then uniform in a
    step whatever the value was, so that coding is unbiased, with the variance of rounding to
    nearest, half that of stochastic rounding. Without, u = 0.

    Growing steps, those of the root, are for columns of few large and many small values, as a GELU
    puts out: they leave two thirds of the error there, and no more elsewhere.

    Args:
        bits: of a code; of 4, two share a byte.
        rows: that share a scale.
        dithered: whether there is a u.
        growing: whether the root is coded.

    Source: L. G. Roberts, Picture coding using pseudo-random noise, 1962, for the dither; B. Smith,
        Instantaneous companding of quantized signals, 1957, for steps that grow.
    """

    bits: Bits
    rows: int
    dithered: bool = False
    growing: bool = False

    @property
    def _half(self) -> int:
        return int(2 ** (self.bits - 1))

    def encode(self, x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return codes, scales and, with dithering, a phase.

        Args:
            x: [b, n], floating point.
            seed: 0-dimensional int64 tensor in [0, 2³¹), with dithering.

        Returns:
            uint8, [b, n] or [b, ceil(n / 2)]; bfloat16, [ceil(b / rows), n], a step each; int32, of
            no dimension.
        """
        # In float64 if x is: the root of what passes float32 does not.
        wide = x if x.dtype == torch.float64 else x.float()
        if self.growing:
            roots = wide.abs().sqrt()
            wide = torch.where(x < 0, -roots, roots)
        a = wide.float()
        tokens, n = a.shape
        blocks = (tokens + self.rows - 1) // self.rows
        padded = functional.pad(a.abs(), (0, 0, 0, blocks * self.rows - tokens))
        peaks = padded.view(blocks, self.rows, n).amax(1)
        scales = (peaks * (_HEADROOM / (self._half - 0.5))).to(torch.bfloat16)
        places = a * self._by_row(_reciprocal(scales.float()), tokens)
        phase = None
        if self.dithered:
            assert seed is not None, "dithering needs a seed"
            phase = seed & (2**_PHASE_BITS - 1)
            places = places + _dither(tokens, n, phase)
        codes = (places + self._half).floor().to(torch.uint8)
        if self.bits == 4:
            pairs = (n + 1) // 2
            high = codes[:, pairs:]
            high = functional.pad(high, (0, 1)) if n % 2 else high
            codes = codes[:, :pairs] | (high << 4)
        return (codes, scales) if phase is None else (codes, scales, phase.to(torch.int32))

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return what was coded, [b, n], in a dtype."""
        codes, scales = stored[:2]
        n = scales.shape[1]
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=1)[:, :n]
        tokens = codes.shape[0]
        whole = codes.float() - (self._half - 0.5)
        if self.dithered:
            whole = whole - _dither(tokens, n, stored[2].long())
        # NaN, that what follows keep it.
        steps = scales.float()
        steps = torch.where(steps < math.inf, steps, math.nan)
        decoded: Tensor = whole * self._by_row(steps, tokens)
        if self.growing:
            decoded = decoded.double() if dtype == torch.float64 else decoded
            decoded = decoded * decoded.abs()
        if dtype == torch.float16:
            # What was within half a step of the end of float16 is not to pass it.
            most = torch.finfo(dtype).max
            decoded = decoded.clamp(-most, most)
        return decoded.to(dtype)

    def nbytes(self, b: int, n: int) -> int:
        """Return the bytes of what `encode` returns."""
        codes = b * (-(-n // 2) if self.bits == 4 else n)
        return codes + 2 * n * -(-b // self.rows) + 4 * self.dithered

    def bound(self, x: Tensor) -> Tensor:
        """Return by how much decoded entries may be off at most, rounding in float32 left aside."""
        wide = x.double()
        sizes = wide.abs().sqrt() if self.growing else wide.abs()
        # Half of a step, the scale as large as it is ever rounded.
        peaks = torch.stack([block.amax(0) for block in sizes.split(self.rows)])
        most = self._by_row(peaks * (_HEADROOM * (1 + 2**-8) / (self._half - 0.5)), len(x)) / 2
        # (y + e)² - y² = e (2 y + e)
        return most * (2 * sizes + most) if self.growing else most

    def _by_row(self, blocks: Tensor, tokens: int) -> Tensor:
        """Return, for every row, that of its block."""
        count, n = blocks.shape
        return blocks[:, None].expand(count, self.rows, n).reshape(-1, n)[:tokens]


@dataclass(frozen=True)
class Rows:
    """Integers of 8 bits, rounded to nearest, with a float32 scale a row.

    Equivalent to:

        scales = x.abs().amax(1) / 127
        codes = (x / scales[:, None]).round()
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 codes, [r, n], and scales, [r]."""
        return self.encode_and_round(x, x.dtype)[:2]

    def encode_and_round(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scales, and what the two stand for, in a dtype."""
        x = x.float()
        scales = x.abs().amax(1) / _ROW_LEVELS
        whole = (x * _reciprocal(scales)[:, None]).round()
        # Not decoded from the codes: were the backward pass to compute the very same, the
        # partitioner would save what both passes read in place of computing it twice.
        return whole.to(torch.int8), scales, (whole * scales[:, None]).to(dtype)

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return what was coded, [r, n], in a dtype."""
        codes, scales = stored
        decoded: Tensor = (codes * scales[:, None]).to(dtype)
        return decoded

    def nbytes(self, r: int, n: int) -> int:
        """Return the bytes of what `encode` returns."""
        return r * (n + 4)

    def bound(self, x: Tensor) -> Tensor:
        """Return by how much decoded entries may be off at most, rounding in float32 left aside."""
        return x.double().abs().amax(1, keepdim=True).expand(x.shape) / (2 * _ROW_LEVELS)


@dataclass(frozen=True)
class Float8:
    """float8 e4m3, rounded to nearest, with a float32 scale a row, or scales that are given.

    Equivalent to:

        scales = x.abs().amax(1, keepdim=True) / 448
        codes = (x / scales).to(torch.float8_e4m3fn)
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, [b, n], and scales, [b, 1]."""
        x = x.float()
        scales = self.scales(x.abs().amax(1, keepdim=True))
        return self.encode_by(x, scales), scales

    def scales(self, peaks: Tensor) -> Tensor:
        """Return the scales of what is as large as this at most."""
        # Not of nothing: 0 / 0 would be NaN.
        return (peaks / _FLOAT8_MOST).clamp(min=_FLOAT8_LEAST)

    def encode_by(self, x: Tensor, scales: Tensor) -> Tensor:
        """Return codes, [b, n], with scales that broadcast."""
        return (x * (1 / scales)).to(FLOAT8)

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return what was coded, [b, n], in a dtype."""
        codes, scales = stored
        return (codes.float() * scales).to(dtype)

    def nbytes(self, b: int, n: int) -> int:
        """Return the bytes of what `encode` returns."""
        return b * n + 4 * b

    def bound(self, x: Tensor) -> Tensor:
        """Return by how much decoded entries may be off at most, rounding in float32 left aside."""
        wide = x.double().abs()
        # Three bits behind the point; below 2⁻⁶ steps of 2⁻⁹.
        least = self.scales(wide.amax(1, keepdim=True)) * 2**-10
        return torch.maximum(wide * 2**-4, least)


def _dither(tokens: int, n: int, phase: Tensor) -> Tensor:
    """Return [b, n] in [−½, ½): uniform where the phase is, and evenly spread for any phase.

    Args:
        tokens: b.
        n: columns.
        phase: 0-dimensional int64.
    """
    mask = 2**_PHASE_BITS - 1
    # Functions of memory: of an index alone they would take 32 bits on a GPU, and be the same in
    # both passes, to be saved for the second.
    nothing = phase & 0
    row = torch.arange(tokens, device=phase.device) + nothing
    column = torch.arange(n, device=phase.device) + nothing
    along = ((row * _ROW_STEP + phase) & mask).float() * 2.0**-_PHASE_BITS
    across = ((column * _COLUMN_STEP) & mask).float() * 2.0**-_PHASE_BITS
    both: Tensor = along[:, None] + across
    return both - both.floor() - 0.5


def _reciprocal(scales: Tensor) -> Tensor:
    # 0 for scales of nothing, and for those that are not finite: no NaN is then made an integer,
    # and in the decoded values it is the scale that carries it.
    usable = (scales > 0) & (scales < math.inf)
    return torch.where(usable, 1 / scales, 0.0)
