"""What is to run in a short time on a GPU, without one: kernels' cells, a session of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pamm_testing.programs import assert_finite

from examples.benchmarks import gpu_session, kernels
from pamm_compile import devices
from pamm_compile.methods.pamm.triton import model, plan
from pamm_compile.size import Size


def test_inputs_are_as_many_as_the_cache_takes_of_what_is_read() -> None:
    # X of 60M at 16,384 tokens in bf16 is 16 MiB; an limits's L2 cache holds 50.
    assert kernels.sets_needed(16 * 2**20, 50 * 2**20) == 7
    assert kernels.sets_needed(48 * 2**20, 50 * 2**20) == 3
    assert kernels.sets_needed(2**30, 50 * 2**20) == 1
    site = kernels.Site("tiny", 256, 8, torch.float32, kernels.Clock("cpu", 1))
    x, gradients = (sum(t.nbytes for t in tensors) for tensors in (site.x, site.grads))
    assert x > 2 * site.cache
    assert gradients > 2 * site.cache


def test_every_tile_is_timed_in_its_turn() -> None:
    """What a kernel chooses from is replaced by one choice after the other."""
    seen: list[Any] = []
    limits = model.limits_of(devices.device_named("h100"))

    def timed() -> float:
        seen.extend(plan.contract_tiles(128, torch.bfloat16, limits, False))
        if len(seen) == 2:
            raise RuntimeError("out of shared memory")
        return float(len(seen))

    choices = plan.contract_tiles(128, torch.bfloat16, limits, False)
    assert len(choices) > 2
    times = kernels._by_choice("contract_tiles", timed)
    assert list(times) == [str(tile) for tile in choices]
    assert list(times.values())[:3] == [1.0, None, 3.0]
    assert plan.contract_tiles(128, torch.bfloat16, limits, False) == choices


def test_measured_kernels_stand_beside_predicted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    size = Size(16384, 2048, (2048,) * 3, torch.bfloat16, "cuda")
    found = kernels.predictions(size, 128)
    assert {"assign", "contract", "finish", "exact"} <= set(found)
    assert all(0 < seconds < 1e-2 for seconds in found.values())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an unknown device")
    assert kernels.predictions(size, 128) == {}


def test_a_cell_that_fails_loses_itself_alone() -> None:
    saved: list[int] = []
    record: dict[str, Any] = {}

    class Failing(kernels.Site):
        def measure(self, copy: float, with_tiles: bool) -> kernels.Cell:
            if self.k == 9:
                raise torch.OutOfMemoryError("no room for this")
            return super().measure(copy, with_tiles)

    kernels.measure_all(
        [("tiny", 256, 8), ("tiny", 256, 9), ("tiny", 256, 10), ("tiny", 256, 11)],
        kernels.Clock("cpu", 1),
        record,
        lambda: saved.append(len(record["kernels"])),
        until=3,
        now=iter([1, 2, 3, 4]).__next__,
        make=Failing,
    )
    assert saved == [1, 2, 3]
    assert [cell["generators"] for cell in record["kernels"]] == [8, 9, 10]
    assert record["kernels"][1]["error"] == "OutOfMemoryError: no room for this"
    assert record["kernels"][2]["exact"] > 0
    assert record["skipped"] == ["kernels tiny, 256 tokens, k = 11"]


@pytest.mark.everything
def test_a_dry_run_of_the_gpu_session(tmp_path: Path) -> None:
    """Every command, option and file of the half hour, at toy sizes."""
    gpu_session.main(["--dry-run", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "session.json").read_text())
    assert record["environment"]["torch"]
    parts = record["parts"]
    assert list(parts) == [part.name for part in gpu_session.plan(tmp_path)]
    for part in parts.values():
        assert part["outcome"] == "done"
        if "results" in part:
            assert_finite(json.loads((tmp_path / part["results"]).read_text()))
    (cell,) = json.loads((tmp_path / "kernels-by-tile.json").read_text())["kernels"]
    assert cell["exact"] > 0
    frontier = json.loads((tmp_path / "frontier-60m" / "benchmark.json").read_text())
    assert frontier["models"]["llama-60m"]["pareto"]["peak"]
    losses = json.loads((tmp_path / "training-60m.json").read_text())["runs"]
    assert list(losses) == ["compile", "qkv=pamm:64"]


def test_a_gpu_session_keeps_to_its_time(tmp_path: Path) -> None:
    clock = [0.0]
    limits: dict[str, float] = {}

    def run(part: gpu_session.Part, limit: float) -> int | None:
        limits[part.name] = limit
        if part.name == "kernels":
            clock[0] += 10
            raise torch.OutOfMemoryError("no room")
        clock[0] += limit
        return {"tests": 1, "steps 60m": None}.get(part.name, 0)

    session = gpu_session.Session(tmp_path, 600, run, now=lambda: clock[0])
    parts = gpu_session.plan(tmp_path)
    session.run(parts)
    record = json.loads((tmp_path / "session.json").read_text())
    outcomes = {name: part["outcome"] for name, part in record["parts"].items()}
    assert list(outcomes) == [part.name for part in parts]
    # 180, 10 of 150, 100, 170: 140 of 600 are left for the next, and nothing for the rest.
    assert list(outcomes.values()) == [
        "exit code 1",
        "OutOfMemoryError: no room",
        "ended for its time",
        "done",
        "done",
        *["not begun: no time left"] * 3,
    ]
    assert limits["kernels by tile"] == 140
    assert record["seconds"] == 600


def test_a_gpu_session_is_useful_early_and_ends_in_time(tmp_path: Path) -> None:
    parts = gpu_session.plan(tmp_path)
    assert sum(part.seconds for part in parts) <= 60 * gpu_session.MINUTES
    first = [part.name for number, part in enumerate(parts) if
             sum(each.seconds for each in parts[: number + 1]) <= 600]  # fmt: skip
    assert first == ["tests", "kernels", "steps 60m", "steps 1b"]
    for part in parts:
        # Its own limit lets a command finish what it has begun.
        for option in ("--time-limit", "--budget", "--seconds"):
            if option in part.arguments:
                given = float(part.arguments[part.arguments.index(option) + 1])
                assert given < part.seconds


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    run = gpu_session.in_a_process(tmp_path)
    part = gpu_session.Part("slow", 1, "pytest", ("--version",), ())
    assert run(part, 60) == 0
    assert (tmp_path / "slow.log").read_text().startswith("pytest ")
    assert run(part, 0.01) is None
