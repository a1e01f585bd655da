"""Attention in a joint graph: the operators, and what people write in their place."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.fx import Node

from pamm_compile.graph.joint import JointGraph, matmul_operands, shape_of, value
from pamm_compile.graph.operands import Kind, Operands, carries_gradient
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
    exponential over a matmul of queries with keys. Either may be made of parameters alone.

    Args:
        joint: the graph to read.
        operands: what its values are made of.
    """

    def __init__(self, joint: JointGraph, operands: Operands) -> None:
        self.joint, self._operands = joint, operands
        self.operands: dict[Node, list[Node]] = {}
        """Queries, keys and values, by the operator or the last product of each attention."""
        self.products: set[Node] = set()
        """The matmuls of hand-written attention."""
        self._small = self._small_weights()
        for node in joint.nodes:
            if node in joint.backward:
                continue
            if is_attention(node):
                self.operands[node] = [arg for arg in node.args[:3] if isinstance(arg, Node)]
            elif is_matmul(node) and self._may_be_product(node, None):
                self._search(node)

    def _search(self, node: Node) -> None:
        left, right = matmul_operands(node)
        for weights, values in ((left, right), (right, left)):
            visited = list(self.joint.walk_back([weights], self._ends_scores, self._followed))
            exponentials = [n for n in visited if is_exponential(n)]
            matmuls = [n for n in visited if is_matmul(n)]
            scores = [n for n in matmuls if self._may_be_product(n, exponentials)]
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
        return [source for source in sources if carries_gradient(source)]

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

    def _may_be_product(self, node: Node, exponentials: list[Node] | None) -> bool:
        """Tell whether a matmul has two factors that each may be queries, keys or values.

        Args:
            node: the matmul.
            exponentials: what stands behind it, if it may be the product of queries and keys.
        """
        left, right = matmul_operands(node)
        for factor, other in ((left, right), (right, left)):
            kind = self._operands.kind(factor)
            if kind is Kind.CONSTANT:
                return False
            if kind is not Kind.WEIGHT or self._operands.is_computed(factor):
                continue
            if exponentials is None or self._operands.kind(other) is Kind.WEIGHT:
                return False
            # The softmax of a router's scores x·W runs over columns of W. If it runs over tokens,
            # W is queries.
            if not any(self._runs_over(exp, node, factor is right) for exp in exponentials):
                return False
        return not (
            self._operands.kind(left) is Kind.WEIGHT and self._operands.kind(right) is Kind.WEIGHT
        )

    def _runs_over(self, exponential: Node, scores: Node, columns_are_weights: bool) -> bool:
        size = _normalised(exponential)
        shape = shape_of(scores)
        if size is None or shape is None:
            return False
        return bool(size != shape[-1 if columns_are_weights else -2])


def _normalised(exponential: Node) -> Any:
    """Return the size of the dimension that a softmax runs over, whole or decomposed."""
    dims: object
    if op_name(exponential) == "aten::exp":
        sums = [n for n in exponential.users if op_name(n) == "aten::sum" and len(n.args) > 1]
        dims = sums[0].args[1] if sums else None
    else:
        dims = exponential.args[1] if len(exponential.args) > 1 else None
    dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
    shape = shape_of(exponential)
    if not isinstance(dim, int) or shape is None or value(exponential).dim() == 0:
        return None
    return shape[dim]
