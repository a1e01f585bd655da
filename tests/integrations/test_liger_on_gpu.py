"""Liger's Triton norms around our sites: what no CPU can run."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from pamm_testing.zoo import LAYERS, causal

import pamm_compile

pytestmark = pytest.mark.gpu


def test_liger_norms() -> None:
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).cuda()
    monkey_patch.apply_liger_kernel_to_llama(
        model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False,
        rms_norm=True, swiglu=False,
    )  # fmt: skip
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in causal().items()}

    def gradients(compiled: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        compiled(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact = gradients(torch.compile(model))
    torch.compiler.reset()
    backend = pamm_compile.backend(ratio=1, min_tokens=1)
    backend.report.clear()
    ours = gradients(torch.compile(model, backend=backend))
    assert len(backend.report.compressed) == LAYERS
    for name, grad in exact.items():
        assert (ours[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-9, name
