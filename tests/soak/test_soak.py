"""Two thousand steps hold no more than five hundred, and of a compilation only its report stays."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pamm_compile

WARM = 3
"""Rounds until every shape was compiled for."""
FLAT = 1.0
"""MiB by which the last rounds may hold more than the first warm ones."""


def _soak(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # A forked pool of compilers is no part of what is measured.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(pamm_compile.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "pamm_testing" / "soak.py"), *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.everything
def test_memory_is_flat_over_two_thousand_steps(tmp_path: Path) -> None:
    rounds = _soak(tmp_path, "--steps", "2000")
    assert rounds[-1]["steps"] == 2000
    warm = rounds[WARM:]
    resident = [each["rss_mib"] for each in warm]
    assert statistics.median(resident[-3:]) - statistics.median(resident[:3]) < FLAT, resident
    assert all(each["alive"] == warm[0]["alive"] for each in warm)
    assert all(each["reported"] == warm[0]["reported"] for each in warm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "further", [("--no-code",), pytest.param((), marks=pytest.mark.everything, id="code")]
)
def test_of_a_compilation_only_its_report_stays(tmp_path: Path, further: tuple[str, ...]) -> None:
    rounds = _soak(tmp_path, "--steps", "48", "--rounds", "3", "--reset", *further)
    warm = rounds[1:]
    for name in ("GraphModule", "Graph", "JointGraph", "Pipeline", "Site", "RecordedReport"):
        counts = [each["alive"][name] for each in warm]
        assert max(counts) == min(counts), (name, counts)
    for each in warm:
        # Reports are what we keep, on purpose, up to a bound; nothing else holds one.
        assert each["alive"]["GraphReport"] <= each["reported"]
    assert rounds[-1]["reported"] >= 2 * rounds[0]["reported"], "nothing was compiled again"


def test_a_report_keeps_a_bounded_number_of_graphs() -> None:
    report = pamm_compile.Report()
    for _ in range(5000):
        report.add(pamm_compile.GraphReport(state=pamm_compile.State.INFERENCE))
    assert len(report.graphs) == 1024
