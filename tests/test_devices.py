"""Figures of devices: read by the names of those that are there, and none invented."""

from __future__ import annotations

import pytest
import torch

from pamm_compile import devices
from pamm_compile.methods.quantized.method import Quantized
from pamm_compile.sites.cost import saved_time
from pamm_compile.size import Size


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_device_is_known_by_its_drivers_name(name: str, key: str) -> None:
    assert devices.known_as(name) is devices.device_named(key)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 5090",
        "AMD Instinct MI300A",
    ],
)
def test_of_others_nothing_is_known(name: str) -> None:
    assert devices.known_as(name) is None


def test_figures_are_those_of_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert devices.at_hand("mps") is None
    size = Size(4096, 1024, (1024,), torch.bfloat16, "cuda")
    times = {}
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        times[name] = saved_time(Quantized(4), size)
    h100, a100, unknown = times.values()
    assert h100 != a100
    assert unknown == h100
    assert a100 == saved_time(Quantized(4), size, devices.device_named("a100"))


def test_latencies_between_published_ones_are_between_them() -> None:
    single = devices.CHOLESKY_SECONDS[1]
    share = 1 + devices.SOLVE_SHARE
    for rows, seconds in single.items():
        assert devices.factorisation_seconds(rows, 1) == pytest.approx(share * seconds)
    assert single[128] < devices.factorisation_seconds(256, 1) / share < single[512]
    many = [devices.factorisation_seconds(128, count) for count in (1, 2, 16, 30, 64, 100)]
    assert many == sorted(many)
    # Nothing smaller than the smallest is faster.
    assert devices.factorisation_seconds(8, 1) == pytest.approx(share * single[16])


def test_every_figure_has_a_source() -> None:
    for figures in devices.DEVICES.values():
        assert "20" in figures.source
        assert figures.goes_by
        assert 0 < figures.single < figures.tf32 < figures.half
