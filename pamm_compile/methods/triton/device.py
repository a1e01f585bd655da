"""A device's limits, and tiles that fit them: what every kernel's plan is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pamm_compile.private import inductor


class Device(NamedTuple):
    """What tile sizes depend on."""

    kind: str
    """"cuda", "hip" or "xpu"."""
    major: int
    """Major compute capability; 0 if not CUDA."""
    processors: int
    """Multiprocessors."""
    shared_bytes: int
    """Shared memory that one program may use."""

    @property
    def reads_left_from_shared(self) -> bool:
        """Whether a 16-bit matmul takes a transposed left operand straight from shared memory."""
        return self.major in (9, 10)


class Tile(NamedTuple):
    """One way to cut a kernel's work; what `rows`, `columns` and `depth` are is the kernel's."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def fits(self, device: Device, itemsize: int, buffers: int) -> bool:
        """Tell whether `buffers` elements per stage fit in the device's shared memory."""
        return self.stages * buffers * itemsize <= device.shared_bytes


def device_of(device: torch.device) -> Device:
    """Return the limits of a device that Triton compiles for."""
    return Device(*inductor.device_properties(device))


def power_of_two(value: int, least: int, most: int) -> int:
    """Return the smallest power of two that is not below `value`, held in [least, most]."""
    return min(most, max(least, 1 << max(0, value - 1).bit_length()))
