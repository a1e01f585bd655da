"""What is to run in a short time on a GPU, without one: kernels' cells, a session of parts."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pamm_testing.programs import assert_finite

import pamm_compile
from examples.benchmarks import compressed, gpu_session, kernels, method_times, steps, worker
from examples.benchmarks.arms import BLOCK, GPU_ARMS, QKV, Arm, by_name
from examples.benchmarks.models import SHAPES, WEIGHTS, Case
from pamm_compile import devices
from pamm_compile.methods.pamm.triton import model, plan
from pamm_compile.report import GraphReport
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


CASE = Case(
    "llama-350m", SHAPES["llama-350m"]._replace(layers=1, vocabulary=257), 64, dtype=WEIGHTS
)
APPROXIMATE = [arm for arm in GPU_ARMS if arm.approximates]
DISTINCT = ("gradients", "recommended", "PAMM, Q, K, V")
"""The others are like one of these, with another rank, method or setting."""


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(arm, marks=() if arm.name in DISTINCT else pytest.mark.everything)
        for arm in APPROXIMATE
    ],
    ids=lambda arm: arm.name,
)
def test_every_arm_compresses_what_it_is_named_after(arm: Arm) -> None:
    if arm.float8:
        pytest.importorskip("torchao.float8", reason="needs torchao: the extra float8")
    ((_, what, wrong),) = compressed.predicted(CASE, [arm], gpu_session.LISTED_FOR)
    assert wrong == ""
    assert arm.compresses <= set(what.split(", ")) <= arm.compresses | arm.may_compress
    assert arm.compresses in (QKV, BLOCK)


def test_every_arm_of_a_session_is_checked() -> None:
    named = {name for part in gpu_session.plan(Path()) for name in part.arms}
    assert {arm.name for arm in APPROXIMATE} <= named
    assert all(by_name(name).compresses for name in named if by_name(name).approximates)
    # In the compiled mode as in every other: the same sites.
    for arm in APPROXIMATE:
        assert arm.compresses == by_name(arm.name.removesuffix(", CUDA graphs")).compresses


def _report(*names: str) -> pamm_compile.Report:
    """What a graph of one layer reports in which these inputs are compressed."""
    sites = [
        pamm_compile.SiteReport(
            parameters=(name,), shape=(1, 1), dtype="float32", method="", generators=0,
            bytes_before=0, bytes_after=0, compressed=True,
        )
        for name in names
    ]  # fmt: skip
    return pamm_compile.Report([GraphReport(tuple(sites))])


def test_what_is_not_compressed_as_named_is_found() -> None:
    """As every site was where the model of the time declined it, or all but the head's."""
    arm, head = by_name("gradients"), "lm_head.weight"
    block = [f"model.layers.0.mlp.{name}.weight" for name in sorted(BLOCK)]
    assert compressed.wrong(arm, CASE, _report(*block)) == ""
    assert compressed.wrong(by_name("recommended"), CASE, _report(*block, head)) == ""
    deeper = dataclasses.replace(CASE, shape=CASE.shape._replace(layers=2))
    for case, names, what in (
        (CASE, [head], "without down_proj, gate_proj, k_proj, q_proj, up_proj, v_proj and with"),
        (CASE, [*block, head], "with lm_head"),
        (CASE, block[1:], "without down_proj"),
        (deeper, [*block, block[0].replace("0", "1")], "without gate_proj"),
        (CASE, [], "nothing"),
    ):
        sentence = compressed.wrong(arm, case, _report(*names))
        assert sentence.startswith(f"{compressed.WRONG}gradients, {what}"), sentence
    assert compressed.wrong(by_name("compile"), CASE, pamm_compile.Report()) == ""


@pytest.mark.everything
def test_a_part_fails_whose_arms_are_not_as_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = f"{compressed.WRONG}gradients, nothing"
    monkeypatch.setattr(compressed, "wrong", lambda arm, case, report: sentence)
    shape = SHAPES["llama-60m"]._replace(width=32, layers=1, heads=2, inner=32, vocabulary=257)
    case = Case("llama-60m", shape._replace(sequence=32), 1, base="aot_eager", min_tokens=1)
    arm = by_name("gradients")
    measured, times = worker.memory(case, arm), worker.step_times(case, [arm], 1)
    assert measured == {"error": sentence}
    assert times["skipped"] == {"gradients": sentence}
    arms = {"gradients": {**measured, "not_timed": sentence}}
    assert steps.not_as_named({"models": {"llama-60m": {"arms": arms}}}) == [sentence]
    with pytest.raises(SystemExit, match="not compressed as named"):
        worker.quality(case, [arm], 1, 0.0)


@pytest.mark.everything
def test_a_dry_run_of_the_gpu_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Every command, option and file of the half hour, at toy sizes."""
    gpu_session.main(["--dry-run", "--out", str(tmp_path)])
    listed = capsys.readouterr().out
    for name in (name for part in gpu_session.plan(tmp_path) for name in part.arms):
        assert not by_name(name).approximates or f"| {name} |" in listed
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
    found = json.loads((tmp_path / "steps-350m" / "benchmark.json").read_text())
    assert found["models"]["llama-60m"]["arms"]["gradients"]["compressed_sites"] == 3
    losses = json.loads((tmp_path / "training-60m.json").read_text())["runs"]
    assert list(losses) == ["compile", *gpu_session.TRAINED_ARMS]
    assert "| tiny | gate, up | exact dW |" in (tmp_path / "predicted.md").read_text()


def test_methods_are_timed_beside_what_is_predicted() -> None:
    found: list[dict[str, Any]] = []
    h100 = devices.device_named("h100")
    sites = method_times.sites(True)
    method_times.measure(sites, kernels.Clock("cpu", 1), h100, time.time() + 60, found.append)
    assert [each["what"] for each in found] == [
        "exact dW",
        *(
            f"gradients:{rank:g}, {what}"
            for rank in method_times.RANKS
            for what in ("a step along", "finding, 1 at once")
        ),
        *method_times.METHODS,
    ]
    assert all(each["measured"] > 0 and each["predicted"] > 0 for each in found)
    line = method_times.row({**found[0], "predicted": 1e-6, "measured": 2e-6})
    assert line[3:] == ["1", "2", "2.00"]
    assert method_times.row({**found[0], "predicted": None})[3] == "unknown device"
    assert len(method_times.sites(False)) == 3 * len(method_times.MODELS)


def test_a_gpu_session_keeps_to_its_time(tmp_path: Path) -> None:
    clock = [0.0]
    limits: dict[str, float] = {}

    def run(part: gpu_session.Part, limit: float) -> int | None:
        limits[part.name] = limit
        if part.name == "kernels":
            clock[0] += 10
            raise torch.OutOfMemoryError("no room")
        clock[0] += limit
        return {"correctness": 1, "steps 1b": None}.get(part.name, 0)

    session = gpu_session.Session(tmp_path, 900, run, now=lambda: clock[0])
    parts = gpu_session.plan(tmp_path)
    session.run(parts)
    record = json.loads((tmp_path / "session.json").read_text())
    outcomes = {name: part["outcome"] for name, part in record["parts"].items()}
    assert list(outcomes) == [part.name for part in parts]
    # 150, 180, 10 of 120, and 330: 230 of 900 are left for the next, and nothing for the rest.
    assert list(outcomes.values()) == [
        "exit code 1",
        "done",
        "OutOfMemoryError: no room",
        "ended for its time",
        "done",
        *["not begun: no time left"] * 3,
    ]
    assert limits["steps 350m"] == 230
    assert record["seconds"] == 900


def test_a_gpu_session_is_useful_early_and_ends_in_time(tmp_path: Path) -> None:
    parts = gpu_session.plan(tmp_path)
    assert sum(part.seconds for part in parts) <= 60 * gpu_session.MINUTES
    first = [part.name for number, part in enumerate(parts) if
             sum(each.seconds for each in parts[: number + 1]) <= 800]  # fmt: skip
    assert first == ["correctness", "methods", "kernels", "steps 1b"]
    for part in parts:
        # Its own limit lets a command finish what it has begun.
        for option in ("--time-limit", "--budget", "--seconds"):
            if option in part.arguments:
                given = float(part.arguments[part.arguments.index(option) + 1])
                assert given < part.seconds


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    log, told = tmp_path / "slow.log", tmp_path / "child"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)"
    )
    assert gpu_session.ended([sys.executable, "-c", "print(1); raise SystemExit(3)"], log, 60) == 3
    assert log.read_text() == "1\n"
    assert gpu_session.ended([sys.executable, "-c", parent], log, 2) is None
    assert log.read_text() == "begun\n"
    assert not _runs(int(told.read_text()))


def _runs(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        # One that has ended and that nobody waits for is still there.
        stat = Path(f"/proc/{process}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True
