"""Run the examples as users do, tiny, and check what they leave behind."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from pamm_testing.programs import EXAMPLES, TINY, assert_explained, assert_finite, run, start


def test_train(tmp_path: Path) -> None:
    printed = run("train.py", *TINY, "--steps", "3", "--ratio", "64", "--eager", "--out", tmp_path)
    record = json.loads((tmp_path / "train-llama-seed0.json").read_text())
    assert_finite(record)
    exact, pamm, eager = record["runs"]
    assert [run["name"] for run in record["runs"]] == ["torch.compile", "PAMM 64", "eager"]
    assert pamm["generators"] == [4]
    assert pamm["ratio"] == 64
    for each in record["runs"]:
        assert len(each["losses"]) == len(each["times_s"]) == 3
        # Nothing has been updated yet, and PAMM leaves forward alone.
        assert each["losses"][0] == pytest.approx(exact["losses"][0], abs=1e-5)
        assert each["train_gap"] == each["train_loss"] - exact["train_loss"]
        assert each["validation_gap"] == each["validation_loss"] - exact["validation_loss"]
        assert 0 < each["saved_bytes"] <= each["peak_bytes"]
        assert each["name"] in printed
    assert pamm["saved_bytes"] < exact["saved_bytes"]
    assert eager["time_ratio"] > 0
    assert exact["time_ratio"] == 1
    assert record["environment"]["torch"] in printed
    picture = (tmp_path / "train-llama-seed0.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_compare_memory(tmp_path: Path) -> None:
    options = ("--model", "roberta", "--ratio", "64", "--steps", "2", "--dtype", "bfloat16")
    printed = run("compare_memory.py", *TINY, *options, "--out", tmp_path)
    record = json.loads((tmp_path / "compare-roberta.json").read_text())
    assert_finite(record)
    assert record["report"]["compressed"] == 1
    arms = {arm["name"]: arm for arm in record["comparison"]["arms"]}
    assert len(arms) == 5
    assert all(name in printed for name in arms)
    exact, pamm = arms["compile"], arms["PAMM"]
    assert exact["loss"] == pamm["loss"]
    assert exact["saved_bytes"] - pamm["saved_bytes"] == (
        record["report"]["bytes_before"] - record["report"]["bytes_after"]
    )
    assert arms["compile + budget 0.99"]["saved_bytes"] < exact["saved_bytes"]


@pytest.mark.parametrize("model", ["llama", "gpt2", "roberta"])
def test_models_start_from_chance(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import common
    import corpus

    parser = argparse.ArgumentParser()
    common.add_model_options(parser)
    args = parser.parse_args(["--model", model, *TINY])
    torch.manual_seed(0)
    text = corpus.Text()
    draws = [
        corpus.draw(text.train, model, 4, 64, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0]["input_ids"], draws[1]["input_ids"])
    assert not torch.equal(draws[0]["input_ids"], draws[2]["input_ids"])
    with torch.no_grad():
        loss = common.build(args)(**draws[0]).loss
    assert loss.item() == pytest.approx(math.log(256), abs=0.3)


def test_a_mistake_ends_the_program_with_a_sentence() -> None:
    assert_explained(start("train.py", "--ratio", "0"), "ratio=0.0 is not allowed")


@pytest.mark.parametrize(
    ("options", "explanation"),
    [
        (("--heads", "3"), "--hidden 128 is not a multiple of --heads 3"),
        (("--targets", "("), r"--targets \( is no regular expression"),
    ],
)
def test_a_mistake_is_explained(
    options: tuple[str, ...], explanation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import common
    import train

    monkeypatch.setattr("sys.argv", ["train.py", *options])
    with pytest.raises(SystemExit, match=explanation):
        common.run(train.main)
