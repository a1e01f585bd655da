"""What the operands of a forward pass are made of: parameters, constants, or activations.

weight          of parameters alone (and of what the graph makes itself, such as a range)
mixed weight    element by element of a parameter and of something else: a mask, a buffer, a
                scale that is read off activations; or rows of a parameter that an input picks
constant        of inputs that nothing differentiates: buffers, masks, data
activation      everything else
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch.fx import Node

from pamm_compile.graph.chains import matmul_operands, shape_of, value
from pamm_compile.graph.joint import JointGraph, Parameter
from pamm_compile.graph.vocabulary import (
    CHAIN,
    MOVES,
    PICKS,
    is_embedding,
    is_foreign,
    is_getitem,
    is_matmul,
    is_other_product,
    is_shaped_like,
    op_name,
)


class Kind(enum.Enum):
    """What a value is made of."""

    CONSTANT = enum.auto()
    WEIGHT = enum.auto()
    MIXED = enum.auto()
    ACTIVATION = enum.auto()


@dataclass(frozen=True)
class _Made:
    kind: Kind
    leaves: frozenset[Node] = frozenset()
    """The parameters of a weight."""
    fed: bool = False
    """Whether an input of the graph that is no parameter is among what it is made of."""
    product: bool = False
    """Whether a weight is the result of a matmul."""
    active: bool = False
    """Whether an activation is among what a mixed weight is made of."""
    picked: bool = False
    """Whether its rows were picked by an input, as those of an embedding are by tokens."""


_ACTIVATION = _Made(Kind.ACTIVATION, fed=True, active=True)


@dataclass(frozen=True)
class Factors:
    """A matmul of an activation with a weight."""

    activation: Node
    weight: Node
    parameters: tuple[Parameter, ...]
    active: bool = False
    """Whether the weight is computed from activations too."""


class Operands:
    """Tells what every value of a forward pass is made of.

    Args:
        joint: the graph to read.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self._made: dict[Node, _Made] = {}
        for node in joint.nodes:
            self._made[node] = _ACTIVATION if node in joint.backward else self._make(node)

    def _make(self, node: Node) -> _Made:
        if node.op == "placeholder":
            if node in self.joint.parameters:
                return _Made(Kind.WEIGHT, frozenset((node,)))
            if self.joint.gradient_of(node) is not None:
                return _ACTIVATION
            # Sizes are numbers that any weight may have been made with.
            return _Made(Kind.CONSTANT, fed=isinstance(value(node), torch.Tensor))
        if not tensors_of(node) or is_shaped_like(node):
            return _Made(Kind.CONSTANT)
        sources = [self._made[source] for source in node.all_input_nodes]
        leaves = frozenset[Node]().union(*(made.leaves for made in sources))
        if not any(made.fed for made in sources):
            is_product = is_matmul(node) or any(made.product for made in sources)
            return _Made(Kind.WEIGHT if leaves else Kind.CONSTANT, leaves, product=is_product)
        active = any(made.active for made in sources)
        if not leaves and not active:
            return _Made(Kind.CONSTANT, fed=True)
        picked = op_name(node) in PICKS or any(made.picked for made in sources)
        # Rows of an embedding and what is added to them are a residual stream.
        if self._spanned_by_weight(node) and not (picked and active):
            product = any(made.product for made in sources)
            return _Made(Kind.MIXED, leaves, True, product, active, picked)
        return _ACTIVATION

    def _spanned_by_weight(self, node: Node) -> bool:
        """Tell whether every element of a result comes from an element of a parameter of its own.

        So it does in a masked or normalised weight, and not where a parameter scales activations.
        """
        if op_name(node) in PICKS:
            return self._is_matrix_of_rows(node)
        if is_matmul(node) or is_other_product(node) or is_embedding(node) or is_foreign(node):
            return False
        weights = [s for s in node.all_input_nodes if self._made[s].leaves]
        if is_getitem(node) or op_name(node) in MOVES:
            # A class token in front of activations makes no weight of these.
            return len(weights) == len(node.all_input_nodes)
        return any(shape_of(source) == shape_of(node) for source in weights)

    def _is_matrix_of_rows(self, node: Node) -> bool:
        """Tell whether a list of numbers picks the rows of a weight, for all tokens alike."""
        table = node.args[0]
        assert isinstance(table, Node)
        made = self._made[table]
        is_weight = made.kind in (Kind.WEIGHT, Kind.MIXED) and not made.active
        is_matrix = len(shape_of(node) or ()) == 2
        return is_weight and (is_matrix or shape_of(node) == shape_of(table))

    def kind(self, node: Node) -> Kind:
        """Return what a value is made of; what the backward pass makes counts as an activation."""
        return self._made[node].kind

    def parameters(self, node: Node) -> tuple[Parameter, ...]:
        """Return the parameters of a weight, mixed or not; none for anything else."""
        return tuple(self.joint.parameters[leaf] for leaf in sorted(self._made[node].leaves))

    def is_fed(self, node: Node) -> bool:
        """Tell whether an input of the graph that is no parameter enters a value."""
        return self._made[node].fed

    def is_active(self, node: Node) -> bool:
        """Tell whether an activation is among what a value is made of."""
        return self._made[node].active

    def is_made(self, node: Node) -> bool:
        """Tell whether a value is the result of a product, or picked by an input, or none of ours.

        What is not is a parameter as it stands, or masked, scaled, sliced.
        """
        made = self._made[node]
        return made.kind not in (Kind.WEIGHT, Kind.MIXED) or made.product or made.picked

    def is_computed(self, node: Node) -> bool:
        """Tell whether a weight is the result of a matmul, or repeated over a batch.

        Queries that are projections of parameters are, and weights of layers hardly ever.
        """
        made = self._made[node]
        if made.kind is not Kind.WEIGHT:
            return False
        if made.product:
            return True
        while op_name(node) in CHAIN and isinstance(source := node.args[0], Node):
            if op_name(node) == "aten::expand" and squeezed(source) != squeezed(node):
                return True
            node = source
        return False

    def factors(self, node: Node) -> Factors | None:
        """Return a matmul as one of an activation with a weight; None if it is something else.

        A weight made of parameters alone goes before a mixed one: where an activation is the sum of
        data and learned positions, either factor is made of parameters.
        """
        left, right = matmul_operands(node)
        for wanted in (Kind.WEIGHT, Kind.MIXED):
            for activation, weight in ((left, right), (right, left)):
                if self.kind(weight) is wanted and self.kind(activation) is not wanted:
                    if wanted is Kind.WEIGHT and not self._made[activation].fed:
                        # A rotation of a weight, say: still a weight.
                        return None
                    active = self._made[weight].active
                    return Factors(activation, weight, self.parameters(weight), active)
        return None

    def learned_factors(self, node: Node) -> Factors | None:
        """Return a matmul of a weight with what no input enters, which then takes X's place.

        Of two weights, the weight is the one that is a parameter as it stands, if only one is; else
        the right one.
        """
        left, right = matmul_operands(node)
        if self._made[left].fed or self._made[right].fed:
            return None
        is_weight = [self.kind(factor) is Kind.WEIGHT for factor in (left, right)]
        if is_weight == [False, False]:
            return None
        plain = [self._is_parameter(factor) for factor in (left, right)]
        if is_weight == [True, False] or plain == [True, False]:
            left, right = right, left
        return Factors(left, right, self.parameters(right))

    def _is_parameter(self, node: Node) -> bool:
        return self.joint.chain_of(node).base.op == "placeholder" and not self.is_computed(node)

    def is_scaled(self, node: Node) -> bool:
        """Tell whether a matmul multiplies activations by a constant."""
        left, right = (self.kind(operand) for operand in matmul_operands(node))
        return Kind.CONSTANT in (left, right) and left is not right


def carries_gradient(node: Node) -> bool:
    """Tell whether a value may carry a gradient: indices, masks and sizes do not."""
    return any(v.is_floating_point() or v.is_complex() for v in tensors_of(node))


def passes(source: Node, node: Node) -> bool:
    """Tell whether an operand's elements go on in a result, not broadcast over many."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return shape_of(source) == shape_of(node)
    if op_name(node) == "aten::expand":
        return squeezed(source) == squeezed(node)
    return True


def tensors_of(node: Node) -> list[torch.Tensor]:
    """Return the tensors that a node stands for; several where an operator returns several."""
    val = value(node)
    if isinstance(val, dict):
        # So do Triton kernels, by the names of their arguments.
        val = list(val.values())
    values = val if isinstance(val, tuple | list) else (val,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def squeezed(node: Node) -> tuple[object, ...]:
    """Return a tensor's shape without sizes of one, comparable without a guard."""
    return tuple(size for size in shape_of(node) or () if size != 1)
