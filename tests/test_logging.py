"""What a run shows by torch's own means: TORCH_LOGS, and the traces that tlparse reads."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from torch import nn

import pamm_compile

_SCRIPT = """
import torch
import pamm_compile
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(32, 32)
        self.attention = nn.ModuleList(nn.Linear(32, 96) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for i, qkv in enumerate(self.attention):
            if i == 2:
                x = torch.tanh(x)
            q, k, v = qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x

backend = pamm_compile.backend(64, base="aot_eager")
torch.compile(Model(), backend=backend)(torch.randn(2, 128, 32)).square().mean().backward()
"""
_SUMMARY = "1 of 3 sites, 32.0 KiB → 1.8 KiB; 2 declined: SHARED_INPUT ×2"


def _stderr(**settings: str) -> str:
    ours = {name: text for name, text in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        capture_output=True,
        text=True,
        env={**ours, "OMP_NUM_THREADS": "1", **settings},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_nothing_is_said_unasked(capfd: pytest.CaptureFixture[str]) -> None:
    exec(_SCRIPT, {"__name__": "script"})
    said = capfd.readouterr()
    assert said.out == ""
    assert "sites" not in said.err


def test_torch_logs_and_traces(tmp_path: Path) -> None:
    stderr = _stderr(TORCH_LOGS="+pamm_compile", TORCH_TRACE=str(tmp_path))
    lines = [line for line in stderr.splitlines() if "pamm_compile/torch_backend.py" in line]
    assert re.match(r"^I\d+ \S+ \d+ \S*pamm_compile/torch_backend\.py:\d+\] \[0/0\] ", lines[0])
    assert lines[0].endswith(_SUMMARY)
    # With a plus, the whole table as well.
    assert all(line.startswith("V") for line in lines[1:])
    table = [line.partition("] [0/0] ")[2] for line in lines[1:]]
    assert any(line.startswith("attention.0.weight ") for line in table)
    assert any(re.fullmatch(r"attention\.2\.weight .* SHARED_INPUT \(.*tanh.*\)", t) for t in table)

    # An artifact is an entry, and its payload the line after it.
    (trace,) = tmp_path.iterdir()
    lines = trace.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if '"pamm_compile_report"' in line]
    entry = json.loads(lines[at][lines[at].index("{") :])
    assert entry["artifact"] == {"name": "pamm_compile_report", "encoding": "json"}
    assert entry["has_payload"]
    report = pamm_compile.GraphReport.from_dict(json.loads(lines[at + 1]))
    assert report.summary() == _SUMMARY
    assert [site.compressed for site in report.sites] == [True, False, False]


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pamm_compile"]


def test_a_model_of_which_nothing_is_known_gives_no_table(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="pamm_compile"), torch.no_grad():
        backend = pamm_compile.backend(4, min_tokens=1, base="aot_eager", seed=21)
        torch.compile(Attention(_sdpa()), backend=backend)(torch.randn(2, 24, 32))
    assert _messages(caplog) == ["no backward pass: graph left as it is"]


def test_notes_count_as_declined(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pamm_compile"):
        backend = pamm_compile.backend(4, min_tokens=1, base="aot_eager", seed=22)
        torch.compile(nn.Linear(32, 32), backend=backend)(torch.randn(24, 32))
    (line,) = _messages(caplog)
    counted = "2 declined: UNCLEAR_TARGET ×1, NO_ATTENTION ×1"
    assert line == f"0 of 1 sites, 0 B → 0 B; {counted}"
