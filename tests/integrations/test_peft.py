"""PEFT's LoRA: what each adapter's A reads is compressed, the frozen base stays."""

from __future__ import annotations

import pytest
import torch
from pamm_testing.graphs import Run, step

pytest.importorskip("peft", reason="of the extra [trainers]")

import peft
import transformers as hf
from pamm_testing.zoo import HEADS, LAYERS, VOCAB, WIDTH, causal

import pamm_compile

NAMES = ("q_proj", "k_proj", "v_proj")


def _model(dropout: float) -> torch.nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(NAMES),
        init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(hf.LlamaForCausalLM(config), lora).train()


def _runs(dropout: float) -> tuple[torch.nn.Module, Run, Run, pamm_compile.Report]:
    model, batch = _model(dropout), causal()
    exact = step(model, torch.compile(model, backend="aot_eager"), batch, lambda out: out.loss)
    torch._dynamo.reset()
    backend = pamm_compile.backend(8, min_tokens=1, base="aot_eager")
    backend.report.clear()
    compiled = torch.compile(model, backend=backend)
    ours = step(model, compiled, batch, lambda out: out.loss)
    return model, exact, ours, backend.report


def _a(layer: int, name: str) -> str:
    prefix = f"base_model.model.model.layers.{layer}.self_attn"
    return f"{prefix}.{name}.lora_A.default.weight"


@pytest.mark.quick
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.everything), 0.1])
def test_only_gradients_of_a_change(dropout: float) -> None:
    model, exact, ours, report = _runs(dropout)
    changed = {
        name for name, grad in exact.grads.items() if not torch.equal(grad, ours.grads[name])
    }
    assert changed == {_a(layer, name) for layer in range(LAYERS) for name in NAMES}
    assert changed <= dict(model.named_parameters()).keys()
    assert torch.equal(exact.loss, ours.loss)
    assert all("lora_" in name for name in exact.grads)
    reasons = {name: site.reason for site in report.declined for name in site.parameters}
    b = {_a(i, n).replace("lora_A", "lora_B") for i in range(LAYERS) for n in NAMES}
    assert {name for name, reason in reasons.items() if reason == "NARROW_INPUT"} == b
