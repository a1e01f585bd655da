"""Float8 training under FSDP2, seen by one rank: what each compiles, and what all make of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pamm_compile
from pamm_testing.float8 import LINEAR, Block
from pamm_testing.graphs import Both

OPTIONS: dict[str, Any] = {"goal": "any", "min_tokens": 1, "base": "aot_eager"}


def main() -> None:
    """A model whose weights are gathered in float8."""
    for emulate in (True, False):
        _check(emulate=emulate)


def blocks() -> None:
    """Blocks that are sharded apart, in several steps, by each rank's own batches."""
    for recipe in ("tensorwise", "rowwise"):
        for rules in ("linear=subspace", "linear=gradients"):
            _check_steps(recipe, rules)


def _shard(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _convert(model: nn.Module, recipe: str, *, emulate: bool) -> None:
    import torchao.float8 as float8

    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    # torchao gathers in float8 where a weight has one scale.
    gathers = recipe == "tensorwise"
    config = dataclasses.replace(config, emulate=emulate, enable_fsdp_float8_all_gather=gathers)
    float8.convert_to_float8_training(model, config=config)


def _prepare(model: nn.Module) -> None:
    """Compute the scales of all weights at once, which then are inputs of the gathering."""
    import torchao.float8 as float8

    float8.precompute_float8_dynamic_scale_for_fsdp(model)


def _step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    grads = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
    return loss.detach(), grads


def _check(*, emulate: bool) -> None:
    torch.manual_seed(0)
    model = Block()
    _convert(model, "tensorwise", emulate=emulate)
    both = Both(pamm_compile.backend(rules="linear=subspace", **OPTIONS))
    model.compile(backend=both)
    _shard(model)
    # Else each is computed where it is needed.
    if not emulate:
        _prepare(model)
    x = torch.randn(2, 16, 32)
    loss, exact = _step(model, x)
    both.exact = False
    same, ours = _step(model, x)
    assert torch.equal(loss, same)
    assert {n for n, g in exact.items() if not torch.equal(g, ours[n])} == LINEAR


def _check_steps(recipe: str, rules: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    _convert(model, recipe, emulate=True)
    both = Both(pamm_compile.backend(rules=rules, **OPTIONS))
    for block in model:
        block.compile(backend=both, fullgraph=True)
        _shard(block)
    _shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(3):
        x = torch.randn(2, 16, 32)
        both.exact = True
        loss, exact = _step(model, x)
        both.exact = False
        same, ours = _step(model, x)
        assert torch.equal(loss, same)
        changed = {n for n, g in exact.items() if not torch.equal(g, ours[n])}
        assert changed == {f"{i}.{name}" for i in range(2) for name in LINEAR}, changed
        assert all(grad.isfinite().all() for grad in ours.values())
        optimizer.step()
        if recipe == "tensorwise":
            _prepare(model)
