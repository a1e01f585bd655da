"""FSDP2 that gathers weights in float8, seen by one rank: what each compiles."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pamm_compile
from pamm_testing.float8 import LINEAR, Block
from pamm_testing.graphs import Both


def main() -> None:
    for emulate in (True, False):
        _check(emulate=emulate)


def _check(*, emulate: bool) -> None:
    import torchao.float8 as float8

    torch.manual_seed(0)
    model = Block()
    config = float8.Float8LinearConfig.from_recipe_name("tensorwise")
    config = dataclasses.replace(config, emulate=emulate, enable_fsdp_float8_all_gather=True)
    float8.convert_to_float8_training(model, config=config)
    options = {"rules": "linear=subspace", "goal": "any", "min_tokens": 1, "base": "aot_eager"}
    both = Both(pamm_compile.backend(**options))
    model.compile(backend=both)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    # Scales of all weights at once are inputs of the gathering; else each is computed there.
    if not emulate:
        float8.precompute_float8_dynamic_scale_for_fsdp(model)
    x = torch.randn(2, 16, 32)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        grads = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
        return loss.detach(), grads

    loss, exact = step()
    both.exact = False
    same, ours = step()
    assert torch.equal(loss, same)
    assert {n for n, g in exact.items() if not torch.equal(g, ours[n])} == LINEAR
