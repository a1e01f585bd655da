"""The weights of products that are no projections, so that no weight that trains is silent.

Roles name the weight of every matmul that is read as one of an activation with a weight. What is
left are parameters of two dimensions or more that reach a factor of a product in another way:

    bmm(x, w[None] * style)     made for every sample             COMPUTED_WEIGHT
    bmm(x, w[labels])           looked up for every sample        UNSUPPORTED_LAYOUT
    attention(query, k, v)      operands of an operator           NOT_A_PROJECTION
    matmul(query, w)            made of parameters alone          LEARNED_INPUT

They are found twice: forward from every parameter to the products that it gets to, and backward
from every gradient to the products that it is a sum of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch.fx import Node

from pamm_compile.graph.chains import matmul_operands, shape_of, value
from pamm_compile.graph.dynamo import nested_graphs
from pamm_compile.graph.joint import JointGraph, Parameter
from pamm_compile.graph.operands import Kind, carries_gradient
from pamm_compile.graph.spread import Spread, everywhere, spread
from pamm_compile.graph.vocabulary import (
    SHIFTS,
    SUMMED,
    SUMS,
    is_attention,
    is_convolution,
    is_detach,
    is_exponential,
    is_matmul,
    is_other_product,
    is_shaped_like,
    op_name,
)
from pamm_compile.sites.flow import Flow
from pamm_compile.sites.projections import Projection, Unmatched, factor_of
from pamm_compile.sites.reasons import Decline, Reason

LEAVES = "what is made of this weight alone leaves the graph"
"""What is said of a weight that another graph multiplies, if any does."""
NO_GRADIENT = "this use of the weight is not differentiated"
"""What is said of a weight whose gradient comes from elsewhere."""


def leftovers(
    flow: Flow, projections: Iterable[Projection], unmatched: Iterable[Unmatched]
) -> list[Unmatched]:
    """Return the trained weights of products that nothing else names.

    Args:
        flow: the products of a forward pass.
        projections: what is named already.
        unmatched: and what besides.

    Returns:
        One entry a weight, in the order of the parameters, of no use that the graph tells.
    """
    named = {weight for each in projections for weight in each.parameters}
    named |= {weight for each in unmatched for weight in each.parameters}
    missing = [
        weight
        for weight in flow.joint.parameters.values()
        if weight.gradient is not None and weight not in named and value(weight.node).dim() >= 2
    ]
    if not missing:
        return []
    found = _Search(flow, missing).found
    for weight in missing:
        if weight not in found and _is_sum_of_products(flow, weight):
            found[weight] = Decline(Reason.UNSUPPORTED_LAYOUT, weight.name)
    return [
        Unmatched((weight,), frozenset(), found[weight]) for weight in missing if weight in found
    ]


@dataclass(frozen=True)
class _Carried:
    """What a value has of a parameter's elements."""

    spread: Spread
    mixed: bool = False
    """Whether activations were multiplied with these, or added to them."""
    alone: bool = True
    """Whether none had to do with these at all: what is left is a weight, computed with others."""


class _Search:
    """Follows parameters forward to the products that they are a factor of."""

    def __init__(self, flow: Flow, weights: Iterable[Parameter]) -> None:
        self.found: dict[Parameter, Decline] = {}
        self._flow = flow
        self._carried: dict[Node, dict[Parameter, _Carried]] = {
            weight.node: {weight: _Carried(everywhere(weight.node))} for weight in weights
        }
        self._live = _differentiated(flow.joint)
        for node in flow.joint.nodes:
            if node.op in ("placeholder", "output") or node in flow.joint.backward:
                continue
            if any(source in self._carried for source in node.all_input_nodes):
                self._visit(node)
        for node in flow.joint.forward_outputs:
            if node not in flow.joint.parameters and flow.operands.kind(node) is Kind.WEIGHT:
                for weight in self._carried.get(node, {}):
                    decline = Decline(Reason.PROJECTION_IN_ANOTHER_GRAPH, weight.name, LEAVES)
                    self.found.setdefault(weight, decline)

    def _visit(self, node: Node) -> None:
        flow = self._flow
        if is_matmul(node):
            self._visit_matmul(node)
        elif is_attention(node):
            for operand in flow.anchors.operands.get(node, ()):
                self._name(node, operand, Reason.NOT_A_PROJECTION, op_name(node))
        elif is_other_product(node) and not is_convolution(node):
            for operand in node.all_input_nodes:
                self._name(node, operand, Reason.NOT_A_PROJECTION, op_name(node))
        elif not self._ends(node):
            self._carry(node)

    def _ends(self, node: Node) -> bool:
        """Tell whether what comes behind a node is no weight any more."""
        return (
            node in self._flow.residual
            or is_convolution(node)
            or is_detach(node)
            or is_shaped_like(node)
            or not carries_gradient(node)
            or bool(nested_graphs(node))
        )

    def _visit_matmul(self, node: Node) -> None:
        flow = self._flow
        left, right = matmul_operands(node)
        factors = flow.projections.get(node)
        for factor, other in ((left, right), (right, left)):
            if factors is not None and factors.weight is other:
                # X, whatever it is made of.
                continue
            if node in flow.learned:
                self._name(node, factor, Reason.LEARNED_INPUT)
            elif flow.operands.kind(other) is not Kind.CONSTANT or flow.operands.is_fed(other):
                # Constants are data too, unless the graph makes them.
                self._name(node, factor, Reason.UNSUPPORTED_LAYOUT)
            if node in flow.learned or flow.operands.is_scaled(node):
                # Still a weight.
                carried = self._carried.setdefault(node, {})
                for weight, each in self._carried.get(factor, {}).items():
                    carried[weight] = replace(each, spread=everywhere(node), alone=False)

    def _name(self, node: Node, operand: Node, reason: Reason, detail: str = "") -> None:
        for weight, carried in self._carried.get(operand, {}).items():
            # What varies along one dimension alone scales or shifts activations, and is no matrix.
            is_matrix = all(carried.spread[-2:])
            if not is_matrix and not carried.alone:
                continue
            if node not in self._live:
                decline = Decline(Reason.NO_WEIGHT_GRAD, weight.name, NO_GRADIENT)
            elif reason is Reason.UNSUPPORTED_LAYOUT and (carried.mixed or not is_matrix):
                decline = Decline(Reason.COMPUTED_WEIGHT, weight.name)
            else:
                decline = Decline(reason, weight.name, detail)
            self.found.setdefault(weight, decline)

    def _carry(self, node: Node) -> None:
        carried: dict[Parameter, _Carried] = {}
        sources = [s for s in node.all_input_nodes if carries_gradient(s)]
        for source in sources:
            for weight, each in self._carried.get(source, {}).items():
                beside = [s for s in sources if weight not in self._carried.get(s, {})]
                active = any(map(self._flow.operands.is_active, beside))
                mixed = each.mixed or (op_name(node) in SHIFTS and active)
                # Data that a weight is added to stay data; what is scaled by it may be a weight.
                alone = each.alone and not (active or (beside and op_name(node) in SUMS))
                if mixed and is_exponential(node):
                    # A bias of scores.
                    continue
                marks = spread(node, source, each.spread)
                if weight in carried:
                    other = carried[weight]
                    marks = tuple(map(any, zip(marks, other.spread, strict=True)))
                    mixed, alone = mixed or other.mixed, alone and other.alone
                carried[weight] = _Carried(marks, mixed, alone)
        if carried:
            self._carried[node] = carried


def _differentiated(joint: JointGraph) -> set[Node]:
    """Return what some output of the forward pass may be differentiated by."""
    return set(
        joint.walk_back(
            joint.forward_outputs,
            is_detach,
            lambda node: [s for s in node.all_input_nodes if carries_gradient(s)],
        )
    )


def _is_sum_of_products(flow: Flow, weight: Parameter) -> bool:
    """Tell whether a gradient is, as it stands or summed, a product with activations.

    That of a position or of an embedding is a product with a weight.
    """
    joint, operands = flow.joint, flow.operands

    def ends(node: Node) -> bool:
        return is_matmul(node) or op_name(node) not in SUMMED

    assert weight.gradient is not None
    return any(
        is_matmul(node)
        and all(operands.kind(each) is Kind.ACTIVATION for each in matmul_operands(node))
        for node in joint.walk_back([weight.gradient], ends)
        if node in joint.backward
    )


def is_differentiated(joint: JointGraph, projection: Projection) -> bool:
    """Tell whether the gradients of a projection's weights have to do with its input.

    Args:
        joint: the graph it is in.
        projection: any that is trained.

    Returns:
        Whether a product in the backward pass reads what is made of the input, element by element,
        and enters such a gradient.
    """
    closure, _ = joint.readers(joint.chain_of(factor_of(joint, projection).node).base)
    derived, stack = set(closure), list(closure)
    while stack:
        for user in stack.pop().users:
            if user not in derived and user not in joint.backward and not _is_product(user):
                derived.add(user)
                stack.append(user)
    gradients = [w.gradient for w in projection.parameters if w.gradient is not None]

    def multiplies(node: Node) -> bool:
        read = derived.intersection(node.all_input_nodes)
        if op_name(node) == "aten::mul":
            # Over one token, a product of columns with rows.
            return any(shape_of(factor) != shape_of(node) for factor in read)
        return bool(read) and _is_product(node)

    return any(
        multiplies(node)
        for node in joint.walk_back(gradients, lambda node: node not in joint.backward)
        if node in joint.backward
    )


def _is_product(node: Node) -> bool:
    return is_matmul(node) or is_other_product(node) or is_attention(node)
