"""Methods that are compared and not shipped.

All have the protocol of `pamm_compile.methods.base.Method`, so that a study runs them as it runs
the package's own, and `pamm_compile.backend(rules={"qkv": Rows(64)})` takes them too. They are
written for comparison, not for speed. choices.py says how a study writes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pamm_compile import Pamm
from pamm_compile.methods import METHODS
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm import assign, index_dtype
from pamm_compile.methods.pamm.compression import Compressed, weight_gradients
from pamm_compile.methods.sampling import Sampling, content_seed, sample_rows, site_seed
from pamm_compile.size import Cost, Size, exact_cost

_CLIP = 3.0
_MASK = 0x7FFFFFFF


class Estimator:
    """What the methods of this module share: they are not timed, so that their cost is unknown."""

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return repr(self)

    def cost(self, size: Size) -> Cost:
        """Return that of the exact gradients: nobody has measured another."""
        return exact_cost(size)

    def describe(self, size: Size) -> str:
        """Return the name and its options."""
        return repr(self)


def _bits(seed: Tensor, *shape: int) -> Tensor:
    """Return numbers in [0, 2³¹) that follow from a seed, the same in both passes."""
    place = torch.arange(math.prod(shape), device=seed.device).view(shape)
    return site_seed((seed + place * 7919) & _MASK, 1)


def gradients(
    estimate: Callable[[Tensor], Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
) -> list[Tensor]:
    """Return what is estimated of every dZ, transposed where that is asked for."""
    found = [estimate(grad) for grad in grads]
    return [dw.T if flip else dw for dw, flip in zip(found, transposed, strict=True)]


@dataclasses.dataclass(frozen=True)
class Exact(Estimator):
    """X itself."""

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return (x,)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        return gradients(lambda grad: grad.T @ stored[0], grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return size.bytes


@dataclasses.dataclass(frozen=True)
class Rows(Estimator):
    """k sampled rows, rescaled: dW ≈ (b/k) Σ_{i sampled} dZ_iᵀ X_i."""

    k: int

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        rows = sample_rows(x.shape[0], min(self.k, x.shape[0]), seed, "uniform")
        return x[rows], rows.int()

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        x, rows = stored
        factor = grads[0].shape[0] / rows.shape[0]
        return gradients(lambda grad: grad[rows.long()].T @ x * factor, grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return self.k * (size.features * size.dtype.itemsize + 4)


@dataclasses.dataclass(frozen=True)
class Hidden(Estimator):
    """The features projected to r by random signs, which are made again: X̂ = (XP)Pᵀ."""

    r: int

    def _signs(self, seed: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        return ((_bits(seed, features, self.r) & 1) * 2.0 - 1).to(dtype) * self.r**-0.5

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        # The features are needed to make the signs again, and a shape cannot be stored alone.
        width = x.new_empty((x.shape[1], 0))
        return x @ self._signs(seed, x.shape[1], x.dtype), seed, width

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        coefficients, seed, width = stored
        signs = self._signs(seed, width.shape[0], coefficients.dtype)
        return gradients(lambda grad: grad.T @ coefficients @ signs.T, grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return self.r * size.tokens * size.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Sketch(Estimator):
    """Tokens summed with random signs into k buckets, both made again."""

    k: int

    def _places(self, seed: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        bucket = _bits(seed, tokens) % self.k
        return bucket, (_bits(site_seed(seed, 2), tokens) & 1) * 2.0 - 1

    def _sums(self, seed: Tensor, rows: Tensor) -> Tensor:
        bucket, sign = self._places(seed, rows.shape[0])
        signed = sign[:, None].to(rows.dtype) * rows
        return rows.new_zeros(self.k, rows.shape[1]).index_add(0, bucket, signed)

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return self._sums(seed, x), seed

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        sums, seed = stored
        return gradients(lambda grad: self._sums(seed, grad).T @ sums, grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return self.k * size.features * size.dtype.itemsize


# Of α = ⟨x, c⟩ / ‖c‖², the coefficient of the orthogonal projection onto the generator.
SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "projection": lambda alpha, cosine: alpha,
    # X̂ as long as X.
    "norm": lambda alpha, cosine: alpha / cosine.abs().clamp(min=1e-12).to(alpha.dtype),
    # ⟨X̂, X⟩ = ‖X‖², up to a limit.
    "unshrunk": lambda alpha, cosine: alpha / cosine.square().clamp(min=1 / _CLIP).to(alpha.dtype),
}


@dataclasses.dataclass(frozen=True)
class Variant(Estimator):
    """PAMM with another scale, with refined generators, or the mean of several draws."""

    k: int
    scale: str = "projection"
    refine: int = 0
    draws: int = 1
    sampling: Sampling = "stratified"

    def _draw(self, x: Tensor, seed: Tensor) -> Compressed:
        k = min(self.k, x.shape[0])
        generators = x[sample_rows(x.shape[0], k, seed, self.sampling)]
        index, alpha, cosine = assign(x, generators, index_dtype(k))
        for _ in range(self.refine):
            # The members' least-squares generator; those that nobody chose stay as they are.
            members = index.long()
            weight = alpha.new_zeros(k).index_add(0, members, alpha.square())[:, None]
            moved = torch.zeros_like(generators).index_add(0, members, alpha[:, None] * x)
            generators = torch.where(weight > 0, moved / weight, generators)
            index, alpha, cosine = assign(x, generators, index_dtype(k))
        return Compressed(generators, index, SCALES[self.scale](alpha, cosine))

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        draws = [self._draw(x, site_seed(seed, draw)) for draw in range(self.draws)]
        return tuple(tensor for draw in draws for tensor in draw)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        draws = [
            weight_gradients(Compressed(*stored[at : at + 3]), grads, transposed)
            for at in range(0, len(stored), 3)
        ]
        return [torch.stack(of).mean(0) for of in zip(*draws, strict=True)]

    def stored_bytes(self, size: Size) -> int:
        item = size.dtype.itemsize
        a_token = index_dtype(self.k).itemsize + item
        return self.draws * (self.k * size.features * item + size.tokens * a_token)


def generators(
    k: int,
    scale: str = "projection",
    refine: int = 0,
    draws: int = 1,
    sampling: Sampling = "stratified",
    epsilon: float | None = None,
) -> Method:
    """Return PAMM with k generators: the package's own, wherever it has what is asked for."""
    if (scale, refine, draws) == ("projection", 0, 1):
        return Pamm(ratio=2**31, min_generators=k, sampling=sampling, epsilon=epsilon)
    if scale not in SCALES or epsilon is not None:
        raise SystemExit(f"no scale {scale!r}, or ε with it; there are {', '.join(SCALES)}")
    return Variant(k, scale, refine, draws, sampling)


@dataclasses.dataclass(frozen=True)
class Chain(Estimator):
    """A method, and another for what it leaves over: X̂ is the sum of both."""

    first: Method
    second: Method

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        stored = self.first.store(x, seed, outputs)
        rest = x - approximation(self.first, stored, x)
        count = x.new_empty((len(stored), 0))
        return (count, *stored, *self.second.store(rest, site_seed(seed, 1), outputs))

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        split = 1 + stored[0].shape[0]
        first = self.first.weight_gradients(stored[1:split], grads, transposed)
        second = self.second.weight_gradients(stored[split:], grads, transposed)
        return [a + b for a, b in zip(first, second, strict=True)]

    def stored_bytes(self, size: Size) -> int:
        return self.first.stored_bytes(size) + self.second.stored_bytes(size)


@dataclasses.dataclass(frozen=True)
class Filled(Estimator):
    """As large as fits into some bytes a token, counted in bfloat16, and at least 1."""

    make: Callable[[int], Method]
    bytes_a_token: float

    def fitting(self, tokens: int, features: int, outputs: Sequence[int]) -> int:
        size = Size(tokens, features, tuple(outputs), torch.bfloat16)
        most = 1
        while (
            most < min(tokens, 4 * features)
            and self.make(most + 1).stored_bytes(size) <= self.bytes_a_token * tokens
        ):
            most += 1
        return most

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        size = self.fitting(x.shape[0], x.shape[1], outputs)
        return (*self.make(size).store(x, seed, outputs), x.new_empty((size, 0)))

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        *kept, size = stored
        return self.make(size.shape[0]).weight_gradients(kept, grads, transposed)

    def stored_bytes(self, size: Size) -> int:
        return self.make(self.fitting(size.tokens, size.features, size.outputs)).stored_bytes(size)


def directions(r: int) -> Method:
    """Return r principal directions that are not quantised."""
    return METHODS["subspace"](rank=r, bits=None, iterations=2)


def approximation(method: Method, stored: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return X̂, what a method keeps of an input: dZᵀX̂ for dZ the identity.

    Args:
        method: any.
        stored: what it stored of `x`.
        x: [b, n].
    """
    identity = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    return method.weight_gradients(stored, [identity], [False])[0].to(x.dtype)


def seed_of(x: Tensor, *numbers: int) -> Tensor:
    """Return a seed for a step, a site, a draw and so on, as the package derives one for a site."""
    seed = content_seed(x, 0)
    for number in numbers:
        seed = site_seed(seed, number)
    return seed
