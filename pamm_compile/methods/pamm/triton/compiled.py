"""What the kernels compile to, read from cubins without a GPU.

    python -m pamm_compile.methods.pamm.triton.compiled --target sm_90

prints, for the tiles that are chosen first: registers, spills, shared memory, instructions of the
main loop, slots of the software pipeline, and copies that may be in flight where it waits.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pamm_compile.methods.pamm.triton import assign, contract, launch, plan
from pamm_compile.methods.pamm.triton.common import Device, Tile

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("cuda", 8, 108, 166912)),
    "sm_89": (GPUTarget("cuda", 89, 32), Device("cuda", 8, 128, 101376)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("cuda", 9, 132, 232448)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device("cuda", 10, 148, 232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("hip", 0, 304, 65536)),
}
"""What can be compiled for, and the limits that tiles are chosen by."""

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Loop(NamedTuple):
    """The innermost loop that multiplies; all that multiplies where it is unrolled to its end."""

    instructions: int
    """Of one warp, in one pass through the code."""
    products: int
    """Multiply-adds of matrices in it, per warp."""
    waits: tuple[int, ...]
    """Groups of copies to shared memory that may be in flight where it waits for one."""
    matmul_waits: tuple[int, ...]
    """Groups of asynchronous matmuls that may be in flight where it waits for one."""

    def per_iteration(self, tile: Tile) -> int:
        """Return the instructions of one warp for one tile; the compiler may unroll several."""
        one = tile.rows * tile.columns * tile.depth / tile.warps
        return round(self.instructions * one / self.products)


class Compiled(NamedTuple):
    """A kernel compiled ahead of time."""

    kernel: Any
    """Triton's, with its intermediate code in `asm`."""
    registers: int
    """Per thread."""
    spilled: int
    """Bytes per thread; registers, on AMD."""
    shared: int
    """Bytes of shared memory of a program."""
    slots: tuple[int, ...]
    """Of every pipelined buffer, tiles that it holds."""
    loop: Loop | None
    """None where the code is not NVIDIA's."""


def _tool(name: str, *arguments: str) -> str:
    # Blackwell has an assembler of its own in the package, one disassembler serves all.
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main_loop(text: str) -> Loop | None:
    """Return the innermost loop of a disassembly that multiplies matrices.

    Args:
        text: what `nvdisasm -c` prints of a cubin.

    Returns:
        None if there is no such loop.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(\S.*?);?\s*$", line):
            code.append(found[1])
    bodies = []
    for at, instruction in enumerate(code):
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if jump and labels.get(jump[1], at + 1) <= at:
            bodies.append(code[labels[jump[1]] : at + 1])
    multiplying = [body for body in bodies if _products(body)]
    if not multiplying:
        places = [at for at, instruction in enumerate(code) if _products([instruction])]
        if not places:
            return None
        multiplying = [code[places[0] : places[-1] + 1]]
    body = min(multiplying, key=len)
    joined = "\n".join(body)
    return Loop(
        len(body),
        _products(body),
        tuple(int(n, 16) for n in re.findall(r"(?<!\.)DEPBAR\.LE SB0, (0x\w+)", joined)),
        tuple(int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", joined)),
    )


def _products(code: Sequence[str]) -> int:
    """Multiply-adds of matrices per warp; a Hopper matmul is shared by the four of a group."""
    total = 0
    for instruction in code:
        if found := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):
            total += int(found[1]) * int(found[2]) * int(found[3]) // 4
        elif found := re.search(r"\bHMMA\.(16)(8)(16|8|4)\b", instruction):
            total += int(found[1]) * int(found[2]) * int(found[3])
    return total


def read(kernel: Any) -> Compiled:
    """Return what a kernel that Triton compiled needs and does.

    Args:
        kernel: what `triton.compile` returned.

    Raises:
        FileNotFoundError: this Triton ships no disassembler.
    """
    shared = kernel.metadata.shared
    ttgir = kernel.asm["ttgir"]
    slots = re.findall(r"= ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    pipeline = tuple(sorted(int(slot) for slot in slots))
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        (spilled,) = re.findall(r"\.vgpr_spill_count: +(\d+)", text)
        (registers,) = re.findall(r"\.vgpr_count: +(\d+)", text)
        return Compiled(kernel, int(registers), int(spilled), shared, pipeline, None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found
    # Registers are spilled to the stack, and the kernels have no other use for one.
    return Compiled(kernel, int(found[1]), int(found[2]), shared, pipeline, main_loop(code))


@functools.cache
def compile_kernel(
    fn: Any,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    tile: Tile,
    target: GPUTarget,
) -> Compiled:
    """Compile a Triton function ahead of time.

    Args:
        fn: decorated with `triton.jit`.
        types: Triton's type of each argument that is passed at run time; all are multiples of 16.
        constants: values of the others.
        tile: warps and stages are read.
        target: architecture.
    """
    signature = dict.fromkeys(fn.arg_names, "constexpr") | dict(types)
    values = {(fn.arg_names.index(name),): value for name, value in constants}
    aligned = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name, _ in types}
    source = ASTSource(fn, signature, constexprs=values, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return read(triton.compile(source, target=target, options=options))


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
        path = Path(__file__).with_name("figures.json")
        path.write_text(f'{{{head}, "kernels": [\n  {lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
