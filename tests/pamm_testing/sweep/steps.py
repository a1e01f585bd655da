"""One training step of a model that is built anew for it, and what came of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pamm_compile import Cost, Size

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A model and its inputs, made anew at every call."""

    name: str
    """The library, then the model: "transformers/llama"."""
    build: Callable[[], tuple[nn.Module, Inputs]]

    @property
    def library(self) -> str:
        """Where it is from."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Marked:
    """Exact weight gradients, doubled and with one added: whatever passed through it shows."""

    @property
    def fingerprint(self) -> str:
        return ""

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return (x.clone(),)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        exact = [grad.T @ stored[0] for grad in grads]
        return [
            2 * (each.T if flip else each) + 1 for each, flip in zip(exact, transposed, strict=True)
        ]

    def stored_bytes(self, size: Size) -> int:
        return size.bytes

    def cost(self, size: Size) -> Cost:
        return Cost(2 * size.tokens * size.features * sum(size.outputs), size.bytes, 1)

    def describe(self, size: Size) -> str:
        return "marked"


@dataclass(frozen=True)
class Step:
    """What one step computed."""

    loss: Tensor
    weights: dict[str, Tensor]
    """Gradients, of the parameters that have one."""
    inputs: dict[str, Tensor]
    """Gradients, of the inputs that have one."""
    classes: dict[str, tuple[str, ...]]
    """Of every parameter, the classes of the modules that it is in."""


def seeded(architecture: Architecture) -> tuple[nn.Module, Inputs]:
    """Return the same model and inputs at every call, and the same random state behind them."""
    _seed()
    model, inputs = architecture.build()
    _seed()
    # A factor of zeros, as adapters begin with, would hide what becomes of its partner's gradient.
    for parameter in model.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.train(), inputs


def run(
    architecture: Architecture,
    compiled: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    around: Callable[[nn.Module, Inputs], AbstractContextManager[Any]] = lambda *_: nullcontext(),
    *,
    leaves: bool = True,
) -> Step:
    """Train one step of a loss that every output enters.

    Args:
        architecture: what to train.
        compiled: makes what is called of the model.
        around: gets model and inputs, and surrounds the forward pass.
        leaves: whether inputs get gradients, too.
    """
    torch._dynamo.reset()
    model, inputs = seeded(architecture)
    floats = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.is_floating_point()]
    for tensor in floats:
        tensor.requires_grad_(leaves)
    with around(model, inputs):
        loss = loss_of(compiled(model)(**inputs))
    loss.backward()
    return Step(
        loss.detach(),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {str(i): t.grad for i, t in enumerate(floats) if t.grad is not None},
        _classes(model),
    )


def loss_of(outputs: Any) -> Tensor:
    """Return a sum of all outputs that carry gradients, in which no two entries weigh the same."""
    loss = torch.zeros(())
    for output in _tensors(outputs):
        if output.requires_grad and output.numel():
            entries = output.real if output.is_complex() else output
            weights = torch.arange(entries.numel()).add(1).sin().view(entries.shape)
            loss = loss + (entries.float() * weights).mean()
    if not loss.requires_grad:
        raise ValueError("no output carries a gradient")
    return loss


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of any nest, of objects with fields too."""
    found = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [value for value in vars(leaf).values() if isinstance(value, Tensor)]
    return found


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _classes(model: nn.Module) -> dict[str, tuple[str, ...]]:
    modules = {name: type(module).__name__ for name, module in model.named_modules()}

    def above(name: str) -> tuple[str, ...]:
        levels = name.split(".")
        found = (modules.get(".".join(levels[:n]), "") for n in range(len(levels)))
        return tuple(filter(None, found))

    return {name: above(name) for name, _ in model.named_parameters()}
