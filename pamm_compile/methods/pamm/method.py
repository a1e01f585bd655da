"""PAMM as a method: k sampled rows, and for every token the closest one and a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import get_args

from torch import Tensor

from pamm_compile import checks
from pamm_compile.devices import DeviceFigures
from pamm_compile.methods.pamm.compression import (
    Compressed,
    compress,
    num_generators,
    weight_gradients,
)
from pamm_compile.methods.pamm.operators import index_dtype
from pamm_compile.methods.pamm.triton import model
from pamm_compile.methods.sampling import Sampling
from pamm_compile.size import Cost, Size


@dataclass(frozen=True)
class Pamm:
    """Point-Approximate Matrix Multiplication: dW ≈ (Σ_{i: f_i=j} α_i dZ_i)ᵀ C.

    Equivalent to, with rows drawn anew at every step and f, α as `pamm::assign` gives them:

        C = X[rows]
        dW = dZ.T @ (α[:, None] * C[f])

    Args:
        ratio: b / k, tokens per generator, at least 1; k = ceil(b / ratio).
        epsilon: drop tokens whose relative distance to their generator exceeds this, in [0, ∞),
            and rescale the rest; None (∞) keeps all, the paper's best.
        sampling: "stratified" draws one generator in each of k equal intervals of tokens;
            "uniform" draws k of all, as the paper does.
        min_generators: lower bound of k; k, not the ratio alone, decides quality.

    Raises:
        InvalidOptionError: a value is not allowed.

    Source: arXiv 2506.02939 §3.
    """

    ratio: float = 256
    epsilon: float | None = None
    sampling: Sampling = "stratified"
    min_generators: int = 1
    exact_ratio: Fraction = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        allowed = "a finite number of at least 1"
        hint = "It is b / k, tokens per generator: 256 keeps one row of the input in 256."
        ratio = checks.number("ratio", self.ratio, allowed, hint)
        if not 1 <= ratio < math.inf:
            raise checks.refusal("ratio", self.ratio, allowed, hint)
        object.__setattr__(self, "ratio", int(ratio) if ratio.is_integer() else ratio)
        # repr gives the decimal the user wrote: 1.1 means 11/10, not its binary neighbour.
        object.__setattr__(self, "exact_ratio", Fraction(repr(ratio)))
        object.__setattr__(self, "epsilon", _gate(self.epsilon))
        checks.choice("sampling", self.sampling, get_args(Sampling))
        least = checks.integer("min_generators", self.min_generators, 1, "1 sets no lower bound.")
        object.__setattr__(self, "min_generators", least)

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr((self.ratio, self.epsilon, self.sampling, self.min_generators))

    def generators(self, tokens: int) -> int:
        """Return k for a number of tokens."""
        return int(num_generators(tokens, self.exact_ratio, self.min_generators))

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        """Return C [k, n], f [b] and α [b]."""
        # A plain tuple: fx would trace the construction of a named one.
        return tuple(
            compress(
                x,
                seed,
                ratio=self.exact_ratio,
                min_generators=self.min_generators,
                sampling=self.sampling,
                epsilon=self.epsilon,
            )
        )

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Return dW of every projection, from one contraction for all of them."""
        return weight_gradients(Compressed(*stored), grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        """Return the bytes of C, f and α."""
        k, item = self.generators(size.tokens), size.dtype.itemsize
        # Symbolic sizes fix the index's dtype before k is known.
        index = 4 if size.symbolic else index_dtype(k).itemsize
        return k * size.features * item + size.tokens * (index + item)

    def cost(self, size: Size) -> Cost:
        """Return the cost of assigning, contracting and finishing."""
        b, n, m, item = size.tokens, size.features, sum(size.outputs), size.dtype.itemsize
        k = self.generators(b)
        codes = self.stored_bytes(size) - k * n * item
        scores = 2 * b * k * n
        if size.device == "cpu":
            # The eager kernels: in float32, through a copy where X is narrower; scores are written
            # and read; tokens are summed in place of a matmul.
            copied = 0 if item >= 4 else 8
            assign = Cost(scores, b * n * (2 * item + copied) + 12 * b * k + codes, 2, scores)
            contract = Cost(2 * b * m, b * m * (item + copied) + codes + 4 * k * m, 2, 2 * b * m)
        else:
            assign = Cost(scores, (b * n + 2 * k * n) * item + codes, 2)
            contract = Cost(2 * b * k * m, b * m * item + codes + 4 * k * m, 2)
        finish = Cost(2 * k * n * m, (k * n + k * m + n * m) * item, 1)
        return assign + contract + finish

    def predicted_seconds(self, size: Size, device: DeviceFigures) -> float:
        """Return a model's time of the kernels of one site on a GPU, forward and backward."""
        times = model.site_times(size, self.generators(size.tokens), device)
        return sum(time.seconds for time in times)

    def describe(self, size: Size) -> str:
        """Return "k = 64"."""
        return f"k = {self.generators(size.tokens)}"


def _gate(epsilon: object) -> float | None:
    if epsilon is None:
        return None
    allowed = "None (keep every token) or a number of at least 0"
    hint = "0 keeps only the generators themselves; 1 and above keep every token."
    given = checks.number("epsilon", epsilon, allowed, hint)
    if given < 0:
        raise checks.refusal("epsilon", epsilon, allowed, hint)
    # cosine² ≥ 1 − ε² holds for every token once ε ≥ 1, so these are one configuration.
    return given if given < 1 else None
