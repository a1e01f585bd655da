"""What the kernels compile to for GPUs that are not here: spills, registers, loops, hazards."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import pytest
import torch
import triton
from pamm_testing.triton import compiled, pamm_kernels, two_readers
from pamm_testing.triton.compiled import TARGETS, Compiled

from pamm_compile.methods.pamm.triton import plan
from pamm_compile.methods.triton.device import Device, Tile

# Compilers differ in a few instructions from release to release; what is worth a failure does not.
_SLACK = 1.1
FIGURES = json.loads(
    resources.files("pamm_compile.methods.pamm.triton").joinpath("figures.json").read_text("utf-8")
)["kernels"]
FIRST = [
    pytest.param(target, *way, id=f"{way[0]}-{target}-{way[1]}")
    for target in ("sm_80", "sm_90")
    for way in pamm_kernels.chosen(target, first=True)
]


def check(kernel: Compiled, target: str) -> None:
    assert kernel.spilled == 0
    assert kernel.shared <= TARGETS[target][1].shared_bytes


@pytest.mark.parametrize(("target", "kernel", "k", "tile"), FIRST)
def test_first_choices_stay_as_they_are(target: str, kernel: str, k: int, tile: Tile) -> None:
    """Registers, spills, shared memory, instructions, slots and waits: none is worse."""
    (known,) = (
        row
        for row in FIGURES
        if (row["kernel"], row["target"], row["tile"]) == (kernel, target, list(tile))
    )
    now = pamm_kernels.compile_chosen(kernel, k, tile, target)
    check(now, target)
    assert now.loop is not None
    assert now.registers <= known["registers"] + 8
    assert now.shared <= known["shared"]
    assert now.loop.per_iteration(tile) <= _SLACK * known["instructions"]
    assert now.slots >= tuple(known["slots"])
    assert max(now.loop.waits) >= max(known["waits"])
    # Rows come 16 bytes at a time, straight into shared memory; Hopper uses its own matmul.
    ptx = now.kernel.asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert ("wgmma.mma_async" in ptx) == (target == "sm_90")
    if target == "sm_90":
        assert refilled_too_early(now.kernel.asm["ttgir"]) == []


@pytest.mark.parametrize(("k", "before"), [(64, 300), (128, 614), (256, 944)])
def test_hopper_contraction_issues_little(k: int, before: int) -> None:
    """At most 0.65 of the instructions of the gradient on the left, for 64 tokens.

    `before`: 128×64×64 and 128×128×64 tiles, and two of 64×256×32, 8 warps each, Triton 3.7.1.
    """
    tile = plan.contract_tiles(k, torch.bfloat16, TARGETS["sm_90"][1])[0]
    (row,) = (
        row
        for row in FIGURES
        if (row["kernel"], row["target"], row["tile"]) == ("contract", "sm_90", list(tile))
    )
    former = {64: 128 * 64, 128: 128 * 128, 256: 64 * 256}[k]
    same_work = row["instructions"] * tile.warps * 64 / tile.depth
    assert same_work / (tile.rows * tile.columns) <= 0.65 * before * 8 / former


def test_sorted_contraction_has_three_slots() -> None:
    rows = [row for row in FIGURES if row["kernel"] == "sorted" and row["target"] == "sm_90"]
    assert rows[0]["tile"] == list(
        plan.contract_tiles(512, torch.bfloat16, TARGETS["sm_90"][1], True)[0]
    )
    assert min(rows[0]["slots"]) >= 3


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_choice_spills(target: str) -> None:
    """Read off the table that the tool wrote, which covers every choice that is timed."""
    device = TARGETS[target][1]
    table = {(row["kernel"], tuple(row["tile"])): row for row in FIGURES if row["target"] == target}
    for kernel, _, tile in pamm_kernels.chosen(target, first=False):
        row = table[kernel, tuple(tile)]
        assert row["spilled"] == 0
        assert row["shared"] <= device.shared_bytes


@pytest.mark.parametrize("k", [64, 256])
def test_assignment_with_the_cosine(k: int) -> None:
    tile = plan.assign_tiles(k, 2048, torch.bfloat16, TARGETS["sm_90"][1])[0]
    kernel = pamm_kernels.compile_assign(tile, k, "sm_90", with_norm=True)
    check(kernel, "sm_90")
    assert refilled_too_early(kernel.kernel.asm["ttgir"]) == []


@pytest.mark.parametrize(("target", "precision"), [("sm_80", "ieee"), ("sm_90", "tf32")])
def test_fp32(target: str, precision: str) -> None:
    device, options = TARGETS[target][1], {"dtype": torch.float32, "precision": precision}
    tile = plan.assign_tiles(512, 2048, torch.float32, device)[0]
    check(pamm_kernels.compile_assign(tile, 512, target, with_norm=True, **options), target)
    tile = plan.contract_tiles(512, torch.float32, device)[0]
    check(pamm_kernels.compile_contract(tile, 512, target, **options), target)


@pytest.mark.parametrize("target", ["sm_89", "sm_100", "gfx942"])
def test_other_devices(target: str) -> None:
    device = TARGETS[target][1]
    backend = TARGETS[target][0].backend
    if backend != "cuda" and "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    tile = plan.assign_tiles(64, 2048, torch.bfloat16, device)[0]
    check(pamm_kernels.compile_assign(tile, 64, target), target)
    for k in (64, 256):
        tile = plan.contract_tiles(k, torch.bfloat16, device)[0]
        check(pamm_kernels.compile_contract(tile, k, target), target)


def test_sizes_that_no_tile_divides() -> None:
    device = TARGETS["sm_90"][1]
    tile = plan.assign_tiles(64, 33, torch.bfloat16, device)[0]
    check(pamm_kernels.compile_assign(tile, 64, "sm_90", n=33), "sm_90")
    tile = plan.contract_tiles(64, torch.bfloat16, device)[0]
    check(pamm_kernels.compile_contract(tile, 64, "sm_90", m=1000), "sm_90")


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


def test_the_hazard_check_finds_the_hazard() -> None:
    types = (("X", "*bf16"), ("C", "*bf16"), ("OUT", "*fp32"))
    sizes = (("n", 2048), ("BLOCK", 64))
    fn: Any = two_readers.two_readers_kernel
    kernel = compiled.compile_kernel(fn, types, sizes, Tile(128, 64, 64, 8, 3), TARGETS["sm_90"][0])
    if not refilled_too_early(kernel.kernel.asm["ttgir"]):
        pytest.skip(f"Triton {triton.__version__} leaves enough slots for two readers")


@pytest.mark.parametrize("shared", [16 << 10, 48 << 10, 64 << 10, 100 << 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 100, 5000])
def test_there_is_a_tile_for_every_device(k: int, dtype: torch.dtype, shared: int) -> None:
    device = Device("cuda", 7, 20, shared)
    for n in (1, 100, 4096):
        assert plan.assign_tiles(k, n, dtype, device)
    for is_sorted in (False, True):
        tile = plan.contract_tiles(k, dtype, device, is_sorted)[0]
        for tokens, widths in ((1, [1]), (1 << 20, [64])):
            args = (tokens, widths, k, dtype.itemsize, tile, device, is_sorted)
            assert 1 <= plan.splits(*args) <= 32
