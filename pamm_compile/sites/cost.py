"""What a method saves at a site, and what that is worth."""

from __future__ import annotations

from dataclasses import replace

import torch

from pamm_compile import devices
from pamm_compile.graph.chains import value
from pamm_compile.methods.base import Method
from pamm_compile.private import aot
from pamm_compile.private.scaled import has_scaled_matmul
from pamm_compile.sites.projections import Site
from pamm_compile.size import Cost, Size, exact_cost

# Of two cores of a server, from docs/benchmarks/cpu-kernels.md: floating-point operations a second
# in float32, how much faster 16 bits are, bytes a second, seconds a kernel. The balance matters.
_CPU_FLOPS, _CPU_HALF_SPEEDUP, _CPU_BANDWIDTH, _CPU_LAUNCH = 190e9, 4, 24e9, 20e-6


def size_of(site: Site) -> Size:
    """Return the sizes of a site, of symbolic shapes those that were compiled with.

    0 where only the data decide.
    """
    val = value(site.input)
    tokens, features = site.shape
    outputs = []
    for gradient in site.gradients:
        # [m, n], or [n, m] where transposed; batched matmuls have a batch of one before these.
        rows, columns = value(gradient.node).shape[-2:]
        outputs.append(aot.size_hint(columns if gradient.transposed else rows) or 0)
    codes = {gradient.codes: gradient.scales for gradient in site.gradients}
    rounded = bool(codes) and None not in codes
    return Size(
        tokens=aot.size_hint(tokens) or 0,
        features=aot.size_hint(features) or 0,
        outputs=tuple(outputs),
        dtype=val.dtype,
        device=val.device.type,
        symbolic=not isinstance(tokens, int),
        casts=len(codes) if rounded else 0,
        scales=sum(aot.size_hint(n) or 0 for n in codes.values()) if rounded else 0,
        remade=rounded and site.is_remade,
        scaled=any(gradient.is_scaled for gradient in site.gradients),
    )


def saved_time(method: Method, size: Size, gpu: devices.DeviceFigures | None = None) -> float:
    """Return what a method saves of the time of the exact weight gradients, by a model of it.

    Args:
        method: any.
        size: of the site.
        gpu: to estimate for; None for the device that X is on.

    Returns:
        As a share: 1 where it takes no time at all, 0 where it takes as long, below 0 where it
        takes longer.
    """
    if gpu is None and size.device == "cpu":
        return 1 - _cpu_seconds(method.cost(size), size) / _cpu_seconds(exact_cost(size), size)
    if gpu is None:
        # What is a gain on one is no loss on another where it is clear.
        gpu = devices.at_hand(size.device) or devices.device_named(devices.STANDS_FOR_UNKNOWN)
        if not has_scaled_matmul(torch.device(size.device)):
            gpu = replace(gpu, float8=0.0)
    # Costs depend on the kind of device too.
    size = replace(size, device="cuda")
    return 1 - devices.site_seconds(method, size, gpu) / devices.exact_seconds(size, gpu)


def _cpu_seconds(cost: Cost, size: Size) -> float:
    faster = _CPU_HALF_SPEEDUP if size.dtype.itemsize == 2 else 1
    flops = cost.wide_flops + (cost.flops - cost.wide_flops) / faster
    # Of several kernels in a row, one waits for arithmetic and the next for memory.
    return flops / _CPU_FLOPS + cost.bytes / _CPU_BANDWIDTH + cost.launches * _CPU_LAUNCH
