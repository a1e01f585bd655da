"""Attention in a joint graph: the operators, and what people write in their place."""

from __future__ import annotations

from torch.fx import Node

from pamm_compile.graph.joint import matmul_operands
from pamm_compile.graph.vocabulary import (
    is_attention,
    is_convolution,
    is_embedding,
    is_exponential,
    is_matmul,
)
from pamm_compile.sites.projections import Projections


def attention_operands(projections: Projections, node: Node) -> list[Node]:
    """Return what a node attends with: its queries, keys and values.

    Hand-written attention is a matmul whose left factor comes from an exponential over a matmul of
    two activations; the factors of all of these are queries and keys.

    Args:
        projections: of the graph.
        node: of the forward pass.

    Returns:
        The operands; none if the node is no attention.
    """
    if is_attention(node):
        return [arg for arg in node.args[:3] if isinstance(arg, Node)]
    if is_matmul(node) and projections.operands(node) is None:
        left, right = matmul_operands(node)
        for weights, values in ((left, right), (right, left)):
            scores = _scores(projections, weights)
            if scores:
                return [*(op for s in scores for op in matmul_operands(s)), values]
    return []


def _scores(projections: Projections, weights: Node) -> list[Node]:
    """Return the score matmuls under an attention probability; [] if it is none."""
    visited = list(projections.joint.walk_back([weights], _ends_scores))
    if not any(is_exponential(node) for node in visited):
        return []
    return [n for n in visited if is_matmul(n) and projections.operands(n) is None]


def _ends_scores(node: Node) -> bool:
    return is_matmul(node) or is_convolution(node) or is_embedding(node)
