"""Run the examples with real trainers as users do, tiny."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pamm_testing.programs import TINY, run

pytest.importorskip("accelerate", reason="of the extra [trainers]")
pytest.importorskip("lightning", reason="of the extra [trainers]")


def _run(script: str, *options: str, out: Path) -> str:
    printed = run(script, *TINY, *options, "--ratio", "64", "--out", out)
    assert "1 of 1 sites compressed in 1 training graph(s): 32.0 KiB → 1.8 KiB" in printed
    return printed


def _loss(printed: str) -> float:
    (found,) = re.findall(r"^validation loss (\S+) nats a byte$", printed, re.M)
    # Below chance, log 256: it trained; and far from 0: it is a loss.
    assert 3 < float(found) < 5.5
    return float(found)


@pytest.mark.slow
def test_hf_trainer(tmp_path: Path) -> None:
    steps = ("--steps", "4", "--save-every", "2")
    straight = _loss(_run("hf_trainer.py", *steps, out=tmp_path))
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    resumed = _loss(_run("hf_trainer.py", *steps, "--resume", out=tmp_path))
    assert resumed == straight
    states = [tmp_path / folder / "trainer_state.json" for folder in ("kept", "checkpoint-4")]
    first, second = (json.loads(state.read_text())["log_history"] for state in states)
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in second]


@pytest.mark.slow
def test_lightning_trainer(tmp_path: Path) -> None:
    _loss(_run("lightning_trainer.py", "--steps", "4", "--accumulate", "2", out=tmp_path))
    assert list(tmp_path.rglob("*.ckpt"))
