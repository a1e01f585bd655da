"""The model of the kernels' times: what it says where, and what is chosen by it."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
from pamm_testing.forms import FusedQKV
from pamm_testing.zoo import WIDTH

from pamm_compile import InvalidOptionError, backend, explain
from pamm_compile.cli import main
from pamm_compile.devices import DEVICES, device_named, exact_seconds, site_seconds
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.methods.pamm.triton import model, plan
from pamm_compile.size import Size

H100 = device_named("h100")


def qkv(b: int, n: int) -> Size:
    return Size(b, n, (n, n, n), torch.bfloat16, "cuda")


@pytest.mark.parametrize(("k", "most"), [(64, 120), (128, 135), (256, 200)])
def test_wide_sites_reach_the_roofline(k: int, most: int) -> None:
    times = model.site_times(qkv(16384, 2048), k, H100)
    assert sum(time.seconds for time in times) <= most * 1e-6
    # A model of nothing would pass too: reading X and the gradients alone takes this long.
    assert sum(time.seconds for time in times) >= 8 * 16384 * 2048 / 3.35e12


@pytest.mark.parametrize("k", [16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("b", "n"), [(16384, 2048), (131072, 512)])
def test_the_faster_contraction_is_chosen(b: int, n: int, k: int) -> None:
    ways = {
        is_sorted: sum(
            time.seconds
            for time in model.contract_times(b, [n] * 3, k, torch.bfloat16, is_sorted, H100)
        )
        for is_sorted in (False, True)
    }
    limits = model.limits_of(H100)
    picked = model.is_sorted(b, [n] * 3, k, torch.bfloat16, limits)
    assert ways[picked] <= 1.12 * min(ways.values())
    if k <= plan.LEAST_SORTED:
        assert not picked


def test_narrow_sites_are_slower_than_exact_from_512_generators_on() -> None:
    """Where `goal="speed"` has to decline: as many generators as features."""
    size = qkv(131072, 512)
    exact = exact_seconds(size, H100)
    for k in (16, 64, 128, 256):
        assert site_seconds(Pamm(ratio=131072 / k), size, H100) < exact
    for k in (512, 1024):
        assert site_seconds(Pamm(ratio=131072 / k), size, H100) > exact


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_a_time(device: str) -> None:
    figures = device_named(device)
    for dtype in (torch.bfloat16, torch.float32):
        size = Size(4096, 512, (512, 128), dtype, "cuda")
        assert 0 < site_seconds(Pamm(ratio=256), size, figures) < 1e-2


def test_a_device_is_an_entry_of_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/extending.md says of adding one: devices.py, and the limits in model.py."""
    figures = replace(H100, name="Future 100", target="sm_999", launch=1.0)
    limits = model.LIMITS["sm_90"]._replace(major=99, shared_bytes=512 << 10)
    tables = (DEVICES, {"f100": figures}), (model.LIMITS, {"sm_999": limits})
    with mock.patch.dict(*tables[0]), mock.patch.dict(*tables[1]):
        size = qkv(16384, 2048)
        assert site_seconds(Pamm(256), size, device_named("F100")) > 3
        # Launches of a second each, and the exact gradients have three.
        using = backend(ratio=256)
        report = explain(FusedQKV(), torch.randn(4, 128, WIDTH), using=using, device="f100")
        assert [site.time is not None and site.time > 1 for site in report.sites] == [True]
        with pytest.raises(InvalidOptionError, match="Did you mean 'f100'"):
            device_named("f1000")
        with pytest.raises(SystemExit):
            main(["explain", "--help"])
    assert "f100" in capsys.readouterr().out


def test_splits_leave_few_multiprocessors_without_work() -> None:
    limits = model.limits_of(H100)
    for n in (256, 512, 1024, 2048):
        tile = plan.contract_tiles(64, torch.bfloat16, limits)[0]
        splits = plan.splits(131072, [n] * 3, 64, 2, tile, limits)
        programs = 3 * -(-n // tile.rows) * splits
        busiest = -(-programs // limits.processors) * limits.processors
        assert programs / busiest >= 0.85


def makespan(lengths: list[float], places: int) -> float:
    """When the last of programs ends that start in order wherever a place is free."""
    free = [0.0] * places
    for length in lengths:
        at = min(range(places), key=free.__getitem__)
        free[at] += length
    return max(free)


def test_a_heavy_generator_does_not_set_the_end() -> None:
    """Programs of the sorted kernel in the order that they start, on one H100."""
    b, k, widths = 131072, 512, [512] * 3
    limits = model.limits_of(H100)
    tile = plan.contract_tiles(k, torch.bfloat16, limits, True)[0]
    splits = plan.splits(b, widths, k, 2, tile, limits, True)
    share = [0.4, *[0.6 / (k // tile.columns - 1)] * (k // tile.columns - 1)]
    random.Random(0).shuffle(share)
    m_tiles, places = sum(-(-m // tile.rows) for m in widths), 2 * limits.processors
    programs = [s / splits for s in sorted(share, reverse=True) for _ in range(m_tiles * splits)]
    ideal = m_tiles / places
    assert makespan(programs, places) <= 1.25 * ideal
