"""Reading a joint forward+backward graph: its inputs, gradients, phases and who reads what.

Nothing here knows of PAMM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from pamm_compile.graph.chains import Chain, chain_of, is_chain_step, value, view_step
from pamm_compile.graph.rounding import (
    Factor,
    Product,
    Rounding,
    inside,
    is_float8,
    product_of,
    rounding_at,
)
from pamm_compile.graph.vocabulary import (
    GRADIENT_PATH,
    SHAPE_READS,
    is_getitem,
    is_matmul,
    matmul_extra,
    op_name,
)
from pamm_compile.private import aot

# Weights of one matmul may be several, those of the heads of attention for one.
_MANY_GRADIENTS = 256


@dataclass(frozen=True)
class Parameter:
    """A parameter as the graph sees it: one placeholder."""

    node: Node
    name: str
    gradient: Node | None
    """The node that the graph returns as its gradient; None if frozen or unused."""


class JointGraph:
    """A joint graph with its parameters, gradient outputs and phases found.

    Args:
        graph: what AOTAutograd traced, before partitioning.
        parameter_names: name of every parameter, by the key that `aot.input_key` gives its
            descriptor.
    """

    def __init__(self, graph: Graph, parameter_names: dict[str, str]) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.output = graph.output_node()
        self.parameter_names = parameter_names
        self._readers: dict[Node, tuple[set[Node], set[Node]]] = {}
        self._terms: dict[Parameter, list[Node]] = {}
        self._products: dict[Node, Product] = {}

    @staticmethod
    def is_joint(graph: Graph) -> bool:
        """Tell whether a graph has a backward part and the descriptors to read it by."""
        return "desc" in graph.output_node().meta and any(
            aot.is_tangent(node.meta.get("desc")) for node in graph.find_nodes(op="placeholder")
        )

    @cached_property
    def backward(self) -> frozenset[Node]:
        """Every node that depends on a tangent."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                if aot.is_tangent(node.meta.get("desc")):
                    found.add(node)
            elif node.op != "output" and any(arg in found for arg in node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _only_for_gradients(self) -> frozenset[Node]:
        """Every node that some gradient needs and no forward output."""
        outputs = set(self.output.all_input_nodes)
        needed = set(self.walk_back(outputs, lambda _: False))
        return frozenset(needed - set(self.walk_back(self.forward_outputs, lambda _: False)))

    @cached_property
    def _gradients(self) -> dict[str, Node]:
        descs = self.output.meta["desc"]
        outputs = self.output.args[0]
        assert isinstance(outputs, list | tuple)
        found = {}
        for desc, out in zip(descs, outputs, strict=True):
            key = aot.gradient_key(desc)
            # Torch 2.13, unlike 2.11, lists a DTensor's mesh beside its shard, by the same key.
            if key is not None and isinstance(out, Node) and _is_tensor(out):
                found[key] = out
        return found

    @cached_property
    def parameters(self) -> dict[Node, Parameter]:
        """The parameters among the placeholders."""
        found = {}
        for node in self.graph.find_nodes(op="placeholder"):
            key = aot.input_key(node.meta.get("desc"))
            if key is not None and key in self.parameter_names and _is_tensor(node):
                found[node] = Parameter(node, self.parameter_names[key], self._gradients.get(key))
        return found

    @cached_property
    def forward_outputs(self) -> frozenset[Node]:
        """Nodes that the forward pass returns to the user."""
        outputs = self.output.args[0]
        assert isinstance(outputs, list | tuple)
        return frozenset(
            out
            for desc, out in zip(self.output.meta["desc"], outputs, strict=True)
            if isinstance(out, Node) and aot.gradient_key(desc) is None
        )

    @cached_property
    def position(self) -> dict[Node, int]:
        """The place of every node in the order of execution."""
        return {node: number for number, node in enumerate(self.nodes)}

    @cached_property
    def _reached(self) -> dict[Node, frozenset[str] | None]:
        # None: more gradients than the weights of any one projection.
        owners: dict[Node, set[str]] = defaultdict(set)
        for key, node in self._gradients.items():
            owners[node].add(key)
        outputs = set(self.output.all_input_nodes)
        reached: dict[Node, frozenset[str] | None] = {}
        for node in reversed(self.nodes):
            if node not in self.backward:
                continue
            found: frozenset[str] | None = frozenset(owners[node])
            if node in outputs and not found:
                found = None
            for user in node.users:
                if user.op == "output" or found is None:
                    continue
                more = reached[user]
                found = None if more is None else found | more
            reached[node] = None if found is None or len(found) > _MANY_GRADIENTS else found
        return reached

    def only_reaches(self, node: Node, parameters: Iterable[Parameter]) -> bool:
        """Tell whether a backward value enters the gradients of these parameters and no others."""
        allowed = {aot.input_key(p.node.meta.get("desc")) for p in parameters}
        reached = self._reached.get(node)
        return reached is not None and bool(reached) and reached <= allowed

    @cached_property
    def _firsts(self) -> dict[Node, Node]:
        # Partitioners merge equal calls, after our pass has run.
        firsts: dict[Node, Node] = {}
        calls: dict[tuple[Any, str], Node] = {}
        for node in self.nodes:
            firsts[node] = node
            if node not in self.backward and _is_pure_call(node):
                # repr() tells 1, 1.0, True and 0.0, -0.0 apart, which == does not.
                arguments = repr(map_arg((node.args, node.kwargs), firsts.__getitem__))
                firsts[node] = calls.setdefault((node.target, arguments), node)
        return firsts

    @cached_property
    def _equals(self) -> dict[Node, set[Node]]:
        equals: dict[Node, set[Node]] = defaultdict(set)
        for node, first in self._firsts.items():
            equals[first].add(node)
        return equals

    def chain_of(self, node: Node) -> Chain:
        """Follow a node back as `chain_of` does, to the first node of those equal to its base.

            norm ──────── view ── mm       two calls with the same arguments are one value:
            norm (again) ─ view ── mm      both chains start from the first

        Args:
            node: any.

        Returns:
            The chain; equal for nodes whose elements are equal.
        """
        chain = chain_of(node)
        return Chain(self._firsts[chain.base], chain.steps)

    def first(self, node: Node) -> Node:
        """Return the first node of those that are equal to a forward node."""
        return self._firsts[node]

    def product(self, matmul: Node) -> Product:
        """Return what a matmul multiplies, its factors followed back to before they were rounded.

        To be asked for nodes that were there when the graph was first read.
        """
        if matmul not in self._products:
            self._products[matmul] = product_of(matmul)
        return self._products[matmul]

    def chain_of_factor(self, factor: Factor) -> Chain:
        """Return the chain of a factor, as that of one that is not rounded."""
        chain = self.chain_of(factor.node)
        if factor.merged is None:
            return chain
        return Chain(chain.base, (*chain.steps, view_step(factor.merged)))

    @cached_property
    def _roundings(self) -> dict[Node, list[Rounding]]:
        """What is rounded to float8, by the first node of its base."""
        found: dict[Node, list[Rounding]] = defaultdict(list)
        for node in self.nodes:
            rounding = rounding_at(node) if is_float8(node) else None
            if rounding is not None:
                found[self.chain_of(rounding.source).base].append(rounding)
        return found

    def gradient_of(self, placeholder: Node) -> Node | None:
        """Return the node that the graph returns as the gradient of an input, if it does."""
        key = aot.input_key(placeholder.meta.get("desc"))
        return None if key is None else self._gradients.get(key)

    def gradient_matmuls(self, parameter: Parameter) -> list[Node]:
        """Return the backward matmuls whose results are summed or assembled into a gradient.

            mm ── permute ─┐
                           add ── convert_element_type ── output (gradient of `parameter`)
            mm ── permute ─┘

        Args:
            parameter: one with a gradient, else the result is empty.

        Returns:
            The matmuls in graph order, wherever on the way slices, casts and sums stand.
        """
        return [node for node in self._gradient_terms(parameter) if is_matmul(node)]

    def _gradient_terms(self, parameter: Parameter) -> list[Node]:
        if parameter not in self._terms:
            starts = [] if parameter.gradient is None else [parameter.gradient]
            found = self.walk_back(starts, lambda _: False, self._gradient_sources)
            self._terms[parameter] = sorted(node for node in found if _is_term(node))
        return self._terms[parameter]

    def _gradient_sources(self, node: Node) -> list[Node]:
        if is_matmul(node):
            extra = matmul_extra(node)
            sources = [extra.addend] if extra is not None and extra.addend is not None else []
        else:
            sources = [] if _is_term(node) else node.all_input_nodes
        return [source for source in sources if source in self.backward]

    @cached_property
    def owners(self) -> dict[Node, Parameter]:
        """The parameter whose gradient a backward matmul is part of; one of them, if several."""
        return {
            node: parameter
            for parameter in self.parameters.values()
            for node in self.gradient_matmuls(parameter)
        }

    def walk_back(
        self,
        starts: Iterable[Node],
        ends: Callable[[Node], bool],
        sources: Callable[[Node], Iterable[Node]] = lambda node: node.all_input_nodes,
    ) -> Iterator[Node]:
        """Yield all ancestors of `starts` and these, not going past where `ends` holds.

        Args:
            starts: where to begin.
            ends: tells of a node that its operands are not wanted.
            sources: the operands to follow; all of them, unless given.
        """
        stack, seen = list(starts), set(starts)
        while stack:
            node = stack.pop()
            yield node
            if ends(node):
                continue
            for source in sources(node):
                if source not in seen:
                    seen.add(source)
                    stack.append(source)

    def readers(self, base: Node) -> tuple[set[Node], set[Node]]:
        """Return who reads a value in the backward pass, through any chain of it.

        Args:
            base: a forward node.

        Returns:
            closure: `base`, what equals it, and everything that only rearranges, casts or rounds
                these, in either phase.
            backward: what is computed from their elements for a gradient alone, whether it depends
                on a tangent or not (the 1 − tanh² of a decomposed tanh does not).
        """
        first = self._firsts[base]
        if first in self._readers:
            return self._readers[first]
        closure = set(self._equals[first])
        stack = list(closure)
        rounded = {
            node
            for rounding in self._roundings[first]
            for node in inside(rounding, lambda node: self.chain_of(node).base is first)
        }
        backward: set[Node] = set()
        while stack:
            for user in stack.pop().users:
                if user in closure or user.op == "output" or op_name(user) in SHAPE_READS:
                    continue
                if user in rounded or (is_chain_step(user) and user not in self.backward):
                    closure.add(user)
                    stack.append(user)
                elif user in self._only_for_gradients:
                    backward.add(user)
        self._readers[first] = closure, backward
        return closure, backward


def _is_term(node: Node) -> bool:
    return op_name(node) not in GRADIENT_PATH and not is_getitem(node)


def _is_tensor(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def _is_pure_call(node: Node) -> bool:
    """Tell whether a call returns the same whenever its arguments are the same."""
    target = node.target
    if not isinstance(target, aot.OpOverload):
        return is_getitem(node)
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not (random or node.is_impure() or "empty" in op_name(node))
