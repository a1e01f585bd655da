"""Reports on disk: whatever happens to them, compilation goes on, and nothing untrue is said."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx import GraphModule, symbolic_trace

import pamm_compile
from pamm_compile import recorded
from pamm_compile.graph.pipeline import Pipeline
from pamm_compile.private import inductor
from pamm_compile.recorded import RecordedReport
from pamm_compile.report import GraphReport, Note, State

pytestmark = pytest.mark.usefixtures("own_cache")

MADE = GraphReport(notes=(Note("NO_ATTENTION", "attention"),))


def _gm() -> GraphModule:
    return symbolic_trace(torch.nn.Linear(2, 2))


def _recorded(*inputs: Any, names: dict[str, str] | None = None) -> RecordedReport:
    given = list(inputs or [torch.ones(1, 2)])
    return RecordedReport(_gm(), Pipeline([], names or {}), given)


def _folder() -> Path:
    return Path(inductor.cache_dir()) / "pamm_compile"


def _kept() -> Path:
    (path,) = _folder().iterdir()
    return path


def test_a_report_is_read_again() -> None:
    assert _recorded().settle(MADE) is MADE
    assert _recorded().settle(None) == MADE
    assert _recorded(torch.ones(1, 3)).settle(None).state is State.UNKNOWN
    assert _recorded(torch.ones(1, 2).bfloat16()).settle(None).state is State.UNKNOWN
    assert _recorded(names={"input:0": "a"}).settle(None).state is State.UNKNOWN
    with torch.autocast("cpu"):
        assert _recorded().settle(None).state is State.UNKNOWN


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"guards": null, "report": {"sites": [], "notes": [], "state": "training"}}',
        b'{"guards": null, "report": {}, "sha256": ""}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_file_is_unknown_and_replaced(content: bytes) -> None:
    _recorded().settle(MADE)
    path = _kept()
    intact = path.read_bytes()
    path.write_bytes(content)
    assert _recorded().settle(None).state is State.UNKNOWN
    assert _recorded().settle(MADE) is MADE
    assert path.read_bytes() == intact


def test_a_truncated_file_at_every_length() -> None:
    _recorded().settle(MADE)
    path = _kept()
    intact = path.read_bytes()
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        assert _recorded().settle(None).state is State.UNKNOWN
    path.write_bytes(intact.replace(b"NO_ATTENTION", b"NARROW_INPUT"))
    assert _recorded().settle(None).state is State.UNKNOWN


def test_a_folder_in_a_files_place() -> None:
    _recorded().settle(MADE)
    path = _kept()
    path.unlink()
    path.mkdir()
    assert _recorded().settle(None).state is State.UNKNOWN
    assert _recorded().settle(MADE) is MADE
    assert [each.name for each in _folder().iterdir()] == [path.name]


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_files_have_the_permissions_that_the_users_mask_gives(mask: int) -> None:
    before = os.umask(mask)
    try:
        _recorded().settle(MADE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(_kept().stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("call", ["os.replace", "pathlib.Path.write_text", "pathlib.Path.mkdir"])
def test_a_full_or_unwritable_folder_stops_nothing_and_keeps_nothing(call: str) -> None:
    with mock.patch(call, side_effect=OSError(28, "No space left on device")):
        assert _recorded().settle(MADE) is MADE
    assert not _folder().exists() or list(_folder().iterdir()) == []
    assert _recorded().settle(None).state is State.UNKNOWN


def test_no_draft_is_left_if_the_disk_fills_while_writing() -> None:
    real = Path.write_text

    def half(path: Path, text: str) -> None:
        real(path, text[:10])
        raise OSError(28, "No space left on device")

    with mock.patch.object(Path, "write_text", half):
        assert _recorded().settle(MADE) is MADE
    assert list(_folder().iterdir()) == []


def test_a_cache_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "cache_dir", mock.Mock(side_effect=PermissionError("no")))
    assert _recorded().settle(MADE) is MADE
    assert _recorded().settle(None).state is State.UNKNOWN


def test_operator_by_operator_needs_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_write", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(inductor, "cache_dir", mock.Mock(side_effect=AssertionError))
    backend = pamm_compile.backend(base="aot_eager", min_tokens=1, seed=6)
    backend.report.clear()
    torch.compile(torch.nn.Linear(4, 4), backend=backend)(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4), backend=backend)(torch.ones(2, 4))
    assert [graph.state for graph in backend.report.graphs] == [State.TRAINING, State.INFERENCE]


def test_unknown_is_said_and_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a cache had answered: Inductor is replaced by one that runs no pass."""
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, inputs, **_: gm.forward)
    backend = pamm_compile.backend(seed=7)
    backend.report.clear()
    torch.compile(torch.nn.Linear(4, 4), backend=backend)(torch.ones(2, 4))
    (graph,) = backend.report.graphs
    assert graph.state is State.UNKNOWN
    assert graph.summary().startswith("unknown: a cache returned the graph")
    assert "1 graph(s) unknown" in str(backend.report)
    torch._dynamo.reset()
    strict = pamm_compile.backend(seed=7, strict=True)
    with pytest.raises(Exception, match="unknown") as error:
        torch.compile(torch.nn.Linear(4, 4), backend=strict)(torch.ones(2, 4))
    inner = getattr(error.value, "inner_exception", error.value)
    assert isinstance(inner, pamm_compile.UnknownReportError)


_PROCESS = """
import sys
import torch
if len(sys.argv) > 2:
    torch.compiler.load_cache_artifacts(open(sys.argv[1], "rb").read())
import pamm_compile
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
torch.manual_seed(0)
class A(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.p = nn.LayerNorm(16), nn.Linear(16, 48)
    def forward(self, x):
        return F.scaled_dot_product_attention(*self.p(self.n(x)).unsqueeze(1).chunk(3, -1))
backend = pamm_compile.backend(ratio=64, strict=True)
torch.compile(A(), backend=backend)(torch.randn(1, 256, 16)).square().mean().backward()
if len(sys.argv) == 2:
    open(sys.argv[1], "wb").write(torch.compiler.save_cache_artifacts()[0])
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(hits, backend.report.graphs[-1].summary())
"""


@pytest.mark.slow
def test_reports_travel_with_torchs_cache_artifacts(tmp_path: Path) -> None:
    """Saved in one process, and loaded in another before pamm_compile is imported."""
    # What one process runs must be what the next does, whatever is edited meanwhile.
    shutil.copytree(Path(pamm_compile.__file__).parent, tmp_path / "package" / "pamm_compile")

    def run(folder: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROCESS, str(tmp_path / "mega"), *arguments],
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder),
                "PYTHONPATH": str(tmp_path / "package"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    cold = run("cold")
    assert cold.startswith("0 1 of 1 sites, ")
    # A process that finds all in its cache saves the report as well.
    assert run("cold") == cold.replace("0", "1", 1)
    assert run("elsewhere", "load") == cold.replace("0", "1", 1)
    (report,) = (tmp_path / "elsewhere" / "pamm_compile").glob("*.json")
    assert json.loads(report.read_text())["report"]["state"] == "training"
