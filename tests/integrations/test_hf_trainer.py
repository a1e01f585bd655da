"""Transformers' Trainer: the callback, checkpoints, resuming, evaluation, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("accelerate", reason="the Trainer needs it")

import transformers as hf
from pamm_testing.zoo import HEADS, LAYERS, VOCAB, WIDTH

import pamm_compile
from pamm_compile.integrations.transformers import PammCallback

BATCH, LENGTH = 4, 24


class _Tokens(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def _model() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=64, attention_dropout=0.1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def _arguments(folder: Path, **more: Any) -> hf.TrainingArguments:
    settings: dict[str, Any] = {
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 3,
        "max_steps": 2, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "learning_rate": 1e-2, "save_strategy": "no", **more,
    }  # fmt: skip
    return hf.TrainingArguments(output_dir=str(folder), **settings)


def _callback(**more: Any) -> PammCallback:
    callback = PammCallback(8, min_tokens=1, base="aot_eager", **more)
    callback.backend.report.clear()
    return callback


def _trainer(model: nn.Module | None, arguments: hf.TrainingArguments, *callbacks: Any) -> Any:
    how: dict[str, Any] = {"model_init": _model} if model is None else {"model": model}
    data = _Tokens()
    return hf.Trainer(
        args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks), **how
    )


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_callback_trains_evaluates_saves_and_generates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact, model, callback = _model(), _model(), _callback()
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    trainer = _trainer(exact, _arguments(tmp_path, **settings))
    trainer.train()
    exact_losses = _losses(trainer)

    trainer = _trainer(model, _arguments(tmp_path, **settings), callback)
    with caplog.at_level(logging.INFO, logger="pamm_compile"):
        trainer.train()
    losses = _losses(trainer)
    # The first step's forward pass is exact; the second's weights are not the exact run's.
    assert losses[0] == pytest.approx(exact_losses[0], abs=1e-5)
    assert losses[1] != pytest.approx(exact_losses[1], abs=1e-7)
    assert losses[1] == pytest.approx(exact_losses[1], abs=0.1)
    report = callback.backend.report
    assert [site.parameters[0] for site in report.compressed] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS)
    ]
    logged = [r for r in caplog.records if r.getMessage() == str(report)]
    assert [record.levelname for record in logged] == ["INFO"]

    # The same names as without, so that the saved model loads wherever the exact one does.
    assert list(model.state_dict()) == list(exact.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name

    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(_trainer(loaded, _arguments(tmp_path)).evaluate()["eval_loss"])
    assert [graph.training for graph in report.graphs][1:] == [False]
    prompt = torch.tensor([[5, 6, 7]])
    how = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **how), loaded.generate(prompt, **how))


def test_resuming_gives_the_same_losses_and_weights(tmp_path: Path) -> None:
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = _trainer(_model(), _arguments(tmp_path, **arguments), _callback())
    straight.train()
    torch._dynamo.reset()
    # Neither the model nor the compiled code of the first half is there any more.
    model = _model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    callback = _callback()
    resumed = _trainer(model, _arguments(tmp_path, **arguments), callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(callback.backend.report.compressed) == LAYERS
    assert _losses(resumed) == _losses(straight)
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_bf16_and_a_model_that_the_trainer_makes(tmp_path: Path) -> None:
    callback = _callback()
    trainer = _trainer(None, _arguments(tmp_path, bf16=True, max_steps=1), callback)
    trainer.train()
    sites = callback.backend.report.compressed
    assert [site.dtype for site in sites] == ["bfloat16"] * LAYERS
    # Named as the model names them, though accelerate wraps its forward for autocast.
    names = dict(trainer.model.named_parameters())
    assert all(name in names for site in sites for name in site.parameters)


def test_checkpointed_layers_are_declined_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = _callback()
    arguments = _arguments(tmp_path, gradient_checkpointing=True, max_steps=1)
    with caplog.at_level(logging.INFO, logger="pamm_compile"):
        _trainer(_model(), arguments, callback).train()
    assert {site.reason for site in callback.backend.report.sites} == {"RECOMPUTED"}
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "RECOMPUTED" in warning


def test_accelerate_refuses_our_name(tmp_path: Path) -> None:
    """The reason for the callback; without it, drop the callback from the documentation."""
    arguments = _arguments(tmp_path, torch_compile_backend="pamm")
    with pytest.raises(ValueError, match="'PAMM' is not a valid DynamoBackend"):
        _trainer(_model(), arguments)


def test_several_gpus_in_one_process_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    model.compile(backend="eager")
    # The replica would run the original's code, on the original's GPU.
    assert model._replicate_for_data_parallel()._compiled_call_impl is model._compiled_call_impl

    monkeypatch.setattr(hf.TrainingArguments, "n_gpu", property(lambda self: 2))
    arguments = _arguments(tmp_path)
    with pytest.raises(pamm_compile.UnsupportedTrainerError, match="2 GPUs in one"):
        _callback().on_train_begin(arguments, hf.TrainerState(), hf.TrainerControl(), model=model)


def test_wrong_options_are_refused_at_once() -> None:
    with pytest.raises(pamm_compile.InvalidOptionError, match="Did you mean 'min_tokens'"):
        PammCallback(min_token=1)
