"""What Triton kernels compile to, read from cubins without a GPU.

Registers, spills, shared memory, instructions of the main loop, slots of the software pipeline, and
copies that may be in flight where it waits.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pamm_compile.methods.triton.device import Device, Tile

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("cuda", 8, 108, 166912)),
    "sm_89": (GPUTarget("cuda", 89, 32), Device("cuda", 8, 128, 101376)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("cuda", 9, 132, 232448)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device("cuda", 10, 148, 232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("hip", 0, 304, 65536)),
}
"""What can be compiled for, and the limits that tiles are chosen by."""


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
