"""Models that train in float8 by torchao, and the weight gradients that a method makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pamm_compile.methods import checked
from pamm_compile.methods.base import Method
from pamm_compile.methods.draws import content_seed, site_seeds

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def converted(model: nn.Module, recipe: str, *, emulate: bool = True) -> nn.Module:
    """Convert the linear layers of a model, all of them; skip the test without torchao."""
    float8 = pytest.importorskip("torchao.float8", reason="needs torchao: the extra float8")
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    float8.convert_to_float8_training(model, config=dataclasses.replace(config, emulate=emulate))
    return model


LINEAR = {"qkv.weight", "out.weight", "up.weight", "down.weight"}
"""What is to be compressed in a `Block`."""


class Watched:
    """The inputs and output gradients of the linear layers of a model, at its last step."""

    def __init__(self, model: nn.Module) -> None:
        self.x: dict[str, Tensor] = {}
        self.dz: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._forward(f"{name}.weight"))
                module.register_full_backward_hook(self._backward(f"{name}.weight"))

    def _forward(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.x[name] = _matrix(args[0].detach())

        return hook

    def _backward(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, grads_in: Any, grads_out: tuple[Tensor, ...]) -> None:
            self.dz[name] = _matrix(grads_out[0])

        return hook

    def gradients(self, method: Method, sites: Iterable[tuple[str, ...]]) -> dict[str, Tensor]:
        """Return what a method makes of these, site by site in the graph's order."""
        sites = list(sites)
        seeds = site_seeds(content_seed(self.x[sites[0][0]], 0), len(sites))
        found = {}
        for names, seed in zip(sites, seeds, strict=True):
            x, grads = self.x[names[0]], [self.dz[name] for name in names]
            stored = checked.store(method, x, seed, tuple(g.shape[1] for g in grads))
            wide = (False,) * len(names)
            made = checked.weight_gradients(method, stored, grads, wide, x.shape[1])
            found |= dict(zip(names, made, strict=True))
        return found


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class Block(nn.Module):
    """A block with attention written by hand, biases, and sizes that float8 multiplies."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))
