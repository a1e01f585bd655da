"""Lightning's Trainer: compiled inside or as a whole, checkpoints, resuming, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="of the extra [trainers]")

import lightning
import transformers as hf
from pamm_testing.zoo import HEADS, LAYERS, VOCAB, WIDTH
from torch import Tensor
from torch.utils.data import DataLoader

import pamm_compile

BATCH, LENGTH = 4, 24
QKV = tuple(f"self_attn.{letter}_proj.weight" for letter in "qkv")


class _Module(lightning.LightningModule):
    def __init__(self, backend: pamm_compile.Backend | None = None, *, logs: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=64,
        )  # fmt: skip
        self.model = hf.LlamaForCausalLM(config)
        self.backend, self.logs = backend, logs
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.backend is not None:
            self.model.compile(backend=self.backend)

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        if self.logs:
            self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, number: int) -> None:
        self.losses.append(outputs["loss"].item())

    def validation_step(self, batch: Tensor, number: int) -> None:
        self.log("validation", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def _backend(seed: int = 0) -> pamm_compile.Backend:
    backend = pamm_compile.backend(8, min_tokens=1, base="aot_eager", seed=seed)
    backend.report.clear()
    return backend


def _fit(module: Any, epochs: int, checkpoint: Path | None = None, **more: Any) -> Any:
    # Two batches an epoch; Lightning resumes a plain loader at the start of an epoch only.
    data = torch.randint(0, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
        num_sanity_val_steps=0, limit_val_batches=0, **more,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=BATCH)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def _loaded(other: _Module) -> _Module:
    module = _Module()
    module.load_state_dict(other.state_dict())
    return module


def test_compiled_inside() -> None:
    exact = _Module()
    _fit(exact, 2, accumulate_grad_batches=2)
    backend = _backend()
    ours = _Module(backend)
    trainer = _fit(ours, 2, accumulate_grad_batches=2)
    assert [site.parameters for site in backend.report.compressed] == [
        tuple(f"model.layers.{i}.{name}" for name in QKV) for i in range(LAYERS)
    ]
    assert len(ours.losses) == 4
    # Both batches of the first step are exact; those of the second see other weights.
    assert ours.losses[:2] == pytest.approx(exact.losses[:2], abs=1e-5)
    assert ours.losses[2:] != pytest.approx(exact.losses[2:], abs=1e-7)
    assert list(ours.state_dict()) == list(exact.state_dict())

    validator = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loss, again = (
        validator.validate(module, trainer.train_dataloader, verbose=False)[0]["validation"]
        for module in (ours, _loaded(ours))
    )
    assert loss == pytest.approx(again, abs=1e-5)
    assert [graph.training for graph in backend.report.graphs] == [True, False]


def test_compiled_as_a_whole() -> None:
    backend = _backend(seed=1)
    module = _Module(logs=False)
    _fit(torch.compile(module, backend=backend), 1)
    assert [site.parameters for site in backend.report.compressed] == [
        tuple(f"model.model.layers.{i}.{name}" for name in QKV) for i in range(LAYERS)
    ]
    assert len(module.losses) == 2


def test_bf16() -> None:
    backend = _backend(seed=2)
    _fit(_Module(backend), 1, precision="bf16-mixed")
    assert [site.dtype for site in backend.report.compressed] == ["bfloat16"] * LAYERS


def test_resuming_gives_the_same_losses_and_weights(tmp_path: Path) -> None:
    straight = _Module(_backend(seed=3))
    _fit(straight, 2)
    first = _Module(_backend(seed=3))
    _fit(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    torch._dynamo.reset()
    second = _Module(_backend(seed=3))
    with torch.no_grad():
        second.model.lm_head.weight.zero_()
    _fit(second, 2, tmp_path / "half.ckpt")
    assert second.losses == straight.losses[2:]
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
