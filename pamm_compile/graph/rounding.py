"""Factors of matmuls that were rounded to float8, followed back to what was rounded.

Float8 training multiplies X by a scale s, of its own largest entry, for a row, a column or all of
it, rounds, and divides by s again, behind the matmul or before it:

    X ─┬─ abs ── amax ── … ── s ─────────────────┬──────────────────────────┐
       └─ [float32] ── s X ── clamp ── float8 ───┴─ _scaled_mm(…, 1 / s)    │
                                         └── [float32] ── divided by s ─────┴─ mm     emulated

Either way a matmul of X is computed, with an error. Nothing is taken for one whose scales are not
seen to cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from pamm_compile.graph.chains import (
    is_chain_step,
    is_transpose,
    matmul_operands,
    shape_of,
    strip_transposes,
    value,
)
from pamm_compile.graph.vocabulary import (
    CASTS,
    CLAMPS,
    TRANSPOSES,
    VIEWS,
    fills_with,
    is_matmul,
    is_scaled_matmul,
    op_name,
    schema_arguments,
)

_FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}


@dataclass(frozen=True)
class Rounding:
    """A value that is scaled and rounded to float8."""

    source: Node
    """The value, in its own dtype."""
    codes: Node
    """In float8: scale · source, rounded."""
    scale: Node


@dataclass(frozen=True)
class Factor:
    """What a matmul multiplies, without the transposes and the rounding on the way."""

    node: Node
    odd: bool = False
    """Whether the matmul reads it transposed."""
    merged: Node | None = None
    """A node of the shape that the matmul reads, where it reads the leading dimensions as one."""
    rounding: Rounding | None = None
    """None where it is read as it is."""


@dataclass(frozen=True)
class Product:
    """A matmul, with what takes the scales of its factors out again."""

    node: Node
    """The result."""
    left: Factor
    right: Factor
    nodes: frozenset[Node]
    """All that belongs to it: the matmul, and what reads the scales behind it."""


def product_of(matmul: Node) -> Product:
    """Return what a matmul multiplies, its factors followed back to before they were rounded."""
    left, right = matmul_operands(matmul)
    if not is_scaled_matmul(matmul):
        return Product(matmul, _emulated(left), _emulated(right), frozenset([matmul]))
    node, inverses, nodes = _scales(matmul)
    return Product(node, _scaled(left, inverses[0]), _scaled(right, inverses[1]), nodes)


def is_float8(node: Node) -> bool:
    """Tell whether a node is a tensor of float8."""
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dtype in _FLOAT8


def _plain(operand: Node) -> Factor:
    return Factor(*strip_transposes(operand))


def rounding_at(codes: Node) -> Rounding | None:
    """Return what a cast to float8 rounds, and its scale; None if that is not seen."""
    if op_name(codes) not in CASTS or not is_float8(codes):
        return None
    scaled = codes.args[0]
    while isinstance(scaled, Node) and op_name(scaled) in CLAMPS:
        scaled = scaled.args[0]
    if not isinstance(scaled, Node) or op_name(scaled) != "aten::mul":
        return None
    source, scale = scaled.args
    if not (isinstance(source, Node) and isinstance(scale, Node)):
        return None
    if shape_of(source) != shape_of(codes):
        return None
    return Rounding(_unwidened(source), codes, scale)


def _unwidened(node: Node) -> Node:
    """Return what was cast to a wider dtype, which loses nothing."""
    source = node.args[0] if op_name(node) in CASTS else None
    if isinstance(source, Node):
        before, after = value(source).dtype, value(node).dtype
        if before.is_floating_point and before.itemsize < after.itemsize and not is_float8(source):
            return source
    return node


def _emulated(operand: Node) -> Factor:
    """Return a factor that was divided by its scale before the matmul, if it was."""
    outer: list[Node] = []
    node = operand
    while is_chain_step(node) and isinstance(node.args[0], Node):
        if value(node).dtype != value(node.args[0]).dtype:
            return _plain(operand)
        outer.insert(0, node)
        node = node.args[0]
    if op_name(node) != "aten::div" or not all(isinstance(arg, Node) for arg in node.args):
        return _plain(operand)
    numerator, denominator = node.all_input_nodes
    found = _codes_behind(numerator)
    if found is None:
        return _plain(operand)
    rounding, moves = found
    of_scale = _moves_from(rounding.scale, denominator)
    if of_scale is None or not _same_order(rounding.scale, of_scale, moves):
        return _plain(operand)
    return _moved(rounding, [*moves, *outer]) or _plain(operand)


def _scaled(operand: Node, inverse: Node | None) -> Factor:
    """Return a factor of a scaled matmul, if it is divided by the scale it was multiplied with."""
    found = _codes_behind(operand)
    if found is None or inverse is None:
        return _plain(operand)
    rounding, moves = found
    of_scale = _moves_from(rounding.scale, inverse)
    if of_scale is None or not _same_order(rounding.scale, of_scale, moves):
        return _plain(operand)
    return _moved(rounding, moves) or _plain(operand)


def _scales(matmul: Node) -> tuple[Node, tuple[Node | None, Node | None], frozenset[Node]]:
    """Return where a scaled matmul is divided by its scales, these, and all that does so.

    _scaled_mm(a, b, 1 / s, 1 / t)
    _scaled_mm(a, b, 1, 1) * (1 / s * 1 / t)       what torchao writes where it is faster
    """
    given = schema_arguments(matmul)
    alone = (matmul, (None, None), frozenset([matmul]))
    if given.get("scale_result") is not None:
        return alone
    scales = (given["scale_a"], given["scale_b"])
    if not all(fills_with(scale, 1) for scale in scales):
        return matmul, (_inverted(scales[0]), _inverted(scales[1])), frozenset([matmul])
    users = list(matmul.users)
    if len(users) != 1 or op_name(users[0]) != "aten::mul" or users[0].args[0] is not matmul:
        return alone
    both = users[0].args[1]
    if not isinstance(both, Node) or op_name(both) != "aten::mul" or len(both.users) != 1:
        return alone
    left, right = both.args
    return users[0], (_inverted(left), _inverted(right)), frozenset([matmul, both, users[0]])


def _inverted(node: Any) -> Node | None:
    """Return what a value is one over; None if it is not."""
    while isinstance(node, Node) and is_chain_step(node):
        node = node.args[0]
    if not isinstance(node, Node) or op_name(node) != "aten::reciprocal":
        return None
    return node.all_input_nodes[0]


def _codes_behind(node: Node) -> tuple[Rounding, list[Node]] | None:
    """Return the rounding behind views and casts, and these in order."""
    moves: list[Node] = []
    while is_chain_step(node) and isinstance(node.args[0], Node):
        if is_float8(node) and not is_float8(node.args[0]):
            rounding = rounding_at(node)
            return None if rounding is None else (rounding, moves)
        moves.insert(0, node)
        node = node.args[0]
    return None


def _moves_from(scale: Node, node: Node) -> list[Node] | None:
    """Return the views between a scale and a node; None if it is not made of that scale."""
    moves: list[Node] = []
    while node is not scale:
        if not is_chain_step(node) or not isinstance(node.args[0], Node):
            return None
        moves.insert(0, node)
        node = node.args[0]
    return moves


def _same_order(scale: Node, of_scale: Iterable[Node], of_codes: Iterable[Node]) -> bool:
    """Tell whether scales of rows or columns are still those of the same rows or columns."""
    if all(size == 1 for size in shape_of(scale) or ()):
        return True
    return _swaps(of_scale) == _swaps(of_codes)


def _swaps(moves: Iterable[Node]) -> int:
    return sum(op_name(node) in TRANSPOSES for node in moves) % 2


def _moved(rounding: Rounding, moves: Iterable[Node]) -> Factor | None:
    """Return a rounded factor as a matmul reads it; None if its elements are in another order."""
    shape, odd, merged = shape_of(rounding.source), False, None
    assert shape is not None
    for node in moves:
        after = shape_of(node)
        assert after is not None
        if op_name(node) in TRANSPOSES:
            if len(after) != 2 or not is_transpose(node):
                return None
            odd = not odd
        elif after != shape:
            is_merge = op_name(node) in VIEWS and len(after) == 2 and after[-1] == shape[-1]
            if odd or not is_merge:
                return None
            merged = node
        shape = after
    if merged is not None:
        return Factor(rounding.source, odd, merged, rounding)
    source, swapped = strip_transposes(rounding.source)
    return Factor(source, odd != swapped, None, rounding)


def inside(rounding: Rounding, is_source: Callable[[Node], bool]) -> set[Node]:
    """Return all that a rounding computes of a value, up to what matmuls read.

    Args:
        rounding: of the value.
        is_source: tells the nodes that are the value itself, cast or rearranged.

    Returns:
        The scale and what it is made of, as far as the value enters, the codes, and what either is
        rearranged, cast or undone to.
    """
    found = _between(is_source, [rounding.codes, rounding.scale])
    stack = [rounding.codes, rounding.scale]
    while stack:
        for user in stack.pop().users:
            undone = op_name(user) in ("aten::reciprocal", "aten::div") and all(
                source in found for source in user.all_input_nodes
            )
            if user not in found and (is_chain_step(user) or undone):
                found.add(user)
                stack.append(user)
    return found


def _between(is_source: Callable[[Node], bool], ends: Iterable[Node]) -> set[Node]:
    """Return what lies between a value and what is computed from it, without the value."""
    seen: set[Node] = set()
    made: set[Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in seen or node in made:
            continue
        if is_source(node):
            made.add(node)
            continue
        seen.add(node)
        stack += [] if is_matmul(node) else node.all_input_nodes
    sources = set(made)
    for node in sorted(seen):
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    return made - sources
