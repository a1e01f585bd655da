"""What both lowerings need: a device's limits, tile sizes that fit them, the text of a template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import torch

from pamm_compile.private import inductor

TRITON_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""What the templates take; anything else runs the eager kernel of the operator."""


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


def float32_precision() -> str:
    """Return how Triton is to multiply fp32 operands: "tf32" only where torch's own matmul may.

    Equivalent to: `torch.backends.cuda.matmul.fp32_precision`, with "ieee" for anything but "tf32".
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def template_source(name: str, helpers: Sequence[str]) -> str:
    """Return the text of a template, the functions of `tiles` that it calls pasted behind it.

    Reads the files, and so imports no Triton.

    Args:
        name: of the template.
        helpers: names of the functions.

    Returns:
        What Inductor renders.
    """
    here = resources.files("pamm_compile.methods.pamm.triton")
    template = here.joinpath("templates", f"{name}.py.jinja").read_text("utf-8")
    functions = re.split(r"\n(?=@triton\.jit\n)", here.joinpath("tiles.py").read_text("utf-8"))[1:]
    heads = tuple(f"@triton.jit\ndef {helper}(" for helper in helpers)
    return template + "\n\n" + "\n".join(f for f in functions if f.startswith(heads))


def constants(**values: Any) -> dict[str, Any]:
    """Return template arguments, which Inductor prints as Python: strings get their quotes."""
    return {name: repr(v) if isinstance(v, str) else v for name, v in values.items()}
