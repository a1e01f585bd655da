"""Random sites for the generated GPU kernels: how one is drawn, generated, and judged."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pamm_compile.methods.pamm import assign, contract, eager, index_dtype
from pamm_compile.methods.pamm.triton import model, plan
from pamm_compile.methods.triton.device import Device
from pamm_compile.private import inductor
from pamm_testing.triton.fake_gpu import fake_inputs, generate

DEVICES = {
    "sm_90": Device("cuda", 9, 132, 232448),
    "sm_80": Device("cuda", 8, 108, 166912),
    "gfx942": Device("hip", 0, 304, 65536),
}
LAYOUTS = ("separate", "fused", "reversed", "transposed", "strided", "repeated", "mixed")
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Draw:
    """One site: its sizes, how its tensors lie in memory, what is wrong with their values."""

    seed: int
    b: int
    n: int
    k: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    x_layout: str
    layout: str
    values: tuple[str, ...]
    with_cosine: bool
    device: str
    is_sorted: bool


def draw(seed: int) -> Draw:
    """Return the site of a seed."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    other = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    # Two widths only: that strides go a, b, a is then common.
    pool = [rng.choice([1, 3, 16, 17, 32, 64, 100, 130, 257]) for _ in range(2)]
    values = ("zero rows", "zero generators", "bad rows", "bad generators", "bad gradients", "ties")
    return Draw(
        seed,
        b=rng.choice([1, 1, 2, 3, 16, 17, 64, 100, 257, 400, rng.randrange(1, 500)]),
        n=rng.choice([1, 3, 16, 33, 48, 64, 100, rng.randrange(1, 130)]),
        k=rng.choice([1, 1, 2, 5, 16, 17, 33, 64, 130, 255, 256, 257, 300, rng.randrange(1, 400)]),
        widths=tuple(rng.choice(pool) for _ in range(rng.choice([1, 1, 2, 3, 3, 4]))),
        dtype=dtype,
        grad_dtype=dtype if rng.random() < 0.85 else other,
        x_layout=rng.choice(["contiguous", "transposed", "strided", "repeated", "slice"]),
        layout=rng.choice(LAYOUTS),
        values=tuple(v for v in values if rng.random() < 0.2),
        with_cosine=rng.random() < 0.5,
        device=rng.choice(list(DEVICES)),
        is_sorted=rng.random() < 0.4,
    )


def _matrix(layout: str, rows: int, columns: int, dtype: torch.dtype, made: Any) -> Tensor:
    """Random numbers laid out in one way."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=made).to(dtype)

    if layout == "transposed":
        return randn(columns, rows).T
    if layout == "strided":
        return randn(2 * rows, 3 * columns)[::2, ::3]
    if layout == "repeated":
        return randn(1, columns).expand(rows, columns)
    if layout == "slice":
        return randn(rows, columns + 7)[:, 5 : 5 + columns]
    return randn(rows, columns)


def tensors(d: Draw) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return X, C and what the gradients are cut out of."""
    made = torch.Generator().manual_seed(d.seed)
    rng = random.Random(d.seed + 1)
    x = _matrix(d.x_layout, d.b, d.n, d.dtype, made)
    c = _matrix("contiguous", d.k, d.n, d.dtype, made)
    shared = min(d.k, d.b)
    c[:shared] = x[torch.arange(shared) * d.b // shared]
    if d.layout in ("fused", "reversed"):
        grads = [_matrix("contiguous", d.b, sum(d.widths), d.grad_dtype, made)]
    else:
        layouts = [
            rng.choice(["separate", "transposed", "strided", "repeated", "slice"])
            if d.layout == "mixed"
            else d.layout
            for _ in d.widths
        ]
        pairs = zip(layouts, d.widths, strict=True)
        grads = [_matrix(layout, d.b, m, d.grad_dtype, made) for layout, m in pairs]
    spoil(d, rng, x, c, grads)
    return x, c, grads


def spoil(d: Draw, rng: random.Random, x: Tensor, c: Tensor, grads: list[Tensor]) -> None:
    """Put zeros, ties and values that are not finite into the tensors."""

    def entry(tensor: Tensor, value: float) -> None:
        tensor[rng.randrange(tensor.shape[0]), rng.randrange(tensor.shape[1])] = value

    if "ties" in d.values and d.k > 1:
        c[rng.randrange(1, d.k)] = -c[0]
    if "zero rows" in d.values:
        x[rng.randrange(d.b)] = 0
    if "zero generators" in d.values and d.k > 2:
        c[rng.randrange(d.k)] = 0
    if "bad generators" in d.values and d.k > 3:
        entry(c, rng.choice([NAN, INF, -INF]))
    if "bad rows" in d.values:
        for _ in range(2):
            entry(x, rng.choice([NAN, INF, -INF]))
    if "bad gradients" in d.values:
        entry(rng.choice(grads), rng.choice([NAN, INF, -INF]))


def split(d: Draw, grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients, cut out of one matrix where that is how they lie."""
    if d.layout not in ("fused", "reversed"):
        return grads
    parts = list(grads[0].split(list(d.widths), dim=1))
    return parts[::-1] if d.layout == "reversed" else parts


def site(d: Draw) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function that is compiled."""

    def run(x: Tensor, c: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        index, scale, cosine = assign(x, c, index_dtype(d.k))
        sums = contract(index, scale, split(d, list(grads)), d.k)
        return (index, scale, sums, cosine) if d.with_cosine else (index, scale, sums)

    return run


def _rotated(tiles: Callable[..., list[Any]], by: int) -> Callable[..., list[Any]]:
    def rotate(*args: Any) -> list[Any]:
        ways = tiles(*args)
        return ways[by % len(ways) :] + ways[: by % len(ways)]

    return rotate


def code(d: Draw, inputs: list[Tensor]) -> str:
    """Return the wrapper that Inductor writes for the site, on one device and for one choice."""
    fakes = fake_inputs(
        lambda: [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in inputs
        ]
    )
    with (
        mock.patch.object(inductor, "device_properties", return_value=DEVICES[d.device]),
        mock.patch.object(plan, "assign_tiles", _rotated(plan.assign_tiles, d.seed)),
        mock.patch.object(plan, "contract_tiles", _rotated(plan.contract_tiles, d.seed)),
        mock.patch.object(model, "is_sorted", return_value=d.is_sorted),
    ):
        return generate(site(d), fakes).wrappers["graph"]


def judge(d: Draw, x: Tensor, c: Tensor, grads: list[Tensor], got: list[Tensor]) -> None:
    """Compare what the kernels gave with the definition in float64, and with the eager kernels."""
    index, scale, sums, *rest = got
    expected = eager.assign(x, c, torch.int64)
    assert index.dtype == index_dtype(d.k)
    at = index.long()
    assert bool((at < d.k).all())

    finite = x.isfinite().all(1)
    assert torch.equal(scale.isfinite(), finite), "rows that are not finite, and they alone, show"
    assert not at[~finite].any()
    wide_x, wide_c = x.double(), c.double()
    usable = wide_c.isfinite().all(1) & (wide_c != 0).any(1)
    norms = torch.where(usable, wide_c.norm(dim=1), 1.0)
    wide_c = torch.where(usable[:, None], wide_c, 0.0)
    rows = finite & (wide_x != 0).any(1)
    assert not scale[finite & ~rows].any()
    lengths = wide_x.norm(dim=1)[rows]
    if usable.any():
        assert bool(usable[at[rows]].all())
        scores = (wide_x[rows] @ wide_c.T) / norms / lengths[:, None]
        scores = torch.where(usable, scores, 0.0)
        chosen = scores.gather(1, at[rows, None])[:, 0]
        lost = scores.abs().max(1).values - chosen.abs()
        assert bool((lost <= 1e-5).all()), lost.max()
        exact = chosen * lengths / norms[at[rows]]
        unit = torch.finfo(d.dtype).eps
        bound = unit * exact.abs() + 1e-5 * lengths / norms[at[rows]]
        if d.dtype == torch.float16:
            bound = bound + torch.finfo(d.dtype).smallest_normal * unit
        assert bool(((scale.double()[rows] - exact).abs() <= bound).all())
        if rest:
            assert bool(((rest[0].double()[rows] - chosen).abs() <= 1e-5).all())
    if rest:
        torch.testing.assert_close(rest[0].isnan(), expected[2].isnan())
        torch.testing.assert_close(rest[0][finite & ~rows], expected[2][finite & ~rows])

    parts = split(d, grads)
    theirs = eager.contract(index, scale, parts, d.k)
    assert sums.shape == theirs.shape
    bad = ~theirs.isfinite()
    assert not sums[bad].isfinite().any(), "what is not finite shows"
    # Zeros of the one-hot matrix spread it over the generators of its column, and over the columns
    # of its generator, no further.
    clean = ~bad.any(1)[:, None] & ~bad.any(0)[None, :]
    weights = torch.zeros(d.k, sums.shape[1], dtype=torch.float64)
    sizes = scale.double().abs()[:, None] * torch.cat(parts, 1).double().abs()
    weights.index_add_(0, at, sizes)
    exact_sums = torch.zeros_like(weights)
    exact_sums.index_add_(0, at, scale.double()[:, None] * torch.cat(parts, 1).double())
    error = (sums.double() - exact_sums).abs()[clean]
    assert bool((error <= 1e-5 * weights[clean] + 1e-30).all()), error.max()
