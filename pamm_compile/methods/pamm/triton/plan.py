"""How the kernels' work is cut: tile sizes and splits, by shapes and by the device's limits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pamm_compile.methods.triton import figures
from pamm_compile.methods.triton.device import Device, Tile, power_of_two

MOST_ONE_HOT = 256
"""Generators up to which every program reads every token, where no model of the device decides."""

LEAST_SORTED = 64
"""Generators up to which sorting is never considered: one tile holds them all."""

_MOST_SPLITS = 32
# Programs per place to run them in, so that a tile of many tokens is cut and none is left waiting.
_SORTED_WAVES = 4
# Assumed loss of time where only one program of a multiprocessor runs, not as many as it holds.
_EMPTY_SHARE = 0.25
# Partial sums may cost, written and read, this share of reading the gradients.
_PARTIAL_SHARE = 4
_MOST_GENERATORS = 256
# Taller tiles read the generators less often, but only where there are enough for this share of the
# multiprocessors.
_FULL = 0.9


def assign_tiles(
    k: int, n: int, dtype: torch.dtype, device: Device, tokens: int = 16384
) -> list[Tile]:
    """Return the tile sizes to assign with, the one to take untimed first.

    Args:
        k: generators.
        n: features.
        dtype: of X.
        device: the limits.
        tokens: b.

    Returns:
        At least one: rows are tokens, columns generators, depth features.
    """
    itemsize = dtype.itemsize
    columns = power_of_two(k, 16, _MOST_GENERATORS)
    depth = power_of_two(n, 16, 64 if itemsize == 2 else 32)
    if itemsize > 2:
        narrow = min(columns, 64)
        wanted = [Tile(64, narrow, depth, 8, 2), Tile(32, narrow, depth, 4, 2)]
    elif columns == 256:
        wanted = [
            Tile(128, 128, depth, 16, 3),
            Tile(64, 256, min(depth, 32), 8, 4),
            Tile(128, 128, depth, 8, 3),
            Tile(64, 128, depth, 4, 3),
        ]
        if -(-tokens // 128) < _FULL * device.processors:
            wanted.insert(0, wanted.pop(1))
    else:
        wanted = [
            Tile(128, columns, depth, 8, 3),
            Tile(128, columns, depth, 8, 4),
            Tile(64, columns, depth, 4, 3),
            Tile(64, columns, depth, 4, 4),
        ]
    spare = [Tile(64, min(columns, most), depth, 4, 2) for most in (128, 64)]
    for ways in (wanted, spare):
        fitting = [t for t in ways if t.fits(device, itemsize, (t.rows + t.columns) * t.depth)]
        if fitting:
            return fitting
    return [Tile(32, min(columns, 32), min(depth, 32), 4, 2)]


def contract_tiles(
    k: int, dtype: torch.dtype, device: Device, is_sorted: bool = False
) -> list[Tile]:
    """Return the tile sizes to contract with, the one to take untimed first.

    Args:
        k: generators.
        dtype: that is multiplied in.
        device: the limits.
        is_sorted: whether a program visits its own generators' tokens only.

    Returns:
        At least one: rows are columns of the gradients, columns generators, depth tokens.
    """
    itemsize = dtype.itemsize
    if itemsize > 2:
        columns = power_of_two(k, 16, 64)
        wanted = [Tile(64, columns, 32, 8, 2), Tile(32, columns, 32, 4, 2)]
    elif is_sorted:
        # Tokens reach the pipeline through ORDER, a load that takes two of its stages.
        wanted = [Tile(128, 64, 64, 8, 5), Tile(128, 64, 64, 8, 4), Tile(128, 128, 32, 8, 6)]
    else:
        wanted = {
            256: [
                Tile(128, 128, 32, 8, 6),
                Tile(128, 128, 64, 8, 4),
                Tile(256, 128, 64, 8, 3),
                Tile(64, 256, 32, 8, 4),
            ],
            128: [
                Tile(128, 128, 32, 8, 6),
                Tile(128, 128, 64, 8, 4),
                Tile(256, 128, 64, 8, 3),
            ],
            64: [
                Tile(128, 64, 64, 8, 4),
                Tile(256, 64, 32, 8, 6),
                Tile(128, 64, 64, 4, 3),
                Tile(64, 64, 64, 4, 4),
            ],
        }.get(
            power_of_two(k, 16, 256),
            [
                Tile(128, power_of_two(k, 16, 256), 64, 8, 4),
                Tile(128, power_of_two(k, 16, 256), 64, 4, 3),
                Tile(64, power_of_two(k, 16, 256), 64, 4, 4),
            ],
        )
    smallest = Tile(32, min(wanted[0].columns, 32), 32, 4, 2)
    fitting = [
        t for t in wanted if t.fits(device, itemsize, t.rows * t.depth) and _holds(t, device)
    ]
    return fitting or [smallest]


def _holds(tile: Tile, device: Device) -> bool:
    # The accumulator passes through shared memory where it is transposed on the way out.
    return 4 * tile.rows * tile.columns <= device.shared_bytes


def splits(
    tokens: int,
    widths: Sequence[int],
    k: int,
    itemsize: int,
    tile: Tile,
    device: Device,
    is_sorted: bool = False,
) -> int:
    """Return how many shares the tokens are cut into, so that all multiprocessors have work.

    Args:
        tokens: b.
        widths: columns of each gradient.
        k: generators.
        itemsize: bytes of a gradient's element.
        tile: as cut.
        device: the limits.
        is_sorted: whether a program visits its own generators' tokens only.

    Returns:
        In [1, 32].
    """
    programs = sum(-(-m // tile.rows) for m in widths) * -(-k // tile.columns)
    shared = tile.stages * tile.rows * tile.depth * itemsize
    places = device.processors * figures.table(__package__).resident(
        "sorted" if is_sorted else "contract", tile, device, shared
    )
    affordable = tokens * itemsize // (8 * k * _PARTIAL_SHARE)
    visited = tokens * tile.columns // max(k, tile.columns) if is_sorted else tokens
    most = max(1, min(affordable, visited // (8 * tile.depth), _MOST_SPLITS))
    if is_sorted:
        return max(1, min(most, _SORTED_WAVES * places // max(1, programs)))

    def cost(shares: int) -> float:
        started = max(1, programs * shares)
        # Of the time: what the busiest multiprocessor has to do beyond the average one, what
        # writing and reading the partial sums takes, and what an empty place does not hide.
        busiest = -(-started // device.processors) / (started / device.processors)
        partial = 8 * k * shares / (tokens * itemsize)
        return busiest + partial + _EMPTY_SHARE * max(0.0, 1 - started / places)

    return min(range(1, most + 1), key=cost)
