"""Matmuls of float8 operands with scales."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pamm_compile.private.symbols import resolve

_scaled_mm: Any = resolve("torch:_scaled_mm")
_get_interface_for_device: Any = resolve("torch._dynamo.device_interface:get_interface_for_device")

# Of CUDA, times ten: Ada and Hopper are the first with matmuls in float8.
_FIRST_CAPABILITY = 89


def has_scaled_matmul(device: torch.device) -> bool:
    """Tell whether a device multiplies float8 matrices faster than wider ones."""
    if device.type != "cuda":
        return False
    interface = _get_interface_for_device(device)
    # Of a fake tensor there need be no device.
    if not interface.is_available():
        return False
    capability = interface.get_compute_capability(device)
    # AMD's are names; their float8 is another.
    return isinstance(capability, int) and capability >= _FIRST_CAPABILITY


def scaled_matmul(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (a * rows) @ (b * columns), accumulated in float32.

    Args:
        a: [m, k], float8, row-major; k a multiple of 16.
        b: [k, n], float8, column-major; n a multiple of 16.
        rows: [m, 1], float32.
        columns: [1, n], float32.

    Returns:
        [m, n], bfloat16.
    """
    product = _scaled_mm(a, b, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=False)
    return cast(Tensor, product)
