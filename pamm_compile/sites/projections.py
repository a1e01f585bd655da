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

from pamm_compile.graph.chains import Chain, matmul_operands, value
from pamm_compile.graph.joint import JointGraph, Parameter
from pamm_compile.graph.operands import Factors
from pamm_compile.graph.rounding import Factor, Product
from pamm_compile.graph.vocabulary import (
    Extra,
    is_fusible,
    is_matmul,
    is_scaled_matmul,
    matmul_extra,
)
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


def factor_of(joint: JointGraph, projection: Projection) -> Factor:
    """Return the input of a projection, before it is rounded and transposed."""
    product = joint.product(projection.node)
    is_left = projection.input is matmul_operands(projection.node)[0]
    return product.left if is_left else product.right


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
    """dZ, in its own precision where the matmul reads it rounded; its last dimension is m, or b
    where `flipped`."""
    flipped: bool
    transposed: bool
    projection: Projection
    extra: Extra = field(default_factory=Extra)
    """What the matmul computes beside the product."""
    nodes: frozenset[Node] = frozenset()
    """What goes with it: the matmul, and what takes out the scales of its factors."""
    codes: Node | None = None
    """X in float8, where the matmul reads it so."""
    scales: Any = 0
    """How many scales these have."""
    is_scaled: bool = False
    """Whether it is multiplied in float8."""


@dataclass
class Site:
    """Projections that read one input, and the weight gradients made from it."""

    chain: Chain
    input: Node
    """X as the projections read it: [b, n], or [1, b, n] for batched matmuls; before it is rounded,
    where they read it so."""
    is_merged: bool = False
    """Whether tokens are all dimensions of `input` but the last."""
    in_columns: bool = False
    """Whether tokens are columns of `input`, as where W @ X is computed: it is Xᵀ then."""
    is_remade: bool = False
    """Whether the backward pass can make X again of what it reads for other gradients."""
    projections: list[Projection] = field(default_factory=list)
    gradients: list[WeightGradient] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The names of all parameters, in the order the forward pass uses them."""
        return ", ".join(dict.fromkeys(p.name for p in self.projections))

    @property
    def shape(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """Tokens and features."""
        *leading, rows, columns = value(self.input).shape
        if self.is_merged:
            for size in leading:
                rows = rows * size
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
        factor = factor_of(joint, projection)
        chain = joint.chain_of_factor(factor)
        in_columns = factor.odd == (projection.input is matmul_operands(projection.node)[0])
        new = Site(chain, factor.node, factor.merged is not None, in_columns)
        site = sites.setdefault((chain, in_columns), new)
        site.projections.append(projection)
    for site in sites.values():
        site.gradients = _weight_gradients(joint, site, every)
        # A matmul's own operand is saved. Of its casts torch saves none that it can make again.
        rounded = any(gradient.codes is not None for gradient in site.gradients)
        site.is_remade = rounded and _is_remade(joint, site.chain.base)
    return list(sites.values())


def _weight_gradients(joint: JointGraph, site: Site, every: bool) -> list[WeightGradient]:
    trained = [p for p in site.projections if p.is_trained and (every or p.reason is None)]
    if not trained:
        return []
    closure, readers = joint.readers(site.chain.base)
    found = []
    for node in sorted(n for n in readers if is_matmul(n)):
        extra, product = matmul_extra(node), joint.product(node)
        for factor, other, is_left in (
            (product.left, product.right, True),
            (product.right, product.left, False),
        ):
            # Xᵀ on the left or X on the right; else the sum is not over tokens. And with X on
            # both sides, X would be read all the same.
            if (factor.odd != site.in_columns) != is_left or other.node in closure:
                continue
            if joint.chain_of_factor(factor) != site.chain:
                continue
            result = product.node
            owner = next((p for p in trained if joint.only_reaches(result, p.parameters)), None)
            if owner is not None and extra is not None:
                found.append(_weight_gradient(joint, product, is_left, owner, extra))
                break
    # In the order of the projections, whatever that of the backward pass.
    order = {p: number for number, p in enumerate(site.projections)}
    return sorted(found, key=lambda g: order[g.projection])


def _is_remade(joint: JointGraph, x: Node) -> bool:
    """Tell whether a value follows, by what fuses, from inputs and from what gradients read."""

    def is_there(node: Node) -> bool:
        return node.op == "placeholder" or (node is not x and bool(joint.readers(node)[1]))

    found = joint.walk_back([x], is_there)
    return all(is_there(node) or is_fusible(node) for node in found)


def _weight_gradient(
    joint: JointGraph, product: Product, transposed: bool, owner: Projection, extra: Extra
) -> WeightGradient:
    x, dz = (product.left, product.right) if transposed else (product.right, product.left)
    codes, scales = None, 0
    if x.rounding is not None:
        codes, scales = joint.first(x.rounding.codes), value(x.rounding.scale).numel()
    # On the left stands dZᵀ, so one transpose is undone; on the right none.
    flipped = dz.odd == transposed
    is_scaled = any(map(is_scaled_matmul, product.nodes))
    return WeightGradient(
        product.node,
        dz.node,
        flipped,
        transposed,
        owner,
        extra,
        product.nodes,
        codes,
        scales,
        is_scaled,
    )
