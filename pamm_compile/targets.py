"""The named targets of rules: one table, which the parser, errors, reports and the docs read.

`sites/roles.py` says of every projection what it is for; a target is a name for some of these uses.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Use(enum.Enum):
    """What a projection is for. The graph tells; see `sites/roles.py`."""

    FEEDS_ATTENTION = enum.auto()
    """Its output is queries, keys or values."""
    READS_ATTENTION = enum.auto()
    """Its input is the output of attention, or its output is multiplied with that."""
    WRITES_STREAM = enum.auto()
    """Its output goes to the residual stream, by itself or through other projections."""
    MAKES_OUTPUT = enum.auto()
    """Its output leaves the graph, behind a residual stream."""


@dataclass(frozen=True)
class Target:
    """A name for projections of some uses."""

    holds: str
    """What it holds, as the docs say it."""
    uses: frozenset[Use] | None
    """A projection of any of these belongs to it; None: every projection does."""

    def has(self, uses: Iterable[Use]) -> bool:
        """Tell whether a projection of these uses belongs to it."""
        return self.uses is None or not self.uses.isdisjoint(uses)


TARGETS = {
    "qkv": Target(
        "the projections whose outputs are queries, keys and values",
        frozenset({Use.FEEDS_ATTENTION}),
    ),
    "attention": Target(
        "those of `qkv`, the output projection, and a gate on attention's output",
        frozenset({Use.FEEDS_ATTENTION, Use.READS_ATTENTION}),
    ),
    "mlp": Target(
        "projections that write to the residual stream, directly or through others; experts too",
        frozenset({Use.WRITES_STREAM}),
    ),
    "head": Target(
        "projections behind a residual stream whose output leaves the graph",
        frozenset({Use.MAKES_OUTPUT}),
    ),
    "linear": Target("every matmul of an activation with a parameter", None),
}
"""Every named target, the narrower before those that hold it."""


def narrowest(uses: Iterable[Use]) -> str:
    """Return the first target that projections of these uses belong to."""
    uses = frozenset(uses)
    return next(name for name, target in TARGETS.items() if target.has(uses))
