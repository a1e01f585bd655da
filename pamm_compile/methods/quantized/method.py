"""An input itself in 8 or 4 bits, and weight gradients from that.

    forward:   X ── codes, scales                                                 saved
    backward:  codes, scales ── X̂ [b, n] ── dW = dZᵀ X̂

If the device multiplies in float8, X is kept transposed, as this matmul reads it, with a scale s
per token. s is moved to dZ, and the dZ of a projection gets one scale t:

    forward:   X ── s, X8ᵀ = (X / s)ᵀ [n, b]                                      saved
    backward:  s dZ ── t, dZ8ᵀ = (s dZ / t)ᵀ [m, b] ── dW = t (dZ8ᵀ X8)

A scaled matmul cannot scale what it sums over, which is tokens here. A scale per token is known as
soon as a norm has made the token, which a scale per column is not. And one token with a massive
activation does not cost the other tokens their bits. t needs no more than the peaks of rows, which
the kernel that makes dZ finds: a scale per column would read dZ twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from pamm_compile import checks
from pamm_compile.devices import DeviceFigures, matmul_seconds, predicted_seconds
from pamm_compile.methods.codes import FLOAT8, Bits, Float8, Steps
from pamm_compile.private.scaled import has_scaled_matmul, scaled_matmul
from pamm_compile.size import Cost, Size, exact_cost

TOKENS_A_SCALE = 64
"""Entries of so many tokens in one column share a scale."""

# Of rows of float8 operands, in elements.
_MULTIPLE = 16
_FLOAT8 = Float8()


@dataclass(frozen=True)
class Quantized:
    """Keeps X in 8 or 4 bits: dW ≈ dZᵀ X̂.

    Equivalent to, for every column of X and each 64 tokens of it, with half = 2^(bits - 1):

        root = sign(X) * sqrt(abs(X))
        step = abs(root).amax() / (half - 0.5)
        root = (floor(root / step) + 0.5) * step
        dW = dZ.T @ (sign(root) * root**2)

    or, with `float8`, of 8 bits:

        s = abs(X).amax(1) / 448
        t = abs(s[:, None] * dZ).amax() / 448
        X8 = (X / s[:, None]).to(torch.float8_e4m3fn)
        dZ8 = (s[:, None] * dZ / t).to(torch.float8_e4m3fn)
        dW = t * (dZ8.T @ X8)

    Args:
        bits: of an entry, 8 or 4.
        float8: whether a scaled matmul multiplies X and dZ in float8 e4m3. A GPU can do this twice
            as fast as in 16 bits; the error is several times larger. None does so on CUDA devices
            of capability 8.9 or more, True also on CPUs. Inputs in float64, and inputs whose
            features vary, are decoded instead.

    Raises:
        InvalidOptionError: a value is not allowed.
    """

    bits: Bits = 8
    float8: bool | None = None

    def __post_init__(self) -> None:
        # Of 8.0, say, the traced code would be the same, but not the fingerprint.
        if not any(repr(self.bits) == repr(each) for each in (4, 8)):
            hint = "8 is nearly exact, 4 takes half of the bytes."
            raise checks.refusal("bits", self.bits, "4 or 8", hint)
        if not any(self.float8 is each for each in (None, True, False)):
            hint = "None decides by the device."
            raise checks.refusal("float8", self.float8, "True, False or None", hint)
        if self.bits == 4 and self.float8:
            hint = "Float8 needs 8 bits: write bits=8, or leave float8 out."
            raise checks.refusal("float8", self.float8, "False or None where bits=4", hint)

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr((self.bits, self.float8))

    @property
    def _steps(self) -> Steps:
        return Steps(self.bits, TOKENS_A_SCALE, growing=True)

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return codes [b, n] and scales; in float8 codes [n, b] and scales [b, 1].

        With 4 bits two columns share a byte. In float8 b and n are rounded up to multiples of 16;
        where n was none, a third tensor is [0, n].
        """
        if not self._multiplies_in_float8(x.shape[1], x.dtype, x.device):
            return self._steps.encode(x)
        codes, scales = _FLOAT8.encode(_padded(x, features=True))
        stored = codes.T.contiguous(), scales[: x.shape[0]]
        # Of no bytes: it says how many features there are where codes have more.
        return stored if codes.shape[1] == x.shape[1] else (*stored, x.new_empty(0, x.shape[1]))

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return dW of every projection, in float8 from one matmul for all."""
        if stored[0].dtype == FLOAT8:
            return self._in_float8(stored, grads, transposed)
        decoded = {dtype: self._steps.decode(stored, dtype) for dtype in {g.dtype for g in grads}}
        return [
            decoded[grad.dtype].T @ grad if flip else grad.T @ decoded[grad.dtype]
            for grad, flip in zip(grads, transposed, strict=True)
        ]

    def _in_float8(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        codes, scales = stored[:2]
        scaled = [_padded(grad.float() * scales) for grad in grads]
        # Of rows first: the kernel that makes a row of dZ finds its peak on the way.
        peaks = torch.stack([each.abs().amax(1) for each in scaled]).amax(1)
        each_scale = _FLOAT8.scales(peaks)
        left = [
            _FLOAT8.encode_by(each, each_scale[number]).T.contiguous()
            for number, each in enumerate(scaled)
        ]
        rows = each_scale[_numbers([grad.shape[1] for grad in grads], codes.device)][:, None]
        ones = torch.ones(1, codes.shape[0], device=codes.device)
        product = scaled_matmul(torch.cat(left), codes.T, rows, ones)
        product = product[:, : stored[2].shape[1]] if len(stored) > 2 else product
        parts = product.split([grad.shape[1] for grad in grads])
        return [
            (part.T if flip else part).to(grad.dtype)
            for part, grad, flip in zip(parts, grads, transposed, strict=True)
        ]

    def _multiplies_in_float8(
        self, features: int | torch.SymInt, dtype: torch.dtype, device: torch.device
    ) -> bool:
        if self.bits == 4 or self.float8 is False or dtype == torch.float64:
            return False
        # By how much one that varies is to be padded is not known.
        if not isinstance(features, int):
            return False
        asked = self.float8 is True and device.type == "cpu"
        return asked or has_scaled_matmul(device)

    def stored_bytes(self, size: Size) -> int:
        """Return the bytes of codes and scales."""
        if self._multiplies_in_float8(size.features, size.dtype, torch.device(size.device)):
            tokens, features = _rounded_up(size.tokens), _rounded_up(size.features)
            return _FLOAT8.nbytes(tokens, features) - 4 * (tokens - size.tokens)
        return self._steps.nbytes(size.tokens, size.features)

    def cost(self, size: Size) -> Cost:
        """Return the cost of coding, decoding and the matmuls."""
        if self._multiplies_in_float8(size.features, size.dtype, torch.device(size.device)):
            return self._float8_casts(size) + self._float8_matmul(size)
        return self._codings(size) + exact_cost(size)

    def _codings(self, size: Size) -> Cost:
        b, n, item = size.tokens, size.features, size.dtype.itemsize
        kept = self._steps.nbytes(b, n)
        return Cost(12 * b * n, 2 * b * n * item + 2 * kept, 2)

    def _float8_casts(self, size: Size) -> Cost:
        """Return what casts cost: of X in the kernel that makes it, of dZ in kernels of their own.

        As Inductor generates them, see tests/pamm_testing/triton/casts.py.
        """
        b, n, m, item = size.tokens, size.features, sum(size.outputs), size.dtype.itemsize
        # The norm or activation that makes X writes its codes, and what makes dZ finds the peaks of
        # its rows. The largest of these is known when all rows are: so dZ is read once more.
        # On a CPU, which only shows the error, X is read for its scales and codes as well.
        of_x = 2 * item + 1 if size.device == "cpu" else 1
        # Peaks in two steps, codes of all projections, scales of rows and of columns.
        return Cost(4 * b * (n + m), b * n * of_x + b * m * (item + 1), 5)

    def _float8_matmul(self, size: Size) -> Cost:
        b, n, m = size.tokens, size.features, sum(size.outputs)
        flops, moved = 2 * b * n * m, b * (n + m) + 2 * n * m
        if size.device == "cpu":
            # Which has no such instructions: operands are widened, written and read again.
            return Cost(flops, moved + 8 * b * (n + m), 3, flops)
        return Cost(flops, moved, 1)

    def predicted_seconds(self, size: Size, device: DeviceFigures) -> float:
        """Return a model's time of casts and matmuls of one site, forward and backward."""
        usable = self.bits == 8 and self.float8 is not False and size.dtype != torch.float64
        if not (usable and device.float8):
            coding = predicted_seconds(self._codings(size), device, size.dtype)
            return coding + matmul_seconds(exact_cost(size), device.flops(size.dtype), device)
        casts = predicted_seconds(self._float8_casts(size), device, size.dtype)
        return casts + matmul_seconds(self._float8_matmul(size), device.float8, device)

    def describe(self, size: Size) -> str:
        """Return "8 bits", "4 bits" or "float8"."""
        device = torch.device(size.device)
        if self._multiplies_in_float8(size.features, size.dtype, device):
            return "float8"
        return f"{self.bits} bits"


def _numbers(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return 0 so many times, then 1 so many times, and so on."""
    index = torch.arange(sum(counts), device=device)
    numbers = torch.zeros_like(index)
    for end in accumulate(counts[:-1]):
        numbers = numbers + (index >= end)
    return numbers


def _rounded_up(count: int) -> int:
    """Return a count rounded up to a multiple of 16."""
    return (count + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE


def _padded(x: Tensor, *, features: bool = False) -> Tensor:
    """Return so many more tokens, and features, of zeros that they are multiples of 16."""
    b, n = x.shape
    more = (_rounded_up(n) - n if features else 0), _rounded_up(b) - b
    if all(isinstance(each, int) and not each for each in more):
        return x
    return functional.pad(x, (0, more[0], 0, more[1]))
