"""Run the examples, tiny, and check what they print and leave behind."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pamm_testing.programs import CHECKOUT, EXAMPLES, TINY, assert_finite

Run = Callable[..., str]


@pytest.mark.everything
def test_minimal_from_a_plain_checkout() -> None:
    """As a user runs it, with code generated; the only example that CI spends that time on."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.minimal"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.M)]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert re.search(r"^\d+ of \d+ sites compressed in 1 training graph", done.stdout, re.M)
    assert "r = 48" in done.stdout


def test_minimal_is_short() -> None:
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 25


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_reads_alone(path: Path) -> None:
    """No example imports another file of the folder."""
    others = "|".join(each.stem for each in EXAMPLES.iterdir() if each != path)
    imports = re.findall(rf"^\s*(?:from|import) (?:examples|{others})\b.*", path.read_text(), re.M)
    assert imports == []


@pytest.mark.usefixtures("no_code")
def test_train(run_here: Run, tmp_path: Path) -> None:
    printed = run_here(
        "train.py", *TINY, "--pretrain", 8, "--steps", 4, "--ratio",
        "--rules", "linear=pamm:32", "--out", tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "train-seed0.json").read_text())
    assert_finite(record)
    exact, control, *others = record["runs"]
    assert (exact["name"], control["name"]) == ("exact", "exact, other order")
    assert [each["name"] for each in others] == ["linear=pamm:32"]
    for each in (exact, *others):
        assert len(each["losses"]) == len(each["times_s"]) == 4
        # The same weights, which were trained, and the forward pass is nobody's to change.
        assert each["losses"][0] == pytest.approx(exact["losses"][0], abs=1e-5)
        assert each["losses"][0] < 5.5
        assert 0 < each["saved_bytes"] <= each["peak_bytes"]
        assert f"| {each['name']} |" in printed
    for each in others:
        assert each["compressed_sites"] > 0
        assert each["saved_bytes"] < exact["saved_bytes"]
        assert each["losses"] != exact["losses"]
    assert exact["time_ratio"] == 1
    assert (tmp_path / "train-seed0.png").read_bytes().startswith(b"\x89PNG")


def test_the_arms_of_train() -> None:
    example = runpy.run_path(str(EXAMPLES / "train.py"))
    arms = example["arms"](example["parse"](["--ratio", "64", "512"]))
    assert list(arms) == ["PAMM 64 on Q, K, V", "PAMM 512 on Q, K, V", "whole model"]


@pytest.mark.usefixtures("no_code")
def test_train_tunes_adapters(run_here: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="of the extra [trainers]")
    printed = run_here(
        "train.py", *TINY, "--pretrain", 0, "--steps", 4, "--lora", 4, "--ratio",
        "--rules", "linear=subspace:4", "--out", tmp_path,
    )  # fmt: skip
    exact, _, ours = json.loads((tmp_path / "train-seed0.json").read_text())["runs"]
    assert ours["losses"][0] == pytest.approx(exact["losses"][0], abs=1e-5)
    # B starts at zero: A has its first gradient in the second step.
    assert ours["losses"] != exact["losses"]
    assert ours["saved_bytes"] < exact["saved_bytes"]
    assert "mlp.down_proj.lora_A.default.weight" in printed


@pytest.mark.usefixtures("no_code")
def test_compare_memory(run_here: Run) -> None:
    options = ("--vocabulary", 300, "--ratio", 64, "--steps", 1, "--dtype", "bfloat16")
    printed = run_here("compare_memory.py", *TINY, *options)
    assert "1 of 1 sites compressed" in printed
    for arm in ("eager", "compile", "compile + budget 0.99", "PAMM", "PAMM + budget 0.99"):
        assert f"measuring {arm}\n" in printed
        assert len(re.findall(rf"^{re.escape(arm)}  ", printed, re.M)) == 1


@pytest.mark.parametrize("model", ["gpt2", "roberta", "qwen3"])
def test_compare_memory_takes_any_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(EXAMPLES / "compare_memory.py"))
    options = ("--model", model, "--vocabulary", "300", "--device", "cpu", *TINY)
    monkeypatch.setattr("sys.argv", ["compare_memory.py", *options])
    built = example["build"](example["parse"]())
    ids = torch.randint(1, 300, (2, 64))
    assert built(input_ids=ids, labels=ids).loss.isfinite()
    assert built.config.num_hidden_layers == 1
    assert built.get_input_embeddings().weight.shape == (300, 32)


@pytest.mark.usefixtures("no_code")
def test_opaque_norm(run_here: Run) -> None:
    printed = run_here("opaque_norm.py", *TINY, "--ratio", 64)
    rows = {
        name: (float(plain), float(opaque))
        for name, plain, opaque in re.findall(r"^(\S.*?) {2,}([\d.]+) {2,}([\d.]+)$", printed, re.M)
    }
    assert list(rows) == ["compile", "compile + budget 0.99", "PAMM", "PAMM + budget 0.99"]
    assert all(rows["PAMM"][at] < rows["compile"][at] for at in (0, 1))
    # An opaque norm cannot be recomputed: there PAMM saves bytes at a budget of 0.99 too.
    assert rows["PAMM + budget 0.99"][1] < rows["compile + budget 0.99"][1]
