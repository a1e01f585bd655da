"""Attention in a joint graph: the operators, and what people write in their place."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.fx import Node

from pamm_compile.graph.chains import matmul_operands, shape_of
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.operands import Kind, Operands, carries_gradient, passes
from pamm_compile.graph.spread import reduced_dims, spread
from pamm_compile.graph.vocabulary import (
    is_attention,
    is_convolution,
    is_embedding,
    is_exponential,
    is_matmul,
    op_name,
)
from pamm_compile.sites.projections import sizes_of


class Anchors:
    """The attention of a forward pass.

    Hand-written attention is a matmul whose one factor comes, through anything but matmuls, from an
    exponential over a matmul of queries with keys. Either may be made of parameters alone; as
    they stand, these are queries only if nothing else asks.

    Args:
        joint: the graph to read.
        operands: what its values are made of.
    """

    def __init__(self, joint: JointGraph, operands: Operands) -> None:
        self.joint, self._operands = joint, operands
        self.operands: dict[Node, list[Node]] = {}
        """Queries, keys and values, by the operator or the last product of each attention."""
        self.products: set[Node] = set()
        """The matmuls of hand-written attention; those with a weight are projections too."""
        self._small = self._small_weights()
        for node in joint.nodes:
            if node in joint.backward:
                continue
            if is_attention(node):
                self.operands[node] = [arg for arg in node.args[:3] if isinstance(arg, Node)]
            elif is_matmul(node) and self._may_be_product(node, of_data=True):
                self._search(node)

    def _search(self, node: Node) -> None:
        left, right = matmul_operands(node)
        for weights, values in ((left, right), (right, left)):
            visited = list(self.joint.walk_back([weights], self._ends_scores, self._followed))
            exponentials = [n for n in visited if is_exponential(n)]
            matmuls = [n for n in visited if is_matmul(n)]
            # What a weight makes of queries or keys is added to the scores of both, if there are
            # such: relative positions, segments, slopes.
            scores = [n for n in matmuls if self._may_be_product(n)] or [
                n for n in matmuls if self._asks_tokens(n, exponentials, visited)
            ]
            if exponentials and scores:
                queries_and_keys = [factor for n in scores for factor in matmul_operands(n)]
                self.operands[node] = [*queries_and_keys, values]
                self.products |= {node, *scores}
                return

    def _ends_scores(self, node: Node) -> bool:
        if is_matmul(node):
            return node not in self._small
        return is_convolution(node) or is_embedding(node) or is_attention(node)

    def _followed(self, node: Node) -> list[Node]:
        factors = self._operands.factors(node) if node in self._small else None
        sources = node.all_input_nodes if factors is None else [factors.activation]
        # The sum of a softmax is read by every element, and has none of its own.
        return [s for s in sources if carries_gradient(s) and passes(s, node)]

    def _small_weights(self) -> set[Node]:
        """Return the matmuls with a small weight on rows that few weights have.

        Tokens are rows of many weights; those of heads between scores and softmax are not.
        """
        rows: dict[Node, Any] = {}
        weights: dict[Any, int] = defaultdict(int)
        for node in self.joint.nodes:
            factors = self._operands.factors(node) if is_matmul(node) else None
            if factors is not None and not self._operands.is_computed(factors.weight):
                sizes = sizes_of(node, factors)
                rows[node] = sizes.rows
                weights[sizes.rows] += sizes.weights
        most = max(weights.values(), default=0)
        return {node for node, size in rows.items() if 4 * weights[size] <= most}

    def _may_be_product(self, node: Node, *, of_data: bool = False) -> bool:
        """Tell whether a matmul has two factors that each may be queries, keys or values.

        Args:
            node: the matmul.
            of_data: whether one may be data, as the features are that a pool weighs.
        """
        kinds = [self._operands.kind(factor) for factor in matmul_operands(node)]
        if of_data:
            kinds = [
                Kind.ACTIVATION if self._operands.is_fed(factor) and kind is Kind.CONSTANT else kind
                for kind, factor in zip(kinds, matmul_operands(node), strict=True)
            ]
        plain = [
            kind is Kind.WEIGHT and not self._operands.is_computed(factor)
            for kind, factor in zip(kinds, matmul_operands(node), strict=True)
        ]
        return not (Kind.CONSTANT in kinds or any(plain) or kinds == [Kind.WEIGHT, Kind.WEIGHT])

    def _asks_tokens(self, scores: Node, exponentials: list[Node], visited: list[Node]) -> bool:
        """Tell whether a weight is the queries of tokens: whether the softmax runs over these.

        That of a router's scores x·W, or of a kernel that is made for every token, runs over
        columns of W.
        """
        factors = self._operands.factors(scores)
        if factors is None or self._operands.kind(factors.weight) is not Kind.WEIGHT:
            return False
        is_right = factors.weight is matmul_operands(scores)[1]
        rank = len(shape_of(scores) or ())
        columns = {scores: (False,) * (rank - 2) + (not is_right, is_right)}
        for node in sorted(n for n in visited if n > scores):
            marks = [
                spread(node, source, columns[source])
                for source in node.all_input_nodes
                if source in columns
            ]
            if marks:
                columns[node] = tuple(map(any, zip(*marks, strict=True)))
        over = ((exp, _normalised(exp)) for exp in exponentials if exp in columns)
        return any(dim is not None and not columns[exp][dim] for exp, dim in over)


def _normalised(exponential: Node) -> int | None:
    """Return the dimension that a softmax runs over, whole or decomposed."""
    rank = len(shape_of(exponential) or ())
    reduction = exponential
    if op_name(exponential) == "aten::exp":
        sums = [n for n in exponential.users if op_name(n) == "aten::sum"]
        if not sums:
            return None
        reduction = sums[0]
    dims = reduced_dims(reduction, rank)
    return dims.pop() if len(dims) == 1 else None
