"""Peak figures of GPUs, and a model of the time that a cost takes on one.

Nothing here was timed by us: times are bounds from data sheets, times the shares of the peaks that
are assumed to be reached, and latencies that others have published. They are for comparing methods
and tiles where no such device is at hand.
"""

from __future__ import annotations

import bisect
import math
import re
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from pamm_compile import checks
from pamm_compile.size import Cost, Size, exact_cost

MATMUL_SHARE = 0.66
"""Assumed of the peak: what large bfloat16 matmuls reach where power limits the clock."""
BANDWIDTH_SHARE = 0.9
"""Assumed of the peak of main memory."""
CACHE_SHARE = 0.7
"""Assumed of the peak of the L2 cache."""
ISSUE_SHARE = 0.8
"""Assumed of one instruction a scheduler and clock."""

EAGER_SECONDS = 7e-6
"""Of an operator outside of any graph, however small, on an H100: pull request 146 of
github.com/meta-pytorch/autoparallel. On an A100 8 µs: pull request 27 of
github.com/flagos-ai/Torch-FL. On others unknown."""
CHOLESKY_SECONDS = {
    1: {16: 34.8e-6, 128: 108.6e-6, 512: 376.1e-6, 2048: 1954.3e-6},
    16: {16: 46.1e-6, 128: 157.7e-6, 512: 834.9e-6, 2048: 10598.4e-6},
    64: {16: 46.1e-6, 128: 174.5e-6, 512: 1261.4e-6, 2048: 22181.2e-6},
}
"""By matrices at once, and by rows: cuSOLVER in float32 on an H100, github.com/pytorch/pytorch pull
request 173515. Of other devices unknown, and taken to be the same."""
SOLVE_SHARE = 0.4
"""Of these, what a triangular solve takes: two of 16 × 128 × 128 take 120.8 µs, pull request 175898
of the same place."""


@dataclass(frozen=True)
class DeviceFigures:
    """What a data sheet says of a GPU."""

    name: str
    target: str
    """Triton's architecture."""
    processors: int
    """Multiprocessors."""
    clock: float
    """Hz, boosted."""
    half: float
    """Floating-point operations a second of dense matmuls in 16 bits."""
    tf32: float
    """The same in TF32."""
    single: float
    """The same in float32 without matrix units."""
    bandwidth: float
    """Bytes a second of main memory."""
    cache_bandwidth: float
    """Bytes a second from the L2 cache."""
    launch: float
    """Seconds from one kernel of a stream to the next."""
    source: str
    goes_by: str
    """A regular expression of the names that drivers give it."""
    float8: float = 0.0
    """As `half`, in torch.float8_e4m3fn; 0 where it has no such matmuls."""

    def flops(self, dtype: torch.dtype) -> float:
        """Return the peak for matmuls of a dtype, float32 by PyTorch's default of no TF32."""
        return self.half if dtype.itemsize == 2 else self.single

    @property
    def issue(self) -> float:
        """Instructions of warps a second."""
        return 4 * self.processors * self.clock


_L2 = "L2: 5120 bytes a clock, NVIDIA A100 architecture whitepaper, assumed of Hopper too"
DEVICES = {
    "a100": DeviceFigures(
        "A100 SXM 80 GB",
        "sm_80",
        108,
        1.41e9,
        312e12,
        156e12,
        19.5e12,
        2.039e12,
        5120 * 1.41e9,
        2e-6,
        f"NVIDIA A100 data sheet (2021); {_L2}",
        r"A100[- ]SXM4[- ]80GB",
    ),
    "h100": DeviceFigures(
        "H100 SXM 80 GB",
        "sm_90",
        132,
        1.83e9,
        989.4e12,
        494.7e12,
        66.9e12,
        3.35e12,
        5120 * 1.83e9,
        2e-6,
        f"NVIDIA H100 data sheet and architecture whitepaper (2022); {_L2}",
        r"H100 80GB HBM3",
        1978.9e12,
    ),
    "h200": DeviceFigures(
        "H200 SXM 141 GB",
        "sm_90",
        132,
        1.83e9,
        989.4e12,
        494.7e12,
        66.9e12,
        4.8e12,
        5120 * 1.83e9,
        2e-6,
        f"NVIDIA H200 data sheet (2023); {_L2}",
        r"\bH200$",
        1978.9e12,
    ),
    "b200": DeviceFigures(
        "B200 SXM 180 GB",
        "sm_100",
        148,
        1.86e9,
        2250e12,
        1100e12,
        80e12,
        8e12,
        5120 * 1.86e9,
        2e-6,
        "NVIDIA Blackwell architecture brief (2024), HGX B200, dense; clock: what the peak in 16 "
        "bits stands for; L2: unknown, that of an A100 by its clock",
        r"\bB200$",
        4500e12,
    ),
    "mi300x": DeviceFigures(
        "MI300X",
        "gfx942",
        304,
        2.1e9,
        1307.4e12,
        653.7e12,
        163.4e12,
        5.3e12,
        17.2e12,
        4e-6,
        "AMD MI300X data sheet (2023); cache: its Infinity Cache",
        r"MI300X",
    ),
}
"""By name; the command line, errors and the docs of examples read this table.

Of launches, the seconds are those from one kernel of a stream to the next: assumed, not published.
Other forms of these devices, with other figures, other GPUs, RTX cards among them, and MPS are
unknown.
"""
STANDS_FOR_UNKNOWN = "h100"
"""What a device is judged by whose figures are unknown."""


class Costed(Protocol):
    """What a method is to a model of the time: something that has a cost at a site."""

    def cost(self, size: Size) -> Cost:
        """Return what it computes and moves for one site and step."""
        ...


@runtime_checkable
class Predicted(Protocol):
    """A method that has a model of its own kernels."""

    def predicted_seconds(self, size: Size, device: DeviceFigures) -> float:
        """Return a model's time of what `store` and `weight_gradients` do for one site and step."""
        ...


def device_named(name: str) -> DeviceFigures:
    """Return the figures of a GPU in `DEVICES`, such as "h100".

    Raises:
        InvalidOptionError: no other is known.
    """
    key = name.strip().lower()
    checks.choice("device", key, list(DEVICES))
    return DEVICES[key]


def at_hand(kind: str) -> DeviceFigures | None:
    """Return the figures of the current device of a kind; None if they are unknown.

    Args:
        kind: type of the device, such as "cuda".
    """
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    return known_as(torch.cuda.get_device_name())


def known_as(name: str) -> DeviceFigures | None:
    """Return the figures of a GPU by its driver's name, such as "NVIDIA H200"; None if unknown."""
    # A part of a device has not the figures of the whole.
    found = (each for each in DEVICES.values() if re.search(each.goes_by, name))
    return None if "MIG" in name else next(found, None)


def factorisation_seconds(rows: int, matrices: int) -> float:
    """Return the time of a Cholesky factorisation of square matrices and a solve with each.

    Between published sizes it is assumed to grow by a power of them.

    Args:
        rows: of a matrix.
        matrices: at once.
    """
    by_rows = {count: _between(times, rows) for count, times in CHOLESKY_SECONDS.items()}
    return (1 + SOLVE_SHARE) * _between(by_rows, matrices)


def _between(known: dict[int, float], at: int) -> float:
    sizes = sorted(known)
    place = min(max(bisect.bisect(sizes, at), 1), len(sizes) - 1)
    low, high = sizes[place - 1], sizes[place]
    share = math.log(max(at, sizes[0]) / low) / math.log(high / low)
    factor: float = (known[high] / known[low]) ** share
    return known[low] * factor


def predicted_seconds(cost: Cost, device: DeviceFigures, dtype: torch.dtype) -> float:
    """Return a model's time of a cost: arithmetic, memory and launches, one after another.

    Of several kernels in a row one waits for arithmetic and the next for memory, so that nothing
    is assumed to overlap.

    Args:
        cost: of a method at one site.
        device: from `device_named`.
        dtype: of what is multiplied.

    Returns:
        Seconds.
    """
    arithmetic = (cost.flops - cost.wide_flops) / (MATMUL_SHARE * device.flops(dtype))
    wide = cost.wide_flops / (MATMUL_SHARE * device.single)
    memory = cost.bytes / (BANDWIDTH_SHARE * device.bandwidth)
    return arithmetic + wide + memory + cost.launches * device.launch


def exact_seconds(size: Size, device: DeviceFigures) -> float:
    """Return a model's time of the exact weight gradients of a site: matmuls, and casts for them.

    In float8 both factors are cast along tokens for this matmul alone; with one scale for all, what
    the other matmuls read is rearranged instead.
    """
    if not (size.scaled and device.float8):
        return matmul_seconds(exact_cost(size), device.flops(size.dtype), device)
    cost = exact_cost(replace(size, dtype=torch.float8_e4m3fn))
    product = matmul_seconds(cost, device.float8, device)
    b, n, m = size.tokens, size.features, sum(size.outputs)
    factors = 1 + len(size.outputs)
    if size.scales > size.casts:
        casts = float8_cast(b * (n + m), size.dtype, factors)
    else:
        casts = Cost(0, 2 * b * (n + m), factors)
    return product + predicted_seconds(casts, device, size.dtype)


def float8_cast(entries: int, dtype: torch.dtype, tensors: int, *, reads: int = 2) -> Cost:
    """Return what casts to float8 cost: a pass for the scales, and one that writes.

    Args:
        entries: of all tensors together.
        dtype: of these.
        tensors: how many.
        reads: 1 where scales are of rows, or known from the peaks of rows.
    """
    return Cost(4 * entries, entries * (reads * dtype.itemsize + 1), reads * tensors)


def matmul_seconds(cost: Cost, peak: float, device: DeviceFigures) -> float:
    """Return a model's time of matmuls: what takes longer, reading or multiplying.

    Args:
        cost: of matmuls alone.
        peak: floating-point operations a second, by the data sheet.
        device: from `device_named`.

    Returns:
        Seconds.
    """
    arithmetic = cost.flops / (MATMUL_SHARE * peak)
    memory = cost.bytes / (BANDWIDTH_SHARE * device.bandwidth)
    return max(arithmetic, memory) + cost.launches * device.launch


def site_seconds(method: Costed, size: Size, device: DeviceFigures) -> float:
    """Return a model's time of a method at a site, forward and backward, in place of exact dW.

    By the method's own model of its kernels where it has one (`Predicted`), by `Method.cost`
    otherwise. To compare with `exact_seconds`.

    Args:
        method: any.
        size: of the site.
        device: from `device_named`.

    Returns:
        Seconds.
    """
    if isinstance(method, Predicted):
        return method.predicted_seconds(size, device)
    return predicted_seconds(method.cost(size), device, size.dtype)
