"""A model of the time that PAMM's kernels take on a GPU, from what they compile to.

Per kernel: floating-point operations, bytes from main memory and from the L2 cache, instructions.
What is longest counts, with what the matrix units and the schedulers do not do at once. Nothing
here was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pamm_compile import devices
from pamm_compile.devices import DeviceFigures
from pamm_compile.methods.pamm.triton import plan
from pamm_compile.methods.triton import figures
from pamm_compile.methods.triton.device import Device, Tile
from pamm_compile.size import Size

# What a sort of b tokens launches, and moves for each: key and position, read and written twice,
# a histogram, and the gradients' rows by position afterwards.
_SORT_LAUNCHES = 10
_SORT_BYTES = 64
# Assumed of the bandwidth of whole rows, where a program gathers 256 bytes of each.
_GATHERED_SHARE = 0.8
# Sorting has to win by this much: its kernels are many, and none of them is modelled well.
_SORTED_MARGIN = 0.9
LIMITS = {
    "sm_80": Device("cuda", 8, 108, 166912),
    "sm_90": Device("cuda", 9, 132, 232448),
    "sm_100": Device("cuda", 10, 148, 232448),
    "gfx942": Device("hip", 0, 304, 65536),
}
"""By Triton's architecture, as a device's figures name it."""
# Of a device whose kernels no tool here reads, instructions a warp and multiply-add of a tile.
_UNREAD = 3e-4


class KernelTime(NamedTuple):
    """The predicted time of one kernel, by what bounds it."""

    name: str
    seconds: float
    bound: str
    """"matmul", "issue", "memory", "cache" or "launch"."""


class Work(NamedTuple):
    """What a kernel does in all."""

    flops: float = 0
    """Of matmuls, zeros and padding included."""
    memory: float = 0
    """Bytes."""
    cache: float = 0
    """Bytes that reach the multiprocessors."""
    instructions: float = 0
    """Of warps."""
    programs: int = 0
    """0: enough for all multiprocessors alike."""
    overlap: float = 1
    """Warps that one scheduler chooses from."""
    launches: int = 1


def limits_of(device: DeviceFigures) -> Device:
    """Return the limits that tiles are chosen by on a device of the figures."""
    return LIMITS[device.target]


def _time(name: str, work: Work, device: DeviceFigures, dtype: torch.dtype) -> KernelTime:
    matmul = work.flops / (devices.MATMUL_SHARE * device.flops(dtype))
    issue = work.instructions / (devices.ISSUE_SHARE * device.issue)
    memory = work.memory / (devices.BANDWIDTH_SHARE * device.bandwidth)
    cache = work.cache / (devices.CACHE_SHARE * device.cache_bandwidth)
    # Warps of one scheduler build operands while another's matmul runs: the more, the better.
    compute = max(matmul, issue) + min(matmul, issue) / max(1.0, work.overlap)
    if work.programs:
        # Programs are whole: the busiest multiprocessor has more of them than the average one.
        idle = -(-work.programs // device.processors) / (work.programs / device.processors)
        compute, cache = compute * idle, cache * idle
    longest = max(compute, memory, cache)
    bounds = {"memory": memory, "cache": cache, "issue" if issue > matmul else "matmul": compute}
    launch = work.launches * device.launch
    bound = "launch" if launch > longest else max(bounds, key=lambda key: bounds[key])
    return KernelTime(name, longest + launch, bound)


def _instructions(kernel: str, tile: Tile, limits: Device) -> float:
    compiled = figures.table(__package__).of(kernel, tile, limits)
    if compiled is not None:
        return compiled.instructions
    return _UNREAD * tile.rows * tile.columns * tile.depth


def _overlap(kernel: str, tile: Tile, limits: Device, shared: int) -> float:
    """Warps of a scheduler."""
    return figures.table(__package__).resident(kernel, tile, limits, shared) * tile.warps / 4


def assign_time(
    b: int, n: int, k: int, dtype: torch.dtype, tile: Tile, device: DeviceFigures
) -> KernelTime:
    """Return the model's time of `pamm::assign` with one tile."""
    item, limits = dtype.itemsize, limits_of(device)
    programs, k_tiles = -(-b // tile.rows), -(-k // tile.columns)
    tiles = programs * k_tiles * -(-n // tile.depth)
    staged = (tile.rows + tile.columns) * tile.depth * item
    work = Work(
        flops=2.0 * tiles * tile.rows * tile.columns * tile.depth,
        memory=(b * n + k * n) * item + b * (item + 1 + (k > 256)),
        cache=float(tiles * staged),
        instructions=tiles * tile.warps * _instructions("assign", tile, limits),
        programs=programs,
        overlap=_overlap("assign", tile, limits, tile.stages * staged),
    )
    return _time("assign", work, device, dtype)


def contract_times(
    b: int,
    widths: Sequence[int],
    k: int,
    dtype: torch.dtype,
    is_sorted: bool,
    device: DeviceFigures,
    tile: Tile | None = None,
) -> list[KernelTime]:
    """Return the model's times of `pamm::contract`: a sort, if any, the matmul, the splits' sum."""
    item, limits, m = dtype.itemsize, limits_of(device), sum(widths)
    kernel = "sorted" if is_sorted else "contract"
    tile = tile or plan.contract_tiles(k, dtype, limits, is_sorted)[0]
    splits = plan.splits(b, widths, k, item, tile, limits, is_sorted)
    m_tiles, k_tiles = sum(-(-width // tile.rows) for width in widths), -(-k // tile.columns)
    # Sorted, every program ends in a tile of tokens that is half full.
    visits = (
        -(-b // tile.depth) + k_tiles * splits / 2 if is_sorted else -(-b // tile.depth) * k_tiles
    )
    tiles = m_tiles * visits
    staged = tile.rows * tile.depth * item
    partial = 4 * splits * k * m
    codes = tile.depth * (item + 1 + (9 if is_sorted else 0))
    work = Work(
        flops=2.0 * tiles * tile.rows * tile.columns * tile.depth,
        memory=b * m * item / (_GATHERED_SHARE if is_sorted else 1) + partial,
        cache=tiles * (staged + codes) + partial,
        instructions=tiles * tile.warps * _instructions(kernel, tile, limits),
        # Sorted programs are of unequal length, the longest first: no last wave to speak of.
        programs=0 if is_sorted else m_tiles * k_tiles * splits,
        overlap=_overlap(kernel, tile, limits, tile.stages * staged),
    )
    sums = Work(memory=partial + item * k * m)
    times = [_time(kernel, work, device, dtype), _time("sum of splits", sums, device, dtype)]
    if is_sorted:
        sort = Work(memory=_SORT_BYTES * b, launches=_SORT_LAUNCHES)
        times.insert(0, _time("sort", sort, device, dtype))
    return times


def site_times(size: Size, k: int, device: DeviceFigures) -> list[KernelTime]:
    """Return the model's times of every kernel of one site, forward and backward.

    Args:
        size: of the site.
        k: generators.
        device: from `devices.device_named`.

    Returns:
        In the order of their launches.
    """
    b, n, m, dtype = size.tokens, size.features, sum(size.outputs), size.dtype
    item = dtype.itemsize
    tile = plan.assign_tiles(k, n, dtype, limits_of(device), b)[0]
    finish = Work(flops=2.0 * k * n * m, memory=(k * n + k * m + n * m) * item)
    return [
        _time("gather", Work(memory=2 * k * n * item, launches=2), device, dtype),
        assign_time(b, n, k, dtype, tile, device),
        *contract_times(
            b, size.outputs, k, dtype, sorting_pays(b, size.outputs, k, dtype, device), device
        ),
        _time("finish", finish, device, dtype),
    ]


def sorting_pays(
    b: int, widths: Sequence[int], k: int, dtype: torch.dtype, device: DeviceFigures
) -> bool:
    """Tell whether sorting the tokens by generator is predicted faster than multiplying by zeros.

    Args:
        b: tokens.
        widths: columns of each gradient.
        k: generators.
        dtype: that is multiplied in.
        device: from `devices.device_named`.
    """
    if k <= plan.LEAST_SORTED:
        return False
    times = [
        sum(time.seconds for time in contract_times(b, widths, k, dtype, is_sorted, device))
        for is_sorted in (False, True)
    ]
    return times[1] < _SORTED_MARGIN * times[0]


def is_sorted(b: int, widths: Sequence[int], k: int, dtype: torch.dtype, limits: Device) -> bool:
    """Choose between the two contractions on the device that is compiled for.

    Args:
        b: tokens.
        widths: columns of each gradient.
        k: generators.
        dtype: that is multiplied in.
        limits: of the device.

    Returns:
        By the model of the closest known device; of another maker's, past 256 generators.
    """
    known = {8: "a100", 9: "h100", 10: "h100"}.get(limits.major)
    if known is None or dtype.itemsize != 2:
        return k > plan.MOST_ONE_HOT
    return sorting_pays(b, widths, k, dtype, devices.device_named(known))
