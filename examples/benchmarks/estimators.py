"""The methods that the studies compare: ways to keep an input X in fewer bytes than X has.

Each stores something of X [b, n] in the forward pass and makes an approximation X̂ of it for the
weight gradients of the backward pass, dW ≈ dZᵀ X̂. They are written for comparison, not for speed:
X̂ is formed whole, where an implementation would multiply its factors one after the other. What is
stored is rounded to the dtype it would be stored in, and its bytes are those of the stored tensors.

A method is written "name:size[,option…]", stages that code what the stages before them left are
joined by "+", and "@N" at the end keeps the first N steps exact:

    exact                   X itself
    pamm:16                 PAMM with k = 16 generators
    pamm:16,uniform,epsilon=0.5,scale=norm,refine,draws=4
    rows:64                 k sampled rows, rescaled (uniform CRS: PAMM with ε = 0)
    hidden:8                random projection of the features to r (the idea of CompAct)
    sketch:64               count sketch of the tokens into k buckets
    directions:4            r principal directions, by two power iterations
    directions:4+pamm:16    the same, and PAMM on the rest
    pamm:fill=16            as many generators as fit into 16 bytes a token; also after a "+"
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from pamm_compile.methods.pamm import assign, index_dtype
from pamm_compile.methods.pamm.compression import sample_rows

_CLIP = 3.0
_FAR_APART = 1 << 20


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a stage keeps, and the approximation that the backward pass makes of it."""

    tensors: tuple[Tensor, ...]
    approximation: Tensor
    """X̂, [b, n], fp32."""
    index: Tensor | None = None
    """The generator of every token, [b], where there are generators."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One coder of X, or of what earlier stages left of it."""

    name: str
    size: int | None
    """k or r; None if it is to be derived from `fill`."""
    fill: float | None = None
    """Bytes a token that the method may store, earlier stages included."""
    sampling: str = "stratified"
    epsilon: float | None = None
    scale: str = "projection"
    refine: int = 0
    draws: int = 1


@dataclasses.dataclass(frozen=True)
class Method:
    """A chain of stages, after some exact steps."""

    text: str
    stages: tuple[Stage, ...]
    exact_steps: int = 0

    def store(self, x: Tensor, generator: torch.Generator, dtype: torch.dtype) -> list[Stored]:
        """Run all stages on an input.

        Args:
            x: [b, n], fp32.
            generator: draws what is random.
            dtype: of what is stored, indices aside.

        Returns:
            What each stage keeps; X̂ is the sum of their approximations.
        """
        kept: list[Stored] = []
        rest = x
        for stage in self.stages:
            used = sum(each.bytes for each in kept)
            size = stage.size or _fitting(stage, used, x.shape[0], x.shape[1], dtype)
            kept.append(_CODERS[stage.name](rest, size, stage, generator, dtype))
            rest = rest - kept[-1].approximation
        return kept


def parse(text: str) -> Method:
    """Read a method as this module's docstring writes it."""
    body, _, warmup = text.partition("@")
    stages = []
    for part in body.split("+"):
        name, _, rest = part.partition(":")
        if name not in _CODERS:
            raise SystemExit(f"{text!r}: no method {name!r}; there are {', '.join(_CODERS)}")
        fields: dict[str, object] = {"size": None}
        for option in filter(None, rest.split(",")):
            key, _, given = option.partition("=")
            if re.fullmatch(r"\d+", option):
                fields["size"] = int(option)
            elif option in ("uniform", "stratified"):
                fields["sampling"] = option
            elif option == "refine":
                fields["refine"] = 1
            elif key in ("refine", "draws"):
                fields[key] = int(given)
            elif key in ("epsilon", "fill"):
                fields[key] = float(given)
            elif key == "scale" and given in _SCALES:
                fields[key] = given
            else:
                raise SystemExit(f"{text!r}: no option {option!r}")
        if name != "exact" and (fields["size"] is None) == ("fill" not in fields):
            raise SystemExit(f"{text!r}: {name} needs a size or fill=, and not both")
        stages.append(Stage(name, **fields))  # type: ignore[arg-type]
    return Method(text, tuple(stages), int(warmup or 0))


def _fitting(stage: Stage, used: int, tokens: int, features: int, dtype: torch.dtype) -> int:
    """Return the largest size whose bytes fit what `fill` leaves, at least 1."""
    if stage.fill is None:
        return 0
    left = stage.fill * tokens - used
    size = 1
    while _cost(stage, size + 1, tokens, features, dtype.itemsize) <= left:
        size += 1
    return size


def _cost(stage: Stage, size: int, tokens: int, features: int, item: int) -> int:
    if stage.name == "pamm":
        bytes_a_token = index_dtype(size).itemsize + item
        return stage.draws * (size * features * item + tokens * bytes_a_token)
    if stage.name == "rows":
        return size * (features * item + 4)
    if stage.name == "hidden":
        return size * tokens * item
    if stage.name == "sketch":
        return size * features * item
    return size * (tokens + features) * item


def _rounded(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    stored = tensor.to(dtype)
    return stored, stored.float()


def _exact(x: Tensor, _size: int, _stage: Stage, _g: torch.Generator, dtype: torch.dtype) -> Stored:
    stored, back = _rounded(x, dtype)
    return Stored((stored,), back)


def _pamm(x: Tensor, k: int, stage: Stage, g: torch.Generator, dtype: torch.dtype) -> Stored:
    draws = [_pamm_once(x, k, stage, g, dtype) for _ in range(stage.draws)]
    if len(draws) == 1:
        return draws[0]
    mean = torch.stack([each.approximation for each in draws]).mean(0)
    return Stored(tuple(t for each in draws for t in each.tensors), mean, draws[0].index)


def _pamm_once(x: Tensor, k: int, stage: Stage, g: torch.Generator, dtype: torch.dtype) -> Stored:
    tokens = x.shape[0]
    seed = torch.randint(2**31, (), generator=g)
    rows = sample_rows(tokens, k, seed, stage.sampling)  # type: ignore[arg-type]
    stored, generators = _rounded(x[rows], dtype)
    index, alpha, cosine = assign(x, generators, index_dtype(k))
    for _ in range(stage.refine):
        # The members' least-squares generator; those that nobody chose stay as they are.
        weight = torch.zeros(k).index_add_(0, index.long(), alpha.square())
        moved = torch.zeros_like(generators).index_add_(0, index.long(), alpha[:, None] * x)
        better = torch.where(weight[:, None] > 0, moved / weight[:, None], generators)
        stored, generators = _rounded(better, dtype)
        index, alpha, cosine = assign(x, generators, index_dtype(k))
    alpha = _SCALES[stage.scale](alpha, cosine)
    if stage.epsilon is not None and stage.epsilon < 1:
        dropped = cosine.square() < 1 - stage.epsilon**2
        dropped[rows] = False
        beta = Fraction(tokens, int((~dropped).sum()))
        alpha = torch.where(dropped, 0.0, alpha * float(beta))
    scale, back = _rounded(alpha, dtype)
    return Stored((stored, index, scale), back[:, None] * generators[index.long()], index)


# Of α = ⟨x, c⟩ / ‖c‖², the coefficient of the orthogonal projection onto the generator.
_SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "projection": lambda alpha, cosine: alpha,
    # X̂ as long as X.
    "norm": lambda alpha, cosine: alpha / cosine.abs().clamp(min=1e-12),
    # ⟨X̂, X⟩ = ‖X‖², up to a limit.
    "unshrunk": lambda alpha, cosine: alpha * (1 / cosine.square().clamp(min=1 / _CLIP)),
}


def _rows(x: Tensor, k: int, _stage: Stage, g: torch.Generator, dtype: torch.dtype) -> Stored:
    rows = torch.randperm(x.shape[0], generator=g)[:k]
    stored, back = _rounded(x[rows], dtype)
    approximation = torch.zeros_like(x).index_copy_(0, rows, back * (x.shape[0] / k))
    return Stored((rows.int(), stored), approximation)


def _hidden(x: Tensor, r: int, _stage: Stage, g: torch.Generator, dtype: torch.dtype) -> Stored:
    # Made again from its seed in the backward pass, so that only the coefficients are stored.
    projection = torch.randn(x.shape[1], r, generator=g) * r**-0.5
    stored, back = _rounded(x @ projection, dtype)
    return Stored((stored,), back @ projection.T)


def _sketch(x: Tensor, k: int, _stage: Stage, g: torch.Generator, dtype: torch.dtype) -> Stored:
    # Buckets and signs are made again from their seed.
    bucket = torch.randint(k, (x.shape[0],), generator=g)
    sign = torch.randint(2, (x.shape[0], 1), generator=g) * 2.0 - 1
    sums = torch.zeros(k, x.shape[1]).index_add_(0, bucket, sign * x)
    stored, back = _rounded(sums, dtype)
    return Stored((stored,), sign * back[bucket])


def _directions(x: Tensor, r: int, _stage: Stage, g: torch.Generator, dtype: torch.dtype) -> Stored:
    basis = torch.randn(x.shape[1], r, generator=g)
    for _ in range(2):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    stored, directions = _rounded(basis, dtype)
    coefficients, back = _rounded(x @ directions, dtype)
    return Stored((stored, coefficients), back @ directions.T)


_CODERS: dict[str, Callable[[Tensor, int, Stage, torch.Generator, torch.dtype], Stored]] = {
    "exact": _exact,
    "pamm": _pamm,
    "rows": _rows,
    "hidden": _hidden,
    "sketch": _sketch,
    "directions": _directions,
}


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator of its own for a seed, a step, a site and so on."""
    seed = 0
    for number in numbers:
        seed = (seed * _FAR_APART + number * 7919 + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
