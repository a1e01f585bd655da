"""Float8 training by torchao: its linear layers are compressed, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pamm_testing.float8 import LINEAR, RECIPES, Block, Watched, converted
from pamm_testing.graphs import Both, Captured, capturing_backend, look, memory_budget, step
from pamm_testing.options import make_options
from torch import Tensor, nn

import pamm_compile
from pamm_compile.rules import parse_rules

ONE_BY_DEFAULT = [
    pytest.param(recipe, marks=[] if recipe == "rowwise" else [pytest.mark.everything])
    for recipe in RECIPES
]
"""Of the recipes, the one that casts for every matmul anew."""
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


def _check(model: nn.Module, batch: dict[str, Any], loss: Any, rules: str, error: float) -> None:
    """Compare with the exact step, bitwise, and with what the method makes of the same X and dZ."""
    backend = pamm_compile.backend(rules=rules, goal="any", min_tokens=1, base="aot_eager")
    backend.report.clear()
    both = Both(backend)
    compiled = torch.compile(model, backend=both)
    exact = step(model, compiled, batch, loss)
    both.exact = False
    ours = step(model, compiled, batch, loss)
    sites = [site.parameters for site in backend.report.sites if site.compressed]
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for names in sites for name in names} == weights
    assert torch.equal(exact.loss, ours.loss)
    assert {n for n, g in exact.grads.items() if not torch.equal(g, ours.grads[n])} == weights

    watched = Watched(model)
    eager = step(model, model, batch, loss)
    assert torch.equal(eager.loss, exact.loss)
    (rule,) = parse_rules(rules)
    assert rule.method is not None
    for name, expected in watched.gradients(rule.method, sites).items():
        assert (ours.grads[name] - expected).norm() <= error * expected.norm(), name


@pytest.mark.everything
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_linear_layer_of_a_llama(recipe: str, rules: str) -> None:
    _check(converted(_llama(), recipe), _ids(), lambda out: out.loss, rules, 1e-5)


@pytest.mark.parametrize("recipe", ONE_BY_DEFAULT)
def test_a_block_whose_matmuls_are_not_emulated(recipe: str) -> None:
    """In bfloat16, with biases and attention written by hand, as traced for a GPU."""
    model = converted(Block().bfloat16(), recipe, emulate=False)
    batch = {"x": torch.randn(2, 16, 32, dtype=torch.bfloat16)}
    _check(model, batch, _mean_square, "linear=quantized:8", 1e-2)


@pytest.mark.everything
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_and_dynamic_shapes(recipe: str) -> None:
    """A CPU's autocast, which torchao does not ask for, casts in the backward pass alone."""
    model = converted(Block(), recipe)
    found = []
    for tokens in (16, 24):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(look(model, {"x": torch.randn(2, tokens, 32)}, "linear=pamm:4"))
    for each in found:
        assert each.compressed | set(each.reasons) == LINEAR
        if recipe == "rowwise_with_gw_hp":
            assert each.reasons == dict.fromkeys(("qkv.weight", "up.weight"), "ROUNDED_INPUT")
        else:
            assert set(each.reasons.values()) <= {"NO_SAVING"}


@pytest.mark.parametrize("recipe", ONE_BY_DEFAULT)
def test_bytes_are_those_that_the_exact_partition_saves(recipe: str) -> None:
    model = converted(nn.Sequential(Block(), Block()).bfloat16(), recipe, emulate=False)
    captured = Captured()
    options = make_options(rules="linear=subspace", goal="any", min_tokens=1)
    backend = capturing_backend(captured, options, decompose=True, apply=False)
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    with memory_budget(1.0):
        _mean_square(torch.compile(model, backend=backend)(x)).backward()
    saved = {n.name: n.meta["val"] for n in captured.saved() if isinstance(n.meta["val"], Tensor)}
    before = {site.parameters: site.bytes_before for site in captured.report.sites}
    assert len(before) == 8
    codes = [val for val in saved.values() if val.dtype == torch.float8_e4m3fn]
    if recipe == "rowwise_with_gw_hp":
        assert not codes
        assert all(before.values())
        shapes = [tuple(val.shape) for val in saved.values() if val.dtype == torch.bfloat16]
        assert shapes.count((32, 32)) >= 6
        assert shapes.count((32, 64)) >= 2
    else:
        # Casts of what a norm or GELU makes are made again from what is saved for these.
        counted = {names: size for names, size in before.items() if size}
        assert counted.keys() == {("0.out.weight",), ("1.out.weight",)}
        entries = sum(val.nbytes for val in codes)
        scales = 2 * 4 * (1 if recipe == "tensorwise" else 32)
        assert sum(counted.values()) == entries + scales


class _Ste(torch.autograd.Function):
    """A linear layer of an input that is rounded in blocks; its gradient is made of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        blocks = x.unflatten(-1, (-1, 8))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return (torch.round(blocks / scale) * scale).flatten(-2) @ weight.t()

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dz @ weight, dz.flatten(0, -2).t() @ x.flatten(0, -2)


class _Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _Ste.apply(input, self.weight) + self.bias


def test_another_form_of_the_input_is_the_reason() -> None:
    """Also where it is data, and behind no product."""
    model = Block()
    model.qkv, model.up = _Rounded(32, 96), _Rounded(32, 64)
    found = look(model, {"x": torch.randn(2, 16, 32)}, "linear=pamm:4")
    assert found.reasons == {"qkv.weight": "ROUNDED_INPUT", "up.weight": "ROUNDED_INPUT"}


@pytest.mark.everything
@pytest.mark.parametrize("high_precision", [False, True])
def test_block_scaled_formats_have_that_reason(high_precision: bool) -> None:
    needed = "torchao.prototype.moe_training.mxfp8_linear"
    mx = pytest.importorskip(needed, reason="needs torchao's prototype of MX formats")
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    model, options = Block(64), {"kernel_preference": KernelPreference.EMULATED}
    for name, linear in list(model.named_children()):
        if isinstance(linear, nn.Linear):
            sizes = linear.in_features, linear.out_features
            setattr(model, name, mx.MXFP8Linear(*sizes, wgrad_with_hp=high_precision, **options))
    found = look(model, {"x": torch.randn(2, 32, 64)}, "linear=pamm:4")
    assert found.reasons == dict.fromkeys(LINEAR, "ROUNDED_INPUT")
