"""The pipeline: further passes, switching passes off, dumps, one report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pamm_testing.forms import FusedQKV
from pamm_testing.zoo import BATCH, LENGTH, WIDTH

import pamm_compile
from pamm_compile import GraphReport, Note
from pamm_compile.driver import make_pipeline
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.pipeline import DISABLE
from pamm_compile.graph.vocabulary import is_matmul


@dataclass(frozen=True)
class CountMatmuls:
    """A second pass: counts the matmuls that the first one left."""

    name: str = "count-matmuls"
    fingerprint: str = "1"

    def __call__(self, joint: JointGraph, *, apply: bool) -> GraphReport:
        count = sum(is_matmul(node) for node in joint.nodes)
        return GraphReport(notes=(Note("COUNTED", "matmuls", str(count)),))


def _train(**options: Any) -> pamm_compile.Backend:
    backend = pamm_compile.backend(ratio=4, min_tokens=1, base="aot_eager", **options)
    backend.report.clear()
    torch.compile(FusedQKV(), backend=backend)(torch.randn(BATCH, LENGTH, WIDTH)).sum().backward()
    torch._dynamo.reset()
    return backend


@pytest.mark.quick
def test_a_second_pass_runs_behind_ours_and_reports_with_it() -> None:
    backend = _train(passes=[CountMatmuls()])
    (graph,) = backend.report.graphs
    assert len(graph.sites) == 1
    (note,) = graph.notes
    assert note.reason == "COUNTED"
    assert int(note.detail) > 0


def test_passes_are_switched_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "compress-inputs")
    backend = _train(passes=[CountMatmuls()], seed=3)
    (graph,) = backend.report.graphs
    assert graph.sites == ()
    assert [note.reason for note in graph.notes] == ["COUNTED"]


def test_the_uuid_has_every_pass() -> None:
    options = pamm_compile.backend().options
    uuids = {
        make_pipeline(options, {}, further).uuid()
        for further in ([], [CountMatmuls()], [CountMatmuls(fingerprint="2")])
    }
    assert len(uuids) == 3
    assert pamm_compile.backend(passes=[CountMatmuls()]) != pamm_compile.backend()


def test_graphs_before_and_after_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pamm_compile.graph"):
        _train(seed=4)
    logged = {
        record.getMessage().split(":")[0]: record.getMessage()
        for record in caplog.records
        if record.name == "pamm_compile.graph.pipeline"
    }
    assert list(logged) == [
        "joint graph before compress-inputs", "joint graph after compress-inputs",
    ]  # fmt: skip
    before, after = logged.values()
    assert "pamm.assign" not in before
    assert "pamm.assign" in after
