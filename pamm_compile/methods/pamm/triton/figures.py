"""What the kernels of every tile compile to, in numbers that need no Triton to read.

The table is written by `python -m pamm_compile.methods.pamm.triton.compiled --write`, and
`tests/methods/pamm/triton/test_compile.py` compiles the tiles that are chosen first against it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import NamedTuple

from pamm_compile.methods.pamm.triton.common import Device, Tile

_REGISTERS = 65536
_REGISTER_UNIT = 256
_THREADS = 2048
_RESERVED_BYTES = 1024


class Figures(NamedTuple):
    """One compiled kernel: bfloat16, n = m = 2048."""

    instructions: int
    """Of one warp for one tile of the main loop."""
    registers: int
    """Per thread."""
    shared: int
    """Bytes of a program."""
    slots: tuple[int, ...]
    """Of every pipelined buffer, tiles that it holds."""


@cache
def _table() -> dict[tuple[str, str, Tile], Figures]:
    text = resources.files(__package__).joinpath("figures.json").read_text("utf-8")
    return {
        (row["kernel"], row["target"], Tile(*row["tile"])): Figures(
            row["instructions"], row["registers"], row["shared"], tuple(row["slots"])
        )
        for row in json.loads(text)["kernels"]
    }


def target_of(device: Device) -> str:
    """Return the compiled target whose figures stand for a device, "" where there is none."""
    return {8: "sm_80", 9: "sm_90"}.get(device.major, "")


def of(kernel: str, tile: Tile, device: Device) -> Figures | None:
    """Return the figures of a kernel on a device, None where it was not compiled for it.

    Args:
        kernel: "assign", "contract" or "sorted".
        tile: how its work is cut.
        device: the limits.
    """
    return _table().get((kernel, target_of(device), tile))


def resident(kernel: str, tile: Tile, device: Device, shared: int) -> int:
    """Return how many programs one multiprocessor holds at a time.

    Args:
        kernel: "assign", "contract" or "sorted".
        tile: how its work is cut.
        device: the limits.
        shared: bytes of shared memory of a program, where it was not compiled.

    Returns:
        At least 1.
    """
    compiled = of(kernel, tile, device)
    if compiled is None:
        return max(1, min(3, device.shared_bytes // shared))
    warp = -(-compiled.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return max(
        1,
        min(
            _REGISTERS // (warp * tile.warps),
            (device.shared_bytes + _RESERVED_BYTES) // (compiled.shared + _RESERVED_BYTES),
            _THREADS // (32 * tile.warps),
        ),
    )
