"""Which projections read a low-rank factor: the output of a narrow one, with nothing but linear
steps between.

    X ── A ── dropout ── scale ── B      B reads X·Aᵀ: of X's many features it sees a few sums
    X ── A ── relu ── B                  a layer of its own
"""

from __future__ import annotations

from torch.fx import Node

from pamm_compile.graph.operands import Kind, passes
from pamm_compile.graph.vocabulary import (
    CHAIN,
    is_embedding,
    is_getitem,
    is_matmul,
    op_name,
)
from pamm_compile.sites.flow import Flow

_PARTS = CHAIN | {
    "aten::slice", "aten::select", "aten::split", "aten::split_with_sizes", "aten::unbind",
    "aten::narrow", "aten::native_dropout",
}  # fmt: skip
_NORMS = {"aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm"}
_SUMS = {"aten::add", "aten::sub", "aten::neg"}
_PRODUCTS = {"aten::mul", "aten::div"}


class LowRank:
    """Finds what a value is a linear function of.

    Args:
        flow: the products of a forward pass.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def sources(self, value: Node, *, normed: bool = False) -> frozenset[Node]:
        """Return the stops that a value is a linear function of, itself if it is one.

        Args:
            value: an activation.
            normed: whether a norm may stand between, which scales every row by a number.

        Returns:
            The stops; none if anything else stands between.
        """
        found, stack, seen = set(), [value], {value}
        while stack:
            node = stack.pop()
            if self._flow.is_stop(node):
                found.add(node)
                continue
            operands = self._linear_in(node, normed)
            if not operands:
                return frozenset()
            stack += [operand for operand in operands if operand not in seen]
            seen.update(operands)
        return frozenset(found)

    def _linear_in(self, node: Node, normed: bool) -> list[Node]:
        """Return the activations that a value is linear in; none if it is not."""
        name = op_name(node)
        active = [
            source
            for source in self._flow.followed(node)
            if self._flow.operands.kind(source) in (Kind.ACTIVATION, Kind.MIXED)
        ]
        own = [source for source in active if passes(source, node)]
        if name in _PRODUCTS:
            # Statistics of a norm are numbers for many elements; a square has one operand twice.
            wanted = own if normed else active
            places = [place for place, arg in enumerate(node.args[:2]) if arg in wanted]
            return wanted if places == [0] or (places == [1] and name == "aten::mul") else []
        if name in _SUMS:
            return own if normed else active
        if normed and name in _NORMS:
            return active[:1]
        if name in _PARTS or is_getitem(node) or is_matmul(node):
            return active
        return []

    def reads_stream(self, node: Node) -> bool:
        """Tell whether a projection reads a residual stream, or what begins one."""
        flow = self._flow
        behind = {stop for value in flow.inputs(node) for stop in flow.through(value)}
        streams = flow.residual | flow.starts
        return any(stop in streams or is_embedding(stop) for stop in behind)
