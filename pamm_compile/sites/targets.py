"""Which projections of a joint graph a target holds.

    X ─┬─ mm(X, Wqᵀ) ── view ── rotary ──┐
       ├─ mm(X, Wkᵀ) ── view ── rotary ──┤ attention ── mm(…, Woᵀ) ── (+)
       └─ mm(X, Wvᵀ) ── view ────────────┘
       └ a site: one compressed input, shared by three projections

Every matmul of an activation with a parameter is a projection, and every projection is told which
named targets it belongs to, or why the graph does not say: nothing is left out by construction.
Nothing here changes the graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pamm_compile.graph.joint import JointGraph
from pamm_compile.rules import Target
from pamm_compile.sites.projections import Projection, Unmatched
from pamm_compile.sites.reasons import Decline, Reason
from pamm_compile.sites.roles import Roles
from pamm_compile.targets import TARGETS, Use


@dataclass(frozen=True)
class Match:
    """Everything found in one joint graph."""

    projections: list[Projection]
    """Every projection, in graph order, with the named targets it belongs to."""
    unmatched: list[Unmatched]
    """Weights of operators that are not read as matmuls."""
    notes: list[Decline]
    """What is to be said of the attention in the graph."""

    def declines_of(self, target: Target) -> list[Decline]:
        """Return what a target holds that is no projection, and what is to be said of it."""
        found = [each.decline for each in self.unmatched if holds(target, each)]
        if _is_of_attention(target):
            found = [*self.notes, *found]
        if not found and not any(holds(target, each) for each in self.projections):
            found = [Decline(Reason.NOT_A_PROJECTION, "targets", "no matmul matches")]
        return found


def classify(joint: JointGraph) -> Match:
    """Find every projection of a joint graph and tell what it is for.

    Args:
        joint: the graph to read.

    Returns:
        The projections with their named targets and, of those that stay exact whatever is wanted,
        the reason.
    """
    roles = Roles(joint)
    return Match(roles.projections, roles.unmatched, roles.notes)


def holds(target: Target, found: Projection | Unmatched) -> bool:
    """Tell whether a target holds a projection.

    Args:
        target: a name in `targets.TARGETS`, or a regular expression for those whose parameter
            names it matches.
        found: what was found in a graph.
    """
    if isinstance(target, re.Pattern):
        return any(target.search(parameter.name) for parameter in found.parameters)
    return TARGETS[target].has(found.uses)


def _is_of_attention(target: Target) -> bool:
    """Tell whether a target holds what feeds attention, and not whatever there is."""
    uses = TARGETS[target].uses if isinstance(target, str) else None
    return uses is not None and Use.FEEDS_ATTENTION in uses
