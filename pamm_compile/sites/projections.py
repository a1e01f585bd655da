"""Projections of a joint graph, the sites they form, and the weight gradients made from these.

A projection is a matmul of an activation with parameters. Projections that read the same elements
in the same order (same base, same chain) form one site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from pamm_compile.graph.joint import (
    Chain,
    JointGraph,
    Parameter,
    matmul_operands,
    strip_transposes,
    value,
)
from pamm_compile.graph.vocabulary import (
    ACTIVATION_SUMS,
    is_attention,
    is_convolution,
    is_embedding,
    is_matmul,
    op_name,
)
from pamm_compile.private import aot


@dataclass(frozen=True)
class Projection:
    """A matmul of an activation with parameters, in the forward pass."""

    node: Node
    input: Node
    """The factor that is an activation, as the matmul reads it."""
    parameters: tuple[Parameter, ...]
    narrow_of: Projection | None = None
    """The narrow projection whose output this one reads (LoRA's B reads A's), if any."""

    @property
    def name(self) -> str:
        """The parameters' names, joined."""
        return " + ".join(p.name for p in self.parameters)


@dataclass(frozen=True)
class WeightGradient:
    """A backward matmul over tokens: dZᵀ·X, or Xᵀ·dZ where `transposed`."""

    node: Node
    output_gradient: Node
    """The factor that is not X: [m, b] (so dZᵀ), or [b, m] where `transposed`."""
    transposed: bool
    projection: Projection


@dataclass
class Site:
    """Projections that read one input, and the weight gradients made from it."""

    chain: Chain
    input: Node
    """X as the projections read it: [b, n], or [1, b, n] for batched matmuls."""
    projections: list[Projection] = field(default_factory=list)
    gradients: list[WeightGradient] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The names of all parameters, in the order the forward pass uses them."""
        return ", ".join(p.name for p in self.projections)


def ends_projection(node: Node) -> bool:
    """Tell whether a search back from attention goes no further than a node."""
    return is_matmul(node) or is_convolution(node) or is_embedding(node) or is_attention(node)


class Projections:
    """Tells what is a projection in a joint graph, and groups projections into sites.

    Args:
        joint: the graph to read.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint

    def operands(self, node: Node) -> tuple[Node, list[Parameter]] | None:
        """Return the activation and the parameters that a matmul multiplies, if it does."""
        left, right = matmul_operands(node)
        for activation, weight in ((left, right), (right, left)):
            parameters = self.joint.parameters_of(weight)
            if parameters and not self.joint.parameters_of(activation):
                return activation, parameters
        return None

    def projection(self, node: Node) -> Projection | None:
        """Return a matmul as a projection, if it is one of an activation with parameters."""
        operands = self.operands(node)
        if operands is None:
            return None
        activation, parameters = operands
        return Projection(node, activation, tuple(parameters), self._narrow(activation))

    def _narrow(self, activation: Node) -> Projection | None:
        """Return the projection whose narrow output an activation is, if it is a low-rank factor.

        x ── A (n → r) ── B                    a factor, as in LoRA
        x ── A (n → r) ─┬─ norm ── B ── … ─ add     the stream itself, as behind a
                        └───────────────────┘       projection of patches
        """
        for node in self.joint.walk_back([activation], self._ends_narrow):
            if not is_matmul(node):
                continue
            operands = self.operands(node)
            if operands is None:
                continue
            wide, narrow = value(operands[0]).shape[-1], value(node).shape[-1]
            is_narrow = aot.guarded(2 * narrow <= wide) is True
            if is_narrow and not self._is_residual_stream(node):
                return Projection(node, operands[0], tuple(operands[1]))
        return None

    def _ends_narrow(self, node: Node) -> bool:
        if ends_projection(node):
            return True
        if op_name(node) not in ACTIVATION_SUMS:
            return False
        full = [n for n in node.all_input_nodes if _spans(n, node)]
        return len(full) > 1

    def _is_residual_stream(self, node: Node) -> bool:
        """Tell whether something behind a matmul or attention is added to a node's elements."""
        own, stack = {node}, [node]
        while stack:
            for user in stack.pop().users:
                ends = user in self.joint.backward or ends_projection(user)
                if user not in own and user.op != "output" and not ends:
                    own.add(user)
                    stack.append(user)
        return any(
            op_name(total) in ACTIVATION_SUMS
            and any(n not in own and _spans(n, total) for n in total.all_input_nodes)
            for total in own
        )

    def sites(self, projections: Iterable[Projection]) -> list[Site]:
        """Group projections that read one input, in graph order, with their weight gradients."""
        sites: dict[Chain, Site] = {}
        for projection in sorted(projections, key=lambda p: p.node):
            stripped, _ = strip_transposes(projection.input)
            chain = self.joint.chain_of(stripped)
            site = sites.setdefault(chain, Site(chain, stripped))
            site.projections.append(projection)
            for gradient in self._weight_gradients(projection, site.chain):
                if all(gradient.node is not g.node for g in site.gradients):
                    site.gradients.append(gradient)
        return list(sites.values())

    def _weight_gradients(self, projection: Projection, chain: Chain) -> list[WeightGradient]:
        found = []
        for parameter in projection.parameters:
            for node in self.joint.gradient_matmuls(parameter):
                left, right = matmul_operands(node)
                for factor, other, is_left in ((left, right, True), (right, left, False)):
                    stripped, odd = strip_transposes(factor)
                    # Xᵀ on the left or X on the right; else the sum is not over tokens.
                    if odd == is_left and self.joint.chain_of(stripped) == chain:
                        found.append(WeightGradient(node, other, is_left, projection))
        return found


def _spans(operand: Node, result: Node) -> bool:
    a, b = value(operand), value(result)
    return isinstance(a, torch.Tensor) and aot.same_shape(a, b)
