"""Which projections of a joint graph are wanted: targets → projections → sites.

    X ─┬─ mm(X, Wqᵀ) ── view ── rotary ──┐
       ├─ mm(X, Wkᵀ) ── view ── rotary ──┤ attention          ← anchor
       └─ mm(X, Wvᵀ) ── view ────────────┘
       └ the site: one compressed input, shared by three projections

From the queries, keys and values of attention we walk back to the matmuls with parameters. Nothing
here changes the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.vocabulary import is_convolution, is_matmul, op_name
from pamm_compile.rules import Target
from pamm_compile.sites.anchors import attention_operands
from pamm_compile.sites.projections import Projection, Projections, ends_projection
from pamm_compile.sites.reasons import Decline, Reason


@dataclass
class Found:
    """The projections that a target holds, and what was declined already while looking."""

    projections: list[Projection]
    declines: list[Decline]


def find_projections(joint: JointGraph, target: Target) -> Found:
    """Find the projections of a joint graph that a target holds.

    Args:
        joint: the graph to read.
        target: "qkv" for the projections that feed attention; "linear" for every matmul of an
            activation with a parameter; a regular expression for those of them whose parameter
            names it matches.

    Returns:
        The projections in graph order.
    """
    finder = _Finder(joint)
    if target == "qkv":
        finder.search_attention()
    else:
        finder.search_linear(target if isinstance(target, re.Pattern) else None)
    return Found(finder.projections(), finder.declines)


class _Finder:
    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.declines: list[Decline] = []
        self._found = Projections(joint)
        self._projections: dict[Node, Projection] = {}

    def projections(self) -> list[Projection]:
        return sorted(self._projections.values(), key=lambda p: p.node)

    # Anchors ---------------------------------------------------------------------------------

    def search_attention(self) -> None:
        anchors = 0
        for node in self.joint.nodes:
            if node in self.joint.backward:
                continue
            operands = attention_operands(self._found, node)
            if operands:
                anchors += 1
                self._collect(operands)
        if not anchors:
            self.declines.append(Decline(Reason.NO_ATTENTION, "attention"))

    # Projections -----------------------------------------------------------------------------

    def search_linear(self, pattern: re.Pattern[str] | None) -> None:
        for node in self.joint.nodes:
            if node in self.joint.backward or not is_matmul(node):
                continue
            projection = self._found.projection(node)
            if projection is None:
                continue
            if pattern is None or any(pattern.search(p.name) for p in projection.parameters):
                self._projections[node] = projection
        if not self._projections:
            self.declines.append(Decline(Reason.NOT_A_PROJECTION, "targets", "no matmul matches"))

    def _collect(self, operands: Iterable[Node]) -> None:
        for node in self.joint.walk_back(operands, ends_projection):
            if is_matmul(node):
                projection = self._found.projection(node)
                if projection is not None:
                    self._add(projection)
            elif is_convolution(node):
                self._decline_once(Reason.NOT_A_PROJECTION, op_name(node))
            elif node.op == "placeholder" and self._is_activation_input(node):
                detail = f"graph input {node.name}"
                self._decline_once(Reason.PROJECTION_IN_ANOTHER_GRAPH, "attention", detail)

    def _add(self, projection: Projection) -> None:
        self._projections[projection.node] = projection
        if projection.narrow_of is not None:
            self._add(projection.narrow_of)

    def _decline_once(self, reason: Reason, what: str, detail: str = "") -> None:
        decline = Decline(reason, what, detail)
        if decline not in self.declines:
            self.declines.append(decline)

    def _is_activation_input(self, node: Node) -> bool:
        # Rotary tables and masks may be inputs too, but nothing differentiates them.
        return node not in self.joint.parameters and self.joint.gradient_of(node) is not None
