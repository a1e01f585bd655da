"""Reading a joint forward+backward graph: its inputs, gradients, phases and value chains.

Nothing here knows of PAMM. A *value chain* is a node followed back through operations that only
rearrange or cast its elements; the node where that ends is the chain's base:

    mul_4 [B,S,n] ── convert_element_type ── view [b,n] ── mm
    └ base                └──────── chain ───────┘
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

from pamm_compile.graph.vocabulary import (
    CHAIN,
    COPIES,
    GRADIENT_PATH,
    SHAPE_READS,
    TRANSPOSES,
    is_getitem,
    is_matmul,
    matmul_extra,
    op_name,
)
from pamm_compile.private import aot


def matmul_operands(node: Node) -> tuple[Node, Node]:
    """Return the left and right factor of a matmul, leaving out the addend of addmm and baddbmm."""
    assert is_matmul(node), node
    factors = node.args[1:3] if op_name(node) in ("aten::addmm", "aten::baddbmm") else node.args[:2]
    left, right = factors
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return left, right


def value(node: Node) -> Any:
    """Return the fake tensor (or symbolic number) that a node stands for."""
    return node.meta.get("val")


def is_transpose(node: Node) -> bool:
    """Tell whether a node swaps the last two dimensions and leaves the others in place."""
    name, val = op_name(node), value(node)
    if name not in TRANSPOSES or not isinstance(val, torch.Tensor):
        return False
    rank = val.dim()
    if name == "aten::t":
        return rank == 2
    if name == "aten::permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]
    return rank >= 2 and {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]


def strip_transposes(node: Node) -> tuple[Node, bool]:
    """Follow a node back through transposes of its last two dimensions.

    Returns:
        The first node that is no such transpose, and whether their number was odd.
    """
    odd = False
    while is_transpose(node):
        node, odd = node.all_input_nodes[0], not odd
    return node, odd


@dataclass(frozen=True)
class Chain:
    """A value chain: where it starts and, in order, what was done to the elements."""

    base: Node
    steps: tuple[tuple[Any, ...], ...]


def chain_of(node: Node) -> Chain:
    """Follow a node back through operations that only rearrange or cast its elements.

    Returns:
        The base and the steps from it to `node`, comparable between nodes.
    """
    steps: list[tuple[Any, ...]] = []
    while op_name(node) in CHAIN:
        source = node.args[0]
        if not isinstance(source, Node):
            break
        options = tuple(sorted(node.kwargs.items()))
        # A copy holds what its source does: without it, equal chains compare so.
        if op_name(node) not in COPIES:
            steps.append((op_name(node), _freeze(node.args[1:]), _freeze(options)))
        node = source
    return Chain(node, tuple(reversed(steps)))


def _freeze(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return tuple(_freeze(item) for item in arg)
    return arg


def is_chain_step(node: Node) -> bool:
    """Tell whether a node only rearranges or casts the elements of its operand."""
    return op_name(node) in CHAIN


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
            closure: `base`, what equals it, and everything that only rearranges or casts these, in
                either phase.
            backward: what is computed from their elements for a gradient alone, whether it depends
                on a tangent or not (the 1 − tanh² of a decomposed tanh does not).
        """
        first = self._firsts[base]
        if first in self._readers:
            return self._readers[first]
        closure = set(self._equals[first])
        stack = list(closure)
        backward: set[Node] = set()
        while stack:
            for user in stack.pop().users:
                if user in closure or user.op == "output" or op_name(user) in SHAPE_READS:
                    continue
                if is_chain_step(user) and user not in self.backward:
                    closure.add(user)
                    stack.append(user)
                elif user in self._only_for_gradients:
                    backward.add(user)
        self._readers[first] = closure, backward
        return closure, backward


def _is_term(node: Node) -> bool:
    return op_name(node) not in GRADIENT_PATH and not is_getitem(node)


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """Return the shape of a tensor, comparable without a guard; None for anything else."""
    val = value(node)
    return tuple(map(aot.size_key, val.shape)) if isinstance(val, torch.Tensor) else None


def _is_tensor(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def _is_pure_call(node: Node) -> bool:
    """Tell whether a call returns the same whenever its arguments are the same."""
    target = node.target
    if not isinstance(target, aot.OpOverload):
        return is_getitem(node)
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not (random or node.is_impure() or "empty" in op_name(node))
