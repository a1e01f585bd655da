"""How activations flow through a forward pass: a graph of its products, sums and attention alone.

    q_proj ──┐                                   products: matmuls, attention, embeddings
    k_proj ──┼─ attention ── o_proj ── (+) ─┐    residual sums: x + f(x), where f has a product
    v_proj ──┘                               └─ up_proj ── down_proj ── (+)

Everything between two of these *stops* (casts, views, norms, activations, rotary embeddings,
convolutions over time, products with constants) is walked through. Operands that carry no gradient
(indices, masks, what is detached) are not followed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.fx import Node

from pamm_compile.graph.chains import shape_of, value
from pamm_compile.graph.dynamo import nested_graphs
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.operands import (
    Factors,
    Kind,
    Operands,
    carries_gradient,
    passes,
    squeezed,
    tensors_of,
)
from pamm_compile.graph.vocabulary import (
    is_attention,
    is_convolution,
    is_detach,
    is_embedding,
    is_foreign,
    is_matmul,
    is_other_product,
    is_partial_sum,
    is_scan,
    summands,
)
from pamm_compile.sites.anchors import Anchors


class Flow:
    """The stops of a forward pass, and which of them stand behind every value.

    Args:
        joint: the graph to read.
        operands: what its values are made of.
        anchors: the attention in it.
    """

    def __init__(self, joint: JointGraph, operands: Operands, anchors: Anchors) -> None:
        self.joint, self.operands, self.anchors = joint, operands, anchors
        self.projections: dict[Node, Factors] = {}
        """Matmuls of an activation with a weight."""
        self.learned: dict[Node, Factors] = {}
        """Matmuls of a weight with a weight, such as queries made of parameters."""
        self.opaque: dict[Node, tuple[Node, ...]] = {}
        """Other operators that multiply by a weight, with the weights."""
        self.mixers: set[Node] = set()
        """What mixes activations and is no attention that we recognise."""
        self.residual: set[Node] = set()
        """Sums of a value and of what a product makes of it."""
        self.starts: set[Node] = set()
        """Stops whose output is such a value: the beginning of a residual stream."""
        self.returned: set[Node] = set()
        """Stops that are returned by the graph, as more than a number."""
        self._origins: dict[Node, frozenset[Node]] = {}
        self._behind: dict[Node, frozenset[Node]] = {}
        self._through: dict[Node, frozenset[Node]] = {}
        self._place = joint.position
        for node in joint.nodes:
            if node.op != "output" and node not in joint.backward:
                self._visit(node)
        self.successors = self._successors()

    # Stops -----------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        behind: frozenset[Node] = frozenset()
        through: frozenset[Node] = frozenset()
        if carries_gradient(node):
            for source in self.followed(node):
                behind |= self.behind(source)
                if passes(source, node):
                    through |= self.through(source)
        self._behind[node], self._through[node] = behind, through
        self._classify(node)

    def _classify(self, node: Node) -> None:
        if is_matmul(node):
            self._classify_matmul(node)
        elif is_other_product(node) and not is_convolution(node):
            self.opaque[node] = self._weights(node)
        elif is_scan(node) and self._reads_activations(node):
            self.mixers.add(node)
        elif is_foreign(node) and not is_attention(node):
            weights = tuple(w for w in self._weights(node) if len(shape_of(w) or ()) > 1)
            if nested_graphs(node):
                # Reported as what it is, whatever the targets are.
                return
            if weights and self._reads_activations(node):
                self.opaque[node] = weights
            elif self._may_attend(node):
                self.mixers.add(node)
        elif self._is_residual(node):
            self.residual.add(node)

    def _classify_matmul(self, node: Node) -> None:
        factors, learned = self.operands.factors(node), self.operands.learned_factors(node)
        if node in self.anchors.products:
            # A parameter may be the queries: a projection all the same. What is made of parameters
            # by a product of their own is queries, keys or values alone.
            if factors is not None and not self.operands.is_made(factors.weight):
                self.projections[node] = factors
        elif factors is not None:
            self.projections[node] = factors
        elif learned is not None:
            self.learned[node] = learned
        elif not self.operands.is_scaled(node):
            self.mixers.add(node)

    def _reads_activations(self, node: Node) -> bool:
        return any(self.operands.kind(s) is Kind.ACTIVATION for s in self.followed(node))

    def _weights(self, node: Node) -> tuple[Node, ...]:
        kinds = (Kind.WEIGHT, Kind.MIXED)
        return tuple(n for n in node.all_input_nodes if self.operands.kind(n) in kinds)

    def _may_attend(self, node: Node) -> bool:
        """Tell whether an unknown operator takes what looks like queries, keys and values.

        That is three activations, or one of three times as many elements as the result has. An
        activation function takes a gate and a value; a rotary embedding returns all it takes.
        """
        own = [s for s in self.followed(node) if self.behind(s) - self.residual - self.starts]
        taken = [t for s in own for t in tensors_of(s)]
        shapes = [tuple(map(str, t.shape)) for t in taken]
        made = [t for t in tensors_of(node) if t.is_floating_point()]
        if not made or sum(tuple(map(str, t.shape)) in shapes for t in made) > 1:
            return False
        packed = any(t.dim() == made[0].dim() and _ratio(t, made[0]) >= 3 for t in taken)
        return len(own) >= 3 or packed

    def is_stop(self, node: Node) -> bool:
        """Tell whether a node is one of the products and sums that activations flow between."""
        return (
            node in self.projections
            or node in self.learned
            or node in self.opaque
            or node in self.mixers
            or node in self.residual
            or self.is_attention(node)
            or is_embedding(node)
            or (node.op == "placeholder" and self.operands.kind(node) is Kind.ACTIVATION)
        )

    def is_attention(self, node: Node) -> bool:
        """Tell whether a node is attention, or one of the products of hand-written attention."""
        return node in self.anchors.operands or node in self.anchors.products

    def _is_product(self, node: Node) -> bool:
        return (
            node in self.projections
            or node in self.opaque
            or node in self.mixers
            or self.is_attention(node)
            or (is_convolution(node) and not self.is_depthwise(node))
        )

    def is_depthwise(self, node: Node) -> bool:
        """Tell whether a convolution keeps channels apart."""
        weight = node.args[1]
        return isinstance(weight, Node) and value(weight).shape[1] == 1

    # Walking back ----------------------------------------------------------------------------

    def followed(self, node: Node) -> list[Node]:
        """Return the operands of a node that activations come from."""
        if is_detach(node):
            return []
        if is_convolution(node):
            sources = node.all_input_nodes[:1]
        elif is_matmul(node) and self.operands.is_scaled(node):
            sources = [
                s for s in node.all_input_nodes if self.operands.kind(s) is not Kind.CONSTANT
            ]
        else:
            sources = node.all_input_nodes
        return [source for source in sources if carries_gradient(source)]

    def behind(self, node: Node) -> frozenset[Node]:
        """Return the nearest stops that a value is computed from, itself if it is one."""
        return frozenset((node,)) if self.is_stop(node) else self._behind[node]

    def through(self, node: Node) -> frozenset[Node]:
        """Return those of `behind` whose own elements the value has, not a scale for many."""
        return frozenset((node,)) if self.is_stop(node) else self._through[node]

    def segment(self, starts: Iterable[Node]) -> Iterable[Node]:
        """Yield what lies between values and the stops behind them, both included."""
        return self.joint.walk_back(starts, self.is_stop, self.followed)

    # Residual sums ---------------------------------------------------------------------------

    def _is_residual(self, node: Node) -> bool:
        """Tell whether a node sums a value and what a product makes of it: x + f(x)."""
        found = [s for s in summands(node) if carries_gradient(s) and self._counts(s, node)]
        if len(found) < 2:
            return False
        for value_ in found:
            origin = self._origin(value_)
            first = min((self._place[n] for n in origin), default=0)
            if any(self._makes(other, origin, first) for other in found if other is not value_):
                self._origins[node] = origin | {node}
                self.starts |= self.behind(value_)
                return True
        return False

    def _counts(self, summand: Node, total: Node) -> bool:
        if self.operands.kind(summand) not in (Kind.ACTIVATION, Kind.MIXED, Kind.CONSTANT):
            return False
        return is_partial_sum(total) or squeezed(summand) == squeezed(total)

    def _origin(self, node: Node) -> frozenset[Node]:
        found: set[Node] = set()
        for each in self.segment([node]):
            found.add(each)
            found |= self._origins.get(each, frozenset())
        return frozenset(
            n for n in found if self.operands.kind(n) is not Kind.WEIGHT and carries_gradient(n)
        )

    def _makes(self, node: Node, origin: frozenset[Node], first: int) -> bool:
        """Tell whether a product stands on a way back from a node to one of `origin`."""
        stack, seen = [(node, False)], set()
        while stack:
            state = node, crossed = stack.pop()
            if state in seen or self._place[node] < first:
                continue
            seen.add(state)
            if node in origin and crossed:
                return True
            if node in self.residual:
                continue
            sources = self.anchors.operands.get(node) or self.followed(node)
            crossed = crossed or self._is_product(node)
            stack += [(source, crossed) for source in sources]
        return False

    # Forward ---------------------------------------------------------------------------------

    def _successors(self) -> dict[Node, set[Node]]:
        """Return what takes the elements of every stop next: other stops, or the output."""
        found: dict[Node, set[Node]] = defaultdict(set)
        for node in self._through:
            if self.is_stop(node):
                for source in self.inputs(node):
                    for stop in self.through(source):
                        found[stop].add(node)
        for output in self.joint.forward_outputs:
            if output in self._through:
                for stop in self.through(output):
                    found[stop].add(self.joint.output)
                    # A number, such as the loss, is no query of attention in another graph.
                    if squeezed(output):
                        self.returned.add(stop)
        return found

    def inputs(self, stop: Node) -> list[Node]:
        """Return the activations that a stop reads."""
        if stop in self.projections:
            return [self.projections[stop].activation]
        if stop in self.anchors.operands:
            return self.anchors.operands[stop]
        if stop in self.opaque:
            return [s for s in self.followed(stop) if s not in self.opaque[stop]]
        return [] if is_embedding(stop) else self.followed(stop)


def _ratio(wide: torch.Tensor, narrow: torch.Tensor) -> int:
    """Return how many times as many elements one tensor has; 1 where the sizes are symbolic."""
    sizes = wide.numel(), narrow.numel()
    if not all(isinstance(size, int) for size in sizes) or not sizes[1]:
        return 1
    return int(sizes[0] // sizes[1])
