"""The command line, in this process."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from pamm_testing.forms import FusedQKV
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn

import pamm_compile
from pamm_compile.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
}  # fmt: skip


def subject() -> tuple[nn.Module, dict[str, Tensor]]:
    return FusedQKV(), {"x": torch.randn(BATCH, LENGTH, WIDTH)}


def nothing() -> int:
    return 3


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def to_train() -> dict[str, object]:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    batches = (torch.randn(64, 16) for _ in range(4))
    return {"model": model, "batches": batches, "loss": _loss, "clip": None}


def misspelt() -> dict[str, object]:
    return to_train() | {"scores": 3}


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
    common = ("--config", config, "--sequence", "1024", "--rules", "qkv=pamm", "--json")
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
    assert main(["recommend", name, "--draws", "1"]) == 0
    assert "error at most 0.1 (scratch)" in capsys.readouterr().out


@pytest.mark.quick
def test_explain_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:subject"
    options = ("--rules", "qkv=pamm:4", "--min-tokens", "1")
    assert main(["explain", name, *options]) == 0
    assert "c_attn.weight" in capsys.readouterr().out


def _small(kind: str, head: str, **more: object) -> dict[str, object]:
    return {
        "architectures": [head], "model_type": kind, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 61, **more,
    }  # fmt: skip


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        _small("vit", "ViTForImageClassification", image_size=32, patch_size=8),
        pytest.param(_small("bert", "BertForSequenceClassification"), marks=pytest.mark.everything),
        _small("llama", "LlamaForSequenceClassification", problem_type="regression", num_labels=1),
        pytest.param(
            _small("roberta", "RobertaForTokenClassification", max_position_embeddings=66),
            marks=pytest.mark.everything,
        ),
        pytest.param(
            {
                "architectures": ["T5ForConditionalGeneration"],
                "model_type": "t5",
                "vocab_size": 61,
                **T5,
            },
            marks=pytest.mark.everything,
        ),
    ],
    ids=lambda config: str(config["architectures"][0]),
)
def test_a_batch_is_made_for_the_head(
    config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--rules", "linear=pamm:4", "--min-tokens", "1", "--dtype", "float32")
    assert main(["explain", "--config", str(tmp_path), *options, "--goal", "any"]) == 0
    assert "compressed" in capsys.readouterr().out
    options = ("--rules", "linear=pamm:4", "--draws", "1", "--dtype", "float32", "--batch", "2")
    assert main(["fidelity", "--config", str(tmp_path), *options]) == 0


def test_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eagerly = functools.partial(pamm_compile.backend, base="aot_eager")
    monkeypatch.setattr("pamm_compile.cli.backend", eagerly)
    arms = ("--rules", "linear=subspace:4", "linear=pamm:4", "--goal", "any", "--min-tokens", "1")
    options = ("--steps", "4", "--lr", "0.01", "--out", str(tmp_path / "new" / "trial"))
    assert main(["trial", f"{__name__}:to_train", *arms, *options]) == 0
    captured = capsys.readouterr()
    record = json.loads((tmp_path / "new" / "trial.json").read_text())
    names = ["exact", "exact, other order", "linear=subspace:4", "linear=pamm:4"]
    assert [arm["name"] for arm in record["arms"]] == names
    assert record["options"]["lr"] == 0.01
    for name in names[2:]:
        assert f"{name}: its loss is" in captured.out
    assert "4 of 4 steps" in captured.err
    assert f"wrote {tmp_path / 'new' / 'trial.png'}" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model is needed"),
        ([f"{__name__}:nothing"], "returned int: it must return a model and its batches"),
        ([f"{__name__}:subject"], "batches is a mapping of ['x']"),
        ([f"{__name__}:misspelt"], "'scores' is not an option. Did you mean 'score'"),
        ([f"{__name__}:to_train", "--steps", "5"], "batches ended after 4"),
        ([f"{__name__}:to_train", "--min-tokens", "0"], "min_tokens=0 is not allowed"),
        ([f"{__name__}:to_train", "--ratio", "0.5"], "ratio=0.5 is not allowed"),
        ([f"{__name__}:to_train", "--out", "/dev/null/trial"], "cannot be written"),
    ],
)
def test_trials_that_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trial", "--steps", "4", "--out", str(tmp_path / "trial"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


LLAMA = _small("llama", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"{", (), "is no JSON"),
        (b"[" * 100_000, (), "is no JSON"),
        (b"\x89PNG\xff", (), "is no JSON"),
        (b"[1, 2]", (), "it has no model_type"),
        (b"{}", (), "it has no model_type"),
        ({"model_type": "of nobody"}, (), "Transformers makes no model of it"),
        (_small("llama", "LlamaForCausalLM", num_attention_heads=0), (), "makes no model of it"),
        (_small("whisper", "WhisperForConditionalGeneration", d_model=32), (), "MODULE:FUNCTION"),
        (_small("clip", "CLIPModel"), (), "MODULE:FUNCTION"),
        (_small("bert", "BertModel"), (), "MODULE:FUNCTION"),
        (LLAMA, ("--batch", "0"), "--batch=0 is not allowed"),
        (LLAMA, ("--batch", "-3"), "--batch=-3 is not allowed"),
        (LLAMA, ("--batch", "9" * 30), "--batch=999"),
        (LLAMA, ("--sequence", "0"), "--sequence=0 is not allowed"),
        (LLAMA, ("--sequence", "4096"), "at most 2048"),
        (LLAMA, ("--device", "toaster"), "--device='toaster' is not allowed"),
        (LLAMA, ("--min-tokens", "0"), "min_tokens=0 is not allowed"),
    ],
)
def test_configurations_that_are_refused(
    content: bytes | dict[str, object],
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert main(["explain", "--config", str(path), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("fidelity", "--draws", "0"),
        ("recommend", "--draws", "-1"),
        ("recommend", "--max-error", "nan"),
        ("recommend", "--max-error", "0"),
        ("compare", "--steps", "-1"),
        ("compare", "--budget", "2"),
        ("compare", "--budget", "nan"),
    ],
)
def test_figures_that_mean_nothing_are_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    assert main([command, f"{__name__}:subject", *options]) == 2
    assert "is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one model is needed"),
        ([":f"], "write MODULE:FUNCTION"),
        ([".relative:f"], "write MODULE:FUNCTION"),
        (["--config", "/tmp"], "there is no such file"),
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
