"""The weight gradients that a method makes of some tokens of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pamm_compile.methods import checked
from pamm_compile.methods.base import Method, Remembering
from pamm_compile.methods.sampling import content_seed
from pamm_compile.size import Size


@dataclass(frozen=True)
class Tokens:
    """X [b, n] and dZ [b, m_p] of some tokens of a site."""

    x: Tensor
    grads: Sequence[Tensor]

    def exact(self) -> list[Tensor]:
        """Return dW of every projection."""
        return [grad.T @ self.x for grad in self.grads]

    def thirds(self) -> list[Tokens]:
        """Return three sets of as many tokens."""
        parts = zip(*(each.tensor_split(3) for each in (self.x, *self.grads)), strict=True)
        return [Tokens(x, grads) for x, *grads in parts]


def made(method: Method, tokens: Tokens, size: Size, draw: int, before: Tokens) -> Tensor:
    """Return a method's weight gradients; one that remembers does so of the tokens before."""
    x, kept = tokens.x, [False] * len(tokens.grads)
    if isinstance(method, Remembering) and method.directions(size.features, size.outputs):
        last = before.exact()
        memory = method.remember(last).to(x.dtype)
        stored = (*checked.store_along(method, x, memory), memory)
        found = checked.weight_gradients_along(method, stored, tokens.grads, kept, size.features)
        for number, each in enumerate(last):
            lost = method.lost(each, memory)
            if lost is not None:
                found[number] = method.restored(found[number], lost)
        return flat(found)
    stored = checked.store(method, x, content_seed(x, draw), size.outputs)
    return flat(checked.weight_gradients(method, stored, tokens.grads, kept, size.features))


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Return all gradients as one vector, float64."""
    return torch.cat([each.detach().flatten().double() for each in gradients])
