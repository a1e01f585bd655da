"""What PAMM's kernels compile to, and the table of it that the package reads.

    PYTHONPATH=tests python -m pamm_testing.triton.pamm_kernels --target sm_90

prints a row a tile that is chosen first; `--write` writes `figures.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from pamm_compile.methods.pamm import triton as kernels
from pamm_compile.methods.pamm.triton import assign, contract, plan
from pamm_compile.methods.triton.device import Tile
from pamm_testing.triton import launch
from pamm_testing.triton.compiled import TARGETS, Compiled, compile_kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _index_type(k: int) -> str:
    return "u8" if k <= 256 else "i16" if k <= 1 << 15 else "i32"


def compile_assign(
    tile: Tile,
    k: int,
    target: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    with_norm: bool = False,
    precision: str = "ieee",
    n: int = 2048,
) -> Compiled:
    """Compile the assignment of contiguous tokens.

    Args:
        tile: how its work is cut.
        k: generators.
        target: of `TARGETS`.
        dtype: of X.
        with_norm: whether the cosine is wanted.
        precision: of fp32 products.
        n: features.
    """
    name = _TYPES[dtype]
    types = {"X": f"*{name}", "C": f"*{name}", "INVERSE": "*fp32", "INDEX": f"*{_index_type(k)}"}
    types |= {"SCALE": f"*{name}", "COSINE": "*fp32", "b": "i32"}
    constants = {
        "k": k,
        "n": n,
        "x_row": n,
        "x_column": 1,
        "c_row": n,
        "c_column": 1,
        "EVEN_N": n % tile.depth == 0,
        **assign.tile_constants(tile, with_norm, precision),
    }
    return compile_kernel(
        launch.assign_kernel,
        tuple(types.items()),
        tuple(constants.items()),
        tile,
        TARGETS[target][0],
    )


def compile_contract(
    tile: Tile,
    k: int,
    target: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    m: int = 2048,
    splits: int = 4,
    is_sorted: bool | None = None,
    overrides: tuple[tuple[str, Any], ...] = (),
) -> Compiled:
    """Compile the contraction of a gradient that is a slice of a fused one.

    Args:
        tile: how its work is cut.
        k: generators.
        target: of `TARGETS`.
        dtype: of α and the gradient.
        precision: of fp32 products.
        m: columns of the gradient.
        splits: shares of the tokens.
        is_sorted: None as it is chosen at n = 2048.
        overrides: of constants.
    """
    name = _TYPES[dtype]
    gpu, device = TARGETS[target]
    if is_sorted is None:
        is_sorted = k > plan.MOST_ONE_HOT
    types = {"INDEX": f"*{_index_type(k)}", "SCALE": f"*{name}"}
    types |= {"ORDER": "*i64", "OFFSETS": "*i32", "GRAD": f"*{name}", "OUT": "*fp32", "b": "i32"}
    constants = {
        "k": k,
        "m": m,
        "grad_row": 3 * m,
        "grad_column": 1,
        "SPLITS": splits,
        "EVEN_M": m % tile.rows == 0,
        "K_TILES": contract.ranked(k, tile.columns) if is_sorted else 1,
        **contract.tile_constants(tile, dtype, is_sorted, device, precision),
        **dict(overrides),
    }
    return compile_kernel(
        launch.contract_kernel,
        tuple(types.items()),
        tuple(constants.items()),
        tile,
        gpu,
    )


def chosen(target: str, first: bool) -> Iterator[tuple[str, int, Tile]]:
    """Yield kernel, k and tile of what is chosen for bfloat16 at n = 2048.

    Args:
        target: of `TARGETS`.
        first: the untimed choice alone, not all that are timed.
    """
    device = TARGETS[target][1]
    seen = set()
    for k in (16, 32, 64, 128, 256):
        ways = {
            "assign": plan.assign_tiles(k, 2048, torch.bfloat16, device),
            "contract": plan.contract_tiles(k, torch.bfloat16, device),
        }
        if k == 256:
            ways["sorted"] = plan.contract_tiles(512, torch.bfloat16, device, True)
        for kernel, tiles in ways.items():
            for tile in tiles[:1] if first else tiles:
                if (kernel, tile) not in seen:
                    seen.add((kernel, tile))
                    yield kernel, 512 if kernel == "sorted" else k, tile


def compile_chosen(kernel: str, k: int, tile: Tile, target: str) -> Compiled:
    """Compile one of what `chosen` yields."""
    if kernel == "assign":
        return compile_assign(tile, k, target)
    return compile_contract(tile, k, target, is_sorted=kernel == "sorted")


def _row(kernel: str, k: int, tile: Tile, target: str) -> dict[str, Any]:
    compiled = compile_chosen(kernel, k, tile, target)
    row = {"kernel": kernel, "target": target, "k": k, "tile": list(tile)}
    row |= {"registers": compiled.registers, "spilled": compiled.spilled}
    row |= {"shared": compiled.shared, "slots": list(compiled.slots)}
    if compiled.loop is not None:
        row["instructions"] = compiled.loop.per_iteration(tile)
        row["waits"] = sorted(set(compiled.loop.waits))
    return row


def main() -> None:
    """Print, or write, what the kernels compile to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"], choices=list(TARGETS))
    parser.add_argument("--all", action="store_true", help="every choice, not the first alone")
    parser.add_argument("--write", action="store_true", help="write figures.json, of every choice")
    options = parser.parse_args()
    rows = []
    print(
        "| kernel | target | k | tile | registers | spilled | shared KiB | slots | instructions |"
    )
    print("|---|---|--:|---|--:|--:|--:|---|--:|")
    for target in options.target:
        for kernel, k, tile in chosen(target, not (options.all or options.write)):
            row = _row(kernel, k, tile, target)
            rows.append(row)
            cut = (
                f"{tile.rows}×{tile.columns}×{tile.depth}, {tile.warps} warps, {tile.stages} stages"
            )
            print(
                f"| {kernel} | {target} | {k} | {cut} | {row['registers']} | {row['spilled']} "
                f"| {row['shared'] / 1024:.0f} | {' '.join(map(str, row['slots']))} "
                f"| {row.get('instructions', '')} |",
                flush=True,
            )
    if options.write:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = f'"triton": "{triton.__version__}"'
        path = Path(kernels.__file__).with_name("figures.json")
        path.write_text(f'{{{head}, "kernels": [\n  {lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
