"""Checkpoints, seeds and determinism: PAMM has no state of its own to save."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from pamm_testing.options import make_options
from pamm_testing.zoo import HEADS, LAYERS, VOCAB, WIDTH, tokens
from torch import nn

from pamm_compile.torch_backend import Backend


def _model(layers: int = LAYERS) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=HEADS, attention_dropout=0.1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


class _Run:
    """A model, its optimizer and compiled code, all of them new."""

    def __init__(self, base: Any) -> None:
        torch._dynamo.reset()
        self.model = _model(1 if base == "inductor" else LAYERS)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        # Not by backend(), which would return the object of the run before.
        self.backend = Backend(make_options(ratio=8, min_tokens=1, base=base))
        self.compiled = torch.compile(self.model, backend=self.backend)

    def train(self, batches: list[torch.Tensor], *, clip: float = 0.5) -> list[float]:
        losses = []
        for number, batch in enumerate(batches):
            loss = self.compiled(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
            if number % 2 == 1:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return losses

    def save(self) -> bytes:
        file = io.BytesIO()
        state = {"model": self.model, "optimizer": self.optimizer}
        saved = {name: each.state_dict() for name, each in state.items()}
        torch.save({**saved, "rng": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "base", ["aot_eager", pytest.param("inductor", marks=pytest.mark.everything)], ids=str
)
def test_a_resumed_run_is_the_uninterrupted_one(base: str) -> None:
    """Two batches a step, clipped, with dropout, in torch's deterministic mode."""
    batches = [tokens(2, 24) for _ in range(8)]
    straight = _Run(base)
    start = copy.deepcopy(straight.model.state_dict())
    torch.manual_seed(5)
    losses = straight.train(batches)
    assert straight.backend.report.compressed

    first = _Run(base)
    first.model.load_state_dict(start)
    torch.manual_seed(5)
    half = first.train(batches[:4])
    saved = first.save()

    torch.manual_seed(6)
    second = _Run(base)
    second.load(saved)
    assert half + second.train(batches[4:]) == losses
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_nothing_is_added_to_the_state() -> None:
    plain, run = _model(), _Run("aot_eager")
    run.train([tokens(2, 24), tokens(2, 24)])
    assert list(run.model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in run.model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    wrapped = [f"_orig_mod.{name}" for name in plain.state_dict()]
    assert list(run.compiled.state_dict()) == wrapped
    kinds = {key for state in run.optimizer.state_dict()["state"].values() for key in state}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
