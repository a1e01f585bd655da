"""Matrices in a few bits, for every method: integers, packed, with scales.

A format codes a matrix [b, n], and has what it needs to be judged: its inverse, its bytes, and how
far the inverse may be off.

    Steps     4 or 8 bits, a scale a column and so many rows
    Rows      8 bits, a scale a row

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

# Scales are rounded to bfloat16: up, and so far that rounding v + u cannot reach the next code.
_HEADROOM = 1 + 2**-7
# The fractional parts of 1/ρ and 1/ρ², ρ the plastic number, in 22 bits: multiples of these two
# fill the unit interval evenly along rows and along columns, and exactly in float32.
_PHASE_BITS = 22
_ROW_STEP = 3166187
_COLUMN_STEP = 2390083

_ROW_LEVELS = 127


@dataclass(frozen=True)
class Steps:
    """Integers of 4 or 8 bits: 2^bits values from peak to peak, in equal steps.

    Equivalent to, with half = 2^(bits - 1), for every column and each `rows` rows of it:

        step = abs(x).amax() / (half - 0.5)
        codes = floor(x / step + u + half)
        x ≈ (codes - (half - 0.5) - u) * step

    With dithering, u is uniform in [-0.5, 0.5) and known to both: the error is then uniform in a
    step whatever the value was, so that coding is unbiased, with the variance of rounding to
    nearest, half that of stochastic rounding. Without, u = 0.

    Args:
        bits: of a code; of 4, two share a byte.
        rows: that share a scale.
        dithered: whether there is a u.

    Source: L. G. Roberts, Picture coding using pseudo-random noise, 1962, for the dither.
    """

    bits: Bits
    rows: int
    dithered: bool = False

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
        a = x.float()
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
        # Half of a step, the scale as large as it is ever rounded.
        peaks = torch.stack([block.amax(0) for block in x.double().abs().split(self.rows)])
        return self._by_row(peaks * (_HEADROOM * (1 + 2**-8) / (self._half - 0.5)), len(x)) / 2

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
