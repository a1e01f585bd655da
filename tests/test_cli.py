"""The command line, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pamm_testing.forms import FusedQKV
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn

from pamm_compile.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
}  # fmt: skip


def subject() -> tuple[nn.Module, dict[str, Tensor]]:
    return FusedQKV(), {"x": torch.randn(BATCH, LENGTH, WIDTH)}


def nothing() -> int:
    return 3


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_explain_a_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rules", "qkv=pamm:16", "--sequence", "256", "--dtype", "float32")
    assert main(["explain", "--config", config, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compressed"] == 2
    assert {site["method"] for site in report["graphs"][0]["sites"]} == {"k = 16"}


def test_times_of_a_gpu_that_is_not_there(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--config", config, "--sequence", "1024", "--json")
    times = []
    for further in ((), ("--times-on", "h100")):
        assert main(["explain", *common, *further]) == 0
        report = json.loads(capsys.readouterr().out)
        times.append([site["time"] for site in report["graphs"][0]["sites"]])
    assert times[0] != times[1]
    assert main(["explain", *common, "--times-on", "h1000"]) == 2
    assert "Did you mean 'h100'" in capsys.readouterr().err


def test_fidelity_and_recommend(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:subject"
    assert main(["fidelity", name, "--rules", "qkv=pamm:4", "--draws", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"]
    assert main(["recommend", name, "--max-error", "0.9", "--draws", "1"]) == 0
    assert "error at most 0.9" in capsys.readouterr().out


def test_explain_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:subject"
    options = ("--rules", "qkv=pamm:4", "--min-tokens", "1")
    assert main(["explain", name, *options]) == 0
    assert "c_attn.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one model is needed"),
        (["module"], "write MODULE:FUNCTION"),
        (["no_such_module:f"], "cannot be imported"),
        ([f"{__name__}:no_such_function"], "cannot be imported"),
        ([f"{__name__}:nothing"], "must return a model and a batch"),
        (["--config", "/no/such/file.json"], "there is no such file"),
        ([f"{__name__}:subject", "--rules", "qkv=pam:3"], "Did you mean 'pamm'"),
    ],
)
def test_mistakes_are_sentences(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
