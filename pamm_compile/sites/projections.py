"""Projections of a joint graph, the sites they form, and the weight gradients made from these.

A projection is a matmul of an activation with parameters. Projections that read the same elements
in the same order (same base, same chain) form one site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from pamm_compile.graph.joint import (
    Chain,
    JointGraph,
    Parameter,
    matmul_operands,
    strip_transposes,
    value,
)
from pamm_compile.graph.operands import Factors
from pamm_compile.graph.vocabulary import Extra, is_matmul, matmul_extra
from pamm_compile.private import aot
from pamm_compile.sites.reasons import Decline, Reason
from pamm_compile.targets import Use


@dataclass(eq=False)
class Projection:
    """A matmul of an activation with parameters, in the forward pass."""

    node: Node
    input: Node
    """The factor that is an activation, as the matmul reads it."""
    parameters: tuple[Parameter, ...]
    uses: frozenset[Use] = frozenset()
    """What it is for, as far as the graph tells."""
    reason: Reason | None = None
    """Why it stays exact whatever is wanted; None if nothing speaks against it."""
    detail: str = ""
    unclear: str | None = None
    """Why the graph does not tell which of the named targets it belongs to; None if it does."""

    @property
    def name(self) -> str:
        """The parameters' names, joined."""
        return " + ".join(p.name for p in self.parameters)

    @property
    def is_trained(self) -> bool:
        """Whether any of its parameters has a gradient."""
        return any(p.gradient is not None for p in self.parameters)

    def decline(self, reason: Reason, detail: str = "") -> None:
        """Give a reason for staying exact, unless there is one already."""
        if self.reason is None:
            self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Unmatched:
    """Trained weights of a product that is not read as a matmul with a weight."""

    parameters: tuple[Parameter, ...]
    uses: frozenset[Use]
    decline: Decline


@dataclass(frozen=True)
class WeightGradient:
    """A backward matmul over tokens: dZᵀ·X, or Xᵀ·dZ where `transposed`."""

    node: Node
    output_gradient: Node
    """The factor that is not X: [m, b] (so dZᵀ), or [b, m] where `transposed`."""
    transposed: bool
    projection: Projection
    extra: Extra = field(default_factory=Extra)
    """What the matmul computes beside the product."""


@dataclass
class Site:
    """Projections that read one input, and the weight gradients made from it."""

    chain: Chain
    input: Node
    """X as the projections read it: [b, n], or [1, b, n] for batched matmuls."""
    in_columns: bool = False
    """Whether tokens are columns of `input`, as where W @ X is computed: it is Xᵀ then."""
    projections: list[Projection] = field(default_factory=list)
    gradients: list[WeightGradient] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The names of all parameters, in the order the forward pass uses them."""
        return ", ".join(dict.fromkeys(p.name for p in self.projections))

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """Tokens and features."""
        rows, columns = value(self.input).shape[-2:]
        return (columns, rows) if self.in_columns else (rows, columns)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a projection, numbers or symbolic expressions."""

    rows: Any
    """Of the activation, those of a batch together."""
    features: Any
    """What the matmul sums over."""
    outputs: Any

    @property
    def weights(self) -> int:
        """Elements of the weight; 0 where they are symbolic."""
        known = isinstance(self.features, int) and isinstance(self.outputs, int)
        return self.features * self.outputs if known else 0

    @property
    def is_narrow(self) -> bool:
        """Whether the output has half as many features as the input, or fewer."""
        known = isinstance(self.features, int) and isinstance(self.outputs, int)
        return known and 2 * self.outputs <= self.features


def sizes_of(node: Node, factors: Factors) -> Sizes:
    """Return the sizes of a matmul of an activation with a weight."""
    left, _ = matmul_operands(node)
    *batch, rows, features = map(aot.size_key, value(factors.activation).shape)
    *_, outputs = map(aot.size_key, value(node).shape)
    if factors.activation is not left:
        rows, features = features, rows
        outputs = aot.size_key(value(node).shape[-2])
    for size in batch:
        rows = rows * size
    return Sizes(rows, features, outputs)


def group(
    joint: JointGraph, projections: Iterable[Projection], *, every: bool = False
) -> list[Site]:
    """Group projections that read one input, in graph order, with their weight gradients.

        X @ Wᵀ   W @ Xᵀ     tokens are rows of X
        W @ X    Xᵀ @ Wᵀ    tokens are columns of X

    Args:
        joint: the graph.
        projections: any of its projections.
        every: whether the weight gradients of projections with a reason to stay exact are wanted
            too.

    Returns:
        One site for each chain, and arrangement of tokens.
    """
    sites: dict[tuple[Chain, bool], Site] = {}
    for projection in sorted(projections, key=lambda p: p.node):
        stripped, odd = strip_transposes(projection.input)
        chain = joint.chain_of(stripped)
        in_columns = odd == (projection.input is matmul_operands(projection.node)[0])
        site = sites.setdefault((chain, in_columns), Site(chain, stripped, in_columns))
        site.projections.append(projection)
    for site in sites.values():
        site.gradients = _weight_gradients(joint, site, every)
    return list(sites.values())


def _weight_gradients(joint: JointGraph, site: Site, every: bool) -> list[WeightGradient]:
    trained = [p for p in site.projections if p.is_trained and (every or p.reason is None)]
    if not trained:
        return []
    closure, readers = joint.readers(site.chain.base)
    found = []
    for node in sorted(n for n in readers if is_matmul(n)):
        extra = matmul_extra(node)
        left, right = matmul_operands(node)
        for factor, other, is_left in ((left, right, True), (right, left, False)):
            stripped, odd = strip_transposes(factor)
            # Xᵀ on the left or X on the right; else the sum is not over tokens. And with X on
            # both sides, X would be read all the same.
            if (odd != site.in_columns) != is_left or other in closure:
                continue
            if joint.chain_of(stripped) != site.chain:
                continue
            owner = next((p for p in trained if joint.only_reaches(node, p.parameters)), None)
            if owner is not None and extra is not None:
                found.append(WeightGradient(node, other, is_left, owner, extra))
                break
    # In the order of the projections, whatever that of the backward pass.
    order = {p: number for number, p in enumerate(site.projections)}
    return sorted(found, key=lambda g: order[g.projection])
