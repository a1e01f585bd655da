"""Float8 training by torchao: its linear layers are compressed, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pamm_testing.float8 import RECIPES, Watched, converted
from pamm_testing.graphs import Both, step
from torch import Tensor, nn

import pamm_compile
from pamm_compile.rules import parse_rules

RULES = ("linear=subspace", "linear=pamm:4", "linear=quantized:8")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    # An operator of attention keeps its output, which then is o_proj's input, by itself.
    more = {"num_hidden_layers": 1, "num_attention_heads": 2, "attn_implementation": "eager"}
    config = LlamaConfig(**sizes, **more)
    return LlamaForCausalLM(config)


def _ids() -> dict[str, Any]:
    ids = torch.randint(0, 64, (2, 16))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _mean_square(out: Tensor) -> Tensor:
    return out.float().square().mean()


def _check(
    model: nn.Module,
    batch: dict[str, Any],
    loss: Any,
    rules: str,
    *,
    autocast: bool = False,
    tolerance: float = 1e-5,
) -> None:
    """Compare with the exact step, bitwise, and with what the method makes of the same X and dZ."""
    backend = pamm_compile.backend(rules=rules, goal="any", min_tokens=1, base="aot_eager")
    backend.report.clear()
    both = Both(backend)
    compiled = torch.compile(model, backend=both)
    exact = step(model, compiled, batch, loss, autocast=autocast)
    both.exact = False
    ours = step(model, compiled, batch, loss, autocast=autocast)
    sites = [site.parameters for site in backend.report.sites if site.compressed]
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for names in sites for name in names} == weights
    assert torch.equal(exact.loss, ours.loss)
    changed = {n for n, g in exact.grads.items() if not torch.equal(g, ours.grads[n])}
    assert changed == weights

    watched = Watched(model)
    eager = step(model, model, batch, loss, autocast=autocast)
    assert torch.equal(eager.loss, exact.loss)
    (rule,) = parse_rules(rules)
    assert rule.method is not None
    for name, expected in watched.gradients(rule.method, sites).items():
        error = (ours.grads[name] - expected).norm() / expected.norm()
        print(name, error)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_linear_layer_of_a_llama(recipe: str, rules: str) -> None:
    _check(converted(_llama(), recipe), _ids(), lambda out: out.loss, rules)
