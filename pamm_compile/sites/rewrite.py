"""Replace the weight gradients of the chosen sites by those that their methods make.

forward:   X ─┬─ mm(X, Wqᵀ) …  unchanged
              └─ seed ── method.store(X, seed) ── stored                      saved: stored
backward:  stored, [dQ, dK, dV] ── method.weight_gradients ── dWq, dWk, dWv

Where something is remembered, method.store_along(X, memory) takes the place of the first, and
method.weight_gradients_along(stored, memory, …) that of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from pamm_compile.graph.chains import value
from pamm_compile.graph.insert import BACKWARD, FORWARD, Inserter, replace_node
from pamm_compile.graph.vocabulary import Extra
from pamm_compile.methods import checked
from pamm_compile.methods.base import Method
from pamm_compile.methods.draws import content_seed, site_seeds
from pamm_compile.private import aot
from pamm_compile.sites.cost import size_of
from pamm_compile.sites.decide import Plan


def rewrite(graph: Graph, plans: Sequence[Plan], salt: int, memories: Mapping[int, Node]) -> None:
    """Rewrite the sites of a joint graph in place.

    Args:
        graph: the joint graph.
        plans: accepted sites with their methods, in graph order.
        salt: another one draws other samples from the same activations.
        memories: what is remembered of a plan, by its `id`, for plans of which something is.
    """
    rewriter = _Rewriter(graph, plans, salt, memories)
    for number, plan in enumerate(plans):
        rewriter.replace_gradients(plan, rewriter.store(plan, number))
    if plans:
        # dW now needs dQ, dK and dV together: users of the first wait for the last.
        aot.stable_topological_sort(graph)
        graph.lint()


@dataclass(frozen=True)
class Addition:
    """What a weight gradient's matmul computes beside its product: alpha · product + beta · addend.

    Without the addend's node, so that equal ones compare equal.
    """

    alpha: float
    beta: float
    has_addend: bool

    @classmethod
    def of(cls, extra: Extra) -> Addition:
        """Return that of a matmul."""
        return cls(extra.alpha, extra.beta, extra.addend is not None)

    def apply(self, product: Tensor, addends: Iterator[Tensor]) -> Tensor:
        """Return the whole, taking the next addend if there is one."""
        result = product if self.alpha == 1 else product * self.alpha
        if not self.has_addend:
            return result
        addend = next(addends)
        return result + (addend if self.beta == 1 else addend * self.beta).to(result.dtype)


class _Rewriter:
    def __init__(
        self, graph: Graph, plans: Sequence[Plan], salt: int, memories: Mapping[int, Node]
    ) -> None:
        self._memories = memories
        self._inserter = Inserter(graph)
        self._graph = graph
        # One hash per graph and device: a reduction at every site would cost a launch at each.
        self._seeds: dict[torch.device, list[Node]] = {}
        for plan in plans:
            device = value(plan.site.input).device
            if device not in self._seeds:
                self._seeds[device] = self._seed_all(plan.site.input, len(plans), salt)

    def _seed_all(self, x: Node, count: int, salt: int) -> list[Node]:
        def seeds(x: Tensor) -> list[Tensor]:
            return list(site_seeds(content_seed(_matrix(x), salt), count))

        found, _ = self._inserter.insert(x, seeds, [x], FORWARD, ("seeds", count, salt))
        return found

    def store(self, plan: Plan, number: int) -> list[Node]:
        """Insert what the forward pass keeps in place of a site's input."""
        x, method, flip = plan.site.input, plan.method, plan.site.in_columns
        outputs = size_of(plan.site).outputs
        if memory := self._memories.get(id(plan)):
            return self._store_along(plan, memory)
        device = value(x).device
        seed = self._seeds[device][number]

        def store(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
            return checked.store(method, _matrix(x).t() if flip else _matrix(x), seed, outputs)

        key = ("store", id(method), outputs, flip)
        stored, cursor = self._inserter.insert(max(x, seed), store, [x, seed], FORWARD, key)
        self._inserter.keep_for_backward(stored, cursor)
        return stored

    def _store_along(self, plan: Plan, memory: Node) -> list[Node]:
        x, method, flip = plan.site.input, plan.method, plan.site.in_columns

        def store(x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
            return checked.store_along(method, _matrix(x).t() if flip else _matrix(x), memory)

        key = ("store along", id(method), flip)
        stored, cursor = self._inserter.insert(max(x, memory), store, [x, memory], FORWARD, key)
        self._inserter.keep_for_backward(stored, cursor)
        return stored

    def replace_gradients(self, plan: Plan, stored: Sequence[Node]) -> None:
        """Insert a site's weight gradients, and take the exact ones out."""
        gradients, method = plan.site.gradients, plan.method
        grads = [g.output_gradient for g in gradients]
        flips = tuple(g.flipped for g in gradients)
        vals = [value(g.node) for g in gradients]
        transposed = tuple(g.transposed for g in gradients)
        extras = tuple(Addition.of(g.extra) for g in gradients)
        addends = [g.extra.addend for g in gradients if g.extra.addend is not None]
        features = value(plan.site.input).shape[-2 if plan.site.in_columns else -1]
        memory = self._memories.get(id(plan))
        given = list(stored) if memory is None else [*stored, memory]
        along = memory is not None
        function = _replacement(
            method, len(given), features, flips, transposed, vals, extras, along
        )
        shapes = tuple((str(v.shape), v.dtype) for v in vals)
        key = ("gradients", id(method), flips, transposed, len(stored), shapes, extras, along)
        last = max(g.node for g in gradients)
        new, _ = self._inserter.insert(last, function, [*given, *grads, *addends], BACKWARD, key)
        for gradient, node in zip(gradients, new, strict=True):
            replace_node(self._graph, gradient.node, node)


def _replacement(
    method: Method,
    kept: int,
    features: int,
    flips: Sequence[bool],
    transposed: Sequence[bool],
    vals: Sequence[Tensor],
    extras: Sequence[Addition],
    along: bool,
) -> Callable[..., list[Tensor]]:
    make = checked.weight_gradients_along if along else checked.weight_gradients

    def replacement(*tensors: Tensor) -> list[Tensor]:
        stored, dz = tensors[:kept], tensors[kept : kept + len(flips)]
        addends = iter(tensors[kept + len(flips) :])
        grads = [_matrix(z).t() if flip else _matrix(z) for z, flip in zip(dz, flips, strict=True)]
        results = make(method, stored, grads, transposed, features)
        products = [r.to(v.dtype).reshape(v.shape) for r, v in zip(results, vals, strict=True)]
        return [extra.apply(r, addends) for r, extra in zip(products, extras, strict=True)]

    return replacement


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.flatten(0, -2)
