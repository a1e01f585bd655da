"""Every tile size, compiled ahead of time for GPUs that are not here: spills, hazards."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from pamm_testing.triton import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pamm_compile.methods.pamm.triton import assign, contract
from pamm_compile.methods.pamm.triton.common import Device, Tile

A100 = (GPUTarget("cuda", 80, 32), Device("cuda", 8, 108, 166912))
H100 = (GPUTarget("cuda", 90, 32), Device("cuda", 9, 132, 232448))
RTX4090 = (GPUTarget("cuda", 89, 32), Device("cuda", 8, 128, 101376))
MI300 = (GPUTarget("hip", "gfx942", 64), Device("hip", 0, 304, 65536))
NVIDIA = {"sm_80": A100, "sm_89": RTX4090, "sm_90": H100}

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INDEX = {16: "u8", 64: "u8", 128: "u8", 256: "u8", 512: "i16", 100_000: "i32"}
GENERATORS = [16, 64, 128, 256, 512]


class Compiled(NamedTuple):
    kernel: Any
    registers: int
    shared: int
    spilled: int


def _tool() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@functools.cache
def compile_kernel(
    kernel: str,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    warps: int,
    stages: int,
    target: GPUTarget,
) -> Compiled:
    fn = getattr(launch, kernel)
    signature = dict.fromkeys(fn.arg_names, "constexpr") | dict(types)
    values = {(fn.arg_names.index(name),): value for name, value in constants}
    aligned = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name, _ in types}
    compiled = triton.compile(
        ASTSource(fn, signature, constexprs=values, attrs=aligned),
        target=target,
        options={"num_warps": warps, "num_stages": stages},
    )
    if target.backend != "cuda":
        text = compiled.asm["amdgcn"]
        (spilled,) = re.findall(r"\.vgpr_spill_count: +(\d+)", text)
        (registers,) = re.findall(r"\.vgpr_count: +(\d+)", text)
        return Compiled(compiled, int(registers), compiled.metadata.shared, int(spilled))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool(), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found
    # Registers are spilled to the stack, and the kernels have no other use for one.
    return Compiled(compiled, int(found[1]), compiled.metadata.shared, int(found[2]))


def compile_assign(
    tile: Tile,
    k: int,
    target: GPUTarget,
    dtype: torch.dtype = torch.bfloat16,
    with_norm: bool = False,
    precision: str = "ieee",
    n: int = 2048,
) -> Compiled:
    name = TYPES[dtype]
    types = {"X": f"*{name}", "C": f"*{name}", "INVERSE": "*fp32", "INDEX": f"*{INDEX[k]}"}
    types |= {"SCALE": f"*{name}", "COSINE": "*fp32", "b": "i32"}
    constants = {
        "k": k,
        "n": n,
        "x_row": n,
        "x_column": 1,
        "c_row": n,
        "c_column": 1,
        "BLOCK_B": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_N": tile.depth,
        "EVEN_N": n % tile.depth == 0,
        "WITH_NORM": with_norm,
        "PRECISION": precision,
    }
    return compile_kernel(
        "assign_kernel",
        tuple(types.items()),
        tuple(constants.items()),
        tile.warps,
        tile.stages,
        target,
    )


def compile_contract(
    tile: Tile,
    k: int,
    target: GPUTarget,
    device: Device,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    m: int = 2048,
    splits: int = 4,
) -> Compiled:
    name = TYPES[dtype]
    types = {"INDEX": f"*{INDEX[k]}", "SCALE": f"*{name}", "ORDER": "*i64", "OFFSETS": "*i32"}
    types |= {"GRAD": f"*{name}", "OUT": "*fp32", "b": "i32"}
    constants = {
        "k": k,
        "m": m,
        "grad_row": 3 * m,
        "grad_column": 1,
        "SPLITS": splits,
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_T": tile.depth,
        "EVEN_M": m % tile.rows == 0,
        "SORTED": k > contract.MOST_ONE_HOT,
        "WIDE": dtype == torch.float32,
        "PRECISION": precision,
        "GRAD_LEFT": dtype != torch.float32 and device.reads_left_from_shared,
    }
    return compile_kernel(
        "contract_kernel",
        tuple(types.items()),
        tuple(constants.items()),
        tile.warps,
        tile.stages,
        target,
    )


def check(compiled: Compiled, device: Device) -> None:
    assert compiled.spilled == 0
    assert compiled.shared <= device.shared_bytes


def check_streaming(compiled: Compiled, gpu: str) -> None:
    """Rows come 16 bytes at a time, straight into shared memory; Hopper uses its own matmul."""
    ptx = compiled.kernel.asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert ("wgmma.mma_async" in ptx) == (gpu == "sm_90")


@pytest.mark.parametrize("k", GENERATORS)
@pytest.mark.parametrize("gpu", NVIDIA)
def test_assign_16_bit(gpu: str, k: int) -> None:
    target, device = NVIDIA[gpu]
    tiles = assign.tiles(k, 2048, torch.bfloat16, device)
    for number, tile in enumerate(tiles if gpu != "sm_89" else tiles[:1]):
        for with_norm in (False, True) if number == 0 or gpu == "sm_90" else (False,):
            compiled = compile_assign(tile, k, target, with_norm=with_norm)
            check(compiled, device)
            check_streaming(compiled, gpu)


@pytest.mark.parametrize("k", [*GENERATORS, 100_000])
@pytest.mark.parametrize("gpu", NVIDIA)
def test_contract_16_bit(gpu: str, k: int) -> None:
    target, device = NVIDIA[gpu]
    tiles = contract.tiles(k, torch.bfloat16, device)
    for tile in tiles if gpu != "sm_89" and k <= 512 else tiles[:1]:
        compiled = compile_contract(tile, k, target, device)
        check(compiled, device)
        check_streaming(compiled, gpu)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("k", [16, 512])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_fp32(gpu: str, k: int, precision: str) -> None:
    target, device = NVIDIA[gpu]
    for tile in assign.tiles(k, 2048, torch.float32, device):
        check(compile_assign(tile, k, target, torch.float32, True, precision), device)
    for tile in contract.tiles(k, torch.float32, device):
        check(compile_contract(tile, k, target, device, torch.float32, precision), device)


@pytest.mark.parametrize("k", [64, 256, 512])
def test_amd(k: int) -> None:
    target, device = MI300
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    for tile in assign.tiles(k, 2048, torch.bfloat16, device):
        check(compile_assign(tile, k, target), device)
    for tile in contract.tiles(k, torch.bfloat16, device):
        check(compile_contract(tile, k, target, device), device)


@pytest.mark.parametrize("odd", [33, 1000])
def test_sizes_that_no_tile_divides(odd: int) -> None:
    target, device = H100
    check(
        compile_assign(assign.tiles(64, odd, torch.bfloat16, device)[0], 64, target, n=odd), device
    )
    tile = contract.tiles(64, torch.bfloat16, device)[0]
    check(compile_contract(tile, 64, target, device, m=odd), device)


def refilled_too_early(ttgir: str) -> list[str]:
    """Buffers that an asynchronous matmul may still read when the next copy into them starts.

    With one matmul in flight across the loop's end, a buffer of s slots that is filled s - 1
    iterations ahead is safe, and one filled s ahead is not.
    """
    slots = dict(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir))
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_index (%\w+)\[", ttgir))
    loop = ttgir[ttgir.index("scf.for") :]
    in_flight = [int(n) for n in re.findall(r"warp_group_dot_wait .*?pendings = (\d+)", loop)]
    read = {views.get(o) for o in re.findall(r"warp_group_dot (%\w+), ", loop)}
    read |= {views.get(o) for o in re.findall(r"warp_group_dot %\w+, (%\w+)", loop)}
    filled = {
        views[o]
        for o in re.findall(r"async_copy_global_to_local [^\n]*?, (%\w+)", loop)
        if o in views
    }
    most = max((int(slots[name]) for name in filled if name in slots), default=0)
    if not in_flight or max(in_flight) == 0:
        return []
    return [n for n in filled & read if n in slots and int(slots[n]) < max(3, most)]


def test_no_buffer_is_refilled_under_a_running_matmul() -> None:
    target, device = H100
    for k in (64, 256):
        for with_norm in (False, True):
            for tile in assign.tiles(k, 2048, torch.bfloat16, device):
                kernel = compile_assign(tile, k, target, with_norm=with_norm).kernel
                assert refilled_too_early(kernel.asm["ttgir"]) == []
        for tile in contract.tiles(k, torch.bfloat16, device):
            kernel = compile_contract(tile, k, target, device).kernel
            assert refilled_too_early(kernel.asm["ttgir"]) == []


def test_the_hazard_check_finds_the_hazard() -> None:
    types = (("X", "*bf16"), ("C", "*bf16"), ("OUT", "*fp32"))
    sizes = (("n", 2048), ("BLOCK", 64))
    kernel = compile_kernel("two_readers_kernel", types, sizes, 8, 3, H100[0]).kernel
    if not refilled_too_early(kernel.asm["ttgir"]):
        pytest.skip(f"Triton {triton.__version__} leaves enough slots for two readers")


@pytest.mark.parametrize("shared", [16 << 10, 48 << 10, 64 << 10, 100 << 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 100, 5000])
def test_there_is_a_tile_for_every_device(k: int, dtype: torch.dtype, shared: int) -> None:
    device = Device("cuda", 7, 20, shared)
    for n in (1, 100, 4096):
        assert assign.tiles(k, n, dtype, device)
    tile = contract.tiles(k, dtype, device)[0]
    assert 1 <= contract.splits(1, [1], k, dtype.itemsize, tile, device) <= 16
    assert 1 <= contract.splits(1 << 20, [64], k, dtype.itemsize, tile, device) <= 16
