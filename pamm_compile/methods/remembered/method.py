"""Directions of an earlier weight gradient, along which the next steps make theirs.

every T-th step:    X ── 8 bits ── dW, nearly exact ── Q [r, n], its top right singular vectors
the steps between:  A = X Qᵀ [b, r]                                               saved
                XX"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pamm_compile import checks
from pamm_compile.devices import (
    EAGER_SECONDS,
    DeviceFigures,
    factorisation_seconds,
    matmul_seconds,
    predicted_seconds,
)
from pamm_compile.methods.base import TOGETHER
from pamm_compile.methods.quantized.method import Quantized
from pamm_compile.methods.rank import checked_rank, directions
from pamm_compile.methods.remembered.orthonormal import orthonormal
from pamm_compile.size import Cost, Size

_ITERATIONS = 2
_CARRIED = torch.bfloat16
"""Of what is carried, whose rounding is far below its noise."""
_SEED = 0
# Of the factorisations before the last, whose rows only have to be told apart, and of the last.
_PASSES, _LAST_PASSES = 1, 2
# Of PyTorch, for a factorisation with its products, and for the gradients of a projection.
_OPERATORS, _OPERATORS_AN_OUTPUT = 25, 11


@dataclass(frozen=True)
class GradientSubspace:
    """Makes dW along the top directions Q of an earlier dW, and adds what Q left out of that.

    Equivalent to, at the first `warmup` backward passes and every `every`-th after these,

        dW = dZ.T @ X                               # X kept in 8 bits
        Q = torch.linalg.svd(dW).Vh[:r]             # of all projections that read X together
        L = carry * (dW - dW @ Q.T @ Q) / (dW @ Q.T).norm()

    and between these:

        A = X @ Q.T                                 # kept in place of X
        dW = dZ.T @ A @ Q
        dW += dW.norm() * L                         # outside of the graph

    What is remembered belongs to the parameters of the model that trains, in this process: the
    first backward pass after a start or a resume is a nearly exact one. Under DDP every rank
    remembers its own directions. A site stays at 8 bits in every step where its weight gradients
    are no whole gradients of parameters, as where a weight is computed, cut or merged.

    Args:
        rank: r, directions kept: a share of min(features, outputs of all projections) in (0, 1),
            rounded up to a multiple of 8, or a number of at least 1.
        every: T, backward passes of a graph from one nearly exact gradient to the next, at least 2.
        carry: share of what Q left out that the passes between add, in [0, 1]. L takes two bytes
            for each entry of the weights; 0 keeps none.
        warmup: backward passes of a graph, from the first on, that are all nearly exact, at least
            1. Early gradients say little of later ones.

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: the subspace is that of J. Zhao et al., GaLore, arXiv 2403.03507, section 3; there the
        gradient is made exactly and then projected.
    """

    rank: float = 0.125
    every: int = 10
    carry: float = 0.0
    warmup: int = 6

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank))
        hint = "10 makes every tenth weight gradient nearly exactly."
        object.__setattr__(self, "every", checks.integer("every", self.every, 2, hint))
        hint = "0.5 adds half of it."
        object.__setattr__(self, "carry", checks.share("carry", self.carry, hint))
        hint = "6 makes the first six weight gradients nearly exactly, 1 the first alone."
        object.__setattr__(self, "warmup", checks.integer("warmup", self.warmup, 1, hint))

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr((self.rank, self.every, self.carry, self.warmup))

    @property
    def _whole(self) -> Quantized:
        return Quantized(8)

    def directions(self, features: int, outputs: Sequence[int]) -> int:
        """Return r for an input and its projections; 0 where there is nothing to leave out."""
        r = directions(self.rank, features, outputs)
        return r if r < features else 0

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return X in 8 bits, as `Quantized(8)` does."""
        return self._whole.store(x, seed, outputs)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return dW of every projection, of X in 8 bits."""
        return self._whole.weight_gradients(stored, grads, transposed)

    def store_along(self, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        """Return A = X Qᵀ, [b, r]."""
        return (x.to(memory.dtype) @ memory.T,)

    def weight_gradients_along(
        self,
        stored: Sequence[Tensor],
        memory: Tensor,
        grads: Sequence[Tensor],
        transposed: Sequence[bool],
    ) -> list[Tensor]:
        """Return dW of every projection, (dZᵀ A) Q, with one matmul by Q for all."""
        (along,) = stored
        parts = [grad.to(along.dtype).T @ along for grad in grads]
        whole = (torch.cat(parts) if len(parts) > 1 else parts[0]) @ memory
        made = whole.split([part.shape[0] for part in parts])
        return [
            (each.T if flip else each).to(grad.dtype)
            for each, grad, flip in zip(made, grads, transposed, strict=True)
        ]

    def remember(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return Q, [r, n], float32: orthonormal, by subspace iteration on all dW together.

        Of 16-bit gradients the iterations multiply in bfloat16. Nothing waits for the device.

        Args:
            gradients: dW_p, [m_p, n]; of s sites at once [s, m_p, n], and Q is [s, r, n].
        """
        # A weight counts by what is left out of its own gradient: optimizers such as Adam move all
        # alike, and the gradients of V would leave no direction to those of Q and K.
        whole = torch.cat([_of_unit_size(grad) for grad in gradients], dim=-2)
        m, n = whole.shape[-2:]
        r = self.directions(n, [m])
        generator = torch.Generator(whole.device).manual_seed(_SEED)
        start = torch.randn(m, r, generator=generator, device=whole.device).to(whole.dtype)
        span = start.mT @ whole
        for _ in range(_ITERATIONS):
            basis = orthonormal(span, passes=_PASSES).to(whole.dtype)
            span = (basis @ whole.mT) @ whole
        return orthonormal(span, passes=_LAST_PASSES)

    def lost(self, gradient: Tensor, memory: Tensor) -> Tensor | None:
        """Return L, [m, n], by the length of what Q keeps."""
        if not self.carry:
            return None
        along = gradient.to(memory.dtype) @ memory.T
        # Of another size where losses are scaled, or where batches are summed up: so a share.
        length = _length(along)
        factor = torch.where(length > 0, self.carry / length, 0.0)
        lost: Tensor = (gradient.to(memory.dtype) - along @ memory) * factor.to(memory.dtype)
        return lost.to(_CARRIED)

    def restored(self, gradient: Tensor, lost: Tensor) -> Tensor:
        """Return dW + ‖dW‖ L."""
        # One pass over both, whatever their dtypes.
        restored: Tensor = torch.addcmul(gradient, lost, _length(gradient))
        return restored.to(gradient.dtype)

    def stored_bytes(self, size: Size) -> int:
        """Return the bytes of X in 8 bits: what steps between keep is less."""
        return self._whole.stored_bytes(size)

    def remembered_bytes(self, size: Size) -> int:
        """Return the bytes of Q and L."""
        n, r = size.features, self.directions(size.features, size.outputs)
        carried = bool(r and self.carry) * sum(size.outputs) * n
        return r * n * size.dtype.itemsize + carried * _CARRIED.itemsize

    def _along(self, size: Size) -> list[Cost]:
        """Return what a step along the directions costs, one kind of kernels after another."""
        b, n, m, item = size.tokens, size.features, sum(size.outputs), size.dtype.itemsize
        r, p = self.directions(n, size.outputs), len(size.outputs)
        costs = [
            Cost(2 * b * n * r, (b * n + b * r + r * n) * item, 1),
            Cost(2 * b * r * m, (b * m + p * b * r + m * r) * item, p),
            Cost(2 * m * r * n, (m * r + n * r + n * m) * item, 1),
        ]
        # Read for its length, then read, added to and written.
        restored = Cost(4 * n * m, n * m * (3 * item + _CARRIED.itemsize), 2 * p)
        return [*costs, restored] if self.carry else costs

    def _find(self, size: Size) -> Cost:
        """Return what finding Q costs beside factorisations, once in T steps."""
        n, m, item = size.features, sum(size.outputs), size.dtype.itemsize
        r = self.directions(n, size.outputs)
        squared = (2 * _PASSES * _ITERATIONS + 2 * _LAST_PASSES) * 3 * n * r * r
        products = 2 * (1 + 2 * _ITERATIONS) * m * n * r
        # Gradients are copied together, scaled and copied below one another; what they are read
        # for besides is their size, whether they are finite, and every product.
        moved = (3 * 2 + 2 + 1 + 2 * _ITERATIONS) * m * n * item
        return Cost(products + squared, moved, 0, squared)

    def cost(self, size: Size) -> Cost:
        """Return the mean cost of a step: one of T in 8 bits and a search, the others along Q."""
        whole = self._whole.cost(size)
        if not self.directions(size.features, size.outputs):
            return whole
        one, t = whole + self._find(size), self.every
        along = sum(self._along(size), Cost(0, 0, 0))
        return Cost(
            (one.flops + (t - 1) * along.flops) // t,
            (one.bytes + (t - 1) * along.bytes) // t,
            round((one.launches + (t - 1) * along.launches) / t),
            one.wide_flops // t,
        )

    def along_seconds(self, size: Size, device: DeviceFigures) -> float:
        """Return a model's time of one site in a step along the directions."""
        peak = device.flops(size.dtype)
        return sum(matmul_seconds(each, peak, device) for each in self._along(size))

    def together(self, size: Size) -> int:
        """Return of how many sites that are alike Q is found at once."""
        copied = sum(size.outputs) * size.features * size.dtype.itemsize
        return max(1, min(size.alike, TOGETHER // copied))

    def finding_seconds(self, size: Size, device: DeviceFigures) -> float:
        """Return a model's time of finding Q of one site: its share of what is found together.

        Outside of any graph: of operators that are launched one by one, and of factorisations,
        which take as long as their steps wait for one another, whichever takes longer.
        """
        p, together = len(size.outputs), self.together(size)
        searches = _ITERATIONS + 1
        launched = EAGER_SECONDS * (_OPERATORS * searches + _OPERATORS_AN_OUTPUT * p)
        passes = _PASSES * _ITERATIONS + _LAST_PASSES
        r = self.directions(size.features, size.outputs)
        waits = passes * factorisation_seconds(r, together)
        computed = predicted_seconds(self._find(size), device, size.dtype)
        return max(launched / together, waits / together + computed)

    def predicted_seconds(self, size: Size, device: DeviceFigures) -> float:
        """Return a model's time of a mean step of one site, with finding Q once in T steps."""
        whole = self._whole.predicted_seconds(size, device)
        if not self.directions(size.features, size.outputs):
            return whole
        one = whole + self.finding_seconds(size, device)
        return (one + (self.every - 1) * self.along_seconds(size, device)) / self.every

    def describe(self, size: Size) -> str:
        """Return r and how often X itself is kept."""
        r = self.directions(size.features, size.outputs)
        whole = self._whole.describe(size)
        return f"r = {r}, 1 of {self.every} in {whole}" if r else whole


def _length(of: Tensor) -> Tensor:
    # Squares of many entries would leave float16.
    dtype = torch.promote_types(of.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(of, dtype=dtype)
    return length


def _of_unit_size(grad: Tensor) -> Tensor:
    """Return a matrix of length 1, or of nothing; what is not finite makes all of it so."""
    narrow = torch.bfloat16 if grad.dtype.itemsize == 2 else torch.float32
    # Squares of what is very large or very small would leave float32.
    wide = torch.float32 if grad.device.type == "mps" else torch.float64
    size = torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True, dtype=wide)
    scale = torch.where(size > 0, 1 / size, 0.0)
    return grad.to(narrow) * scale.to(narrow)
