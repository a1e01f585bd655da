"""What the kernels of every tile compile to, in numbers that need no Triton to read.

A method's table is `figures.json` in the package of its kernels. Maintainers write it, with
`tests/pamm_testing/triton/pamm_kernels.py` for PAMM's, and tests compile the tiles that are chosen
first against it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import NamedTuple

from pamm_compile.methods.triton.device import Device, Tile

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


class Table:
    """The figures of one package of kernels.

    Args:
        package: that holds `figures.json`.
    """

    def __init__(self, package: str) -> None:
        text = resources.files(package).joinpath("figures.json").read_text("utf-8")
        self._rows = {
            (row["kernel"], row["target"], Tile(*row["tile"])): Figures(
                row["instructions"], row["registers"], row["shared"], tuple(row["slots"])
            )
            for row in json.loads(text)["kernels"]
        }

    def of(self, kernel: str, tile: Tile, device: Device) -> Figures | None:
        """Return the figures of a kernel on a device, None where it was not compiled for it.

        Args:
            kernel: its name in the table.
            tile: how its work is cut.
            device: the limits.
        """
        return self._rows.get((kernel, target_of(device), tile))

    def resident(self, kernel: str, tile: Tile, device: Device, shared: int) -> int:
        """Return how many programs one multiprocessor holds at a time.

        Args:
            kernel: its name in the table.
            tile: how its work is cut.
            device: the limits.
            shared: bytes of shared memory of a program, where it was not compiled.

        Returns:
            At least 1.
        """
        compiled = self.of(kernel, tile, device)
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


@cache
def table(package: str) -> Table:
    """Return the figures of a package of kernels, read once."""
    return Table(package)


def target_of(device: Device) -> str:
    """Return the compiled target whose figures stand for a device, "" where there is none."""
    return {8: "sm_80", 9: "sm_90"}.get(device.major, "")
