"""Along which dimensions of a value an operand of it varies.

    weight [m, n]          (True, True)
    weight[None] * x       (False, True, True)      of [b, m, n]
    scale [h, 1, d] * q    (True, False, True)      of [h, t, d]: no matrix of its own

Where an operator is not known, along all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from pamm_compile.graph.chains import shape_of
from pamm_compile.graph.operands import tensors_of
from pamm_compile.graph.vocabulary import (
    CHAIN,
    REDUCTIONS,
    is_exponential,
    is_getitem,
    op_name,
)
from pamm_compile.private import aot

Spread = tuple[bool, ...]
"""One entry a dimension."""

_KEEP = {
    "aten::slice", "aten::narrow", "aten::split", "aten::split_with_sizes", "aten::flip",
    "aten::roll", "aten::constant_pad_nd", "aten::tril", "aten::triu", "aten::cumsum",
    "aten::native_dropout", "aten::native_layer_norm", "aten::_fused_rms_norm",
}  # fmt: skip


def everywhere(node: Node) -> Spread:
    """Return the spread of a value over itself: all dimensions but those of one element."""
    return tuple(size != 1 for size in _shape(node))


def spread(node: Node, source: Node, given: Spread) -> Spread:
    """Return along which dimensions of a value something varies that its operand is made of.

    Args:
        node: the value.
        source: the operand.
        given: along which dimensions of the operand it does.

    Returns:
        One entry for each dimension of `node`, True where in doubt.
    """
    marks = _spread(node, source, given)
    return tuple(map(all, zip(marks, everywhere(node), strict=True)))


def _spread(node: Node, source: Node, given: Spread) -> Spread:
    name, before, after = op_name(node), _shape(source), _shape(node)
    rank = len(before)
    if len(given) != rank:
        return everywhere(node)
    if name == "aten::permute":
        order: Any = node.args[1]
        return tuple(given[int(dim) % rank] for dim in order)
    if name in ("aten::t", "aten::transpose"):
        first, second = (0, 1) if name == "aten::t" else (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        found = list(given)
        if rank > 1:
            found[first], found[second] = given[second], given[first]
        return tuple(found)
    if name == "aten::expand" or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return (False,) * (len(after) - rank) + given
    if name in CHAIN:
        return _regrouped(before, given, after)
    if name in _KEEP or is_getitem(node) or is_exponential(node):
        return given if len(after) == rank else everywhere(node)
    if name == "aten::cat":
        dim = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
        return tuple(mark or number == dim for number, mark in enumerate(given))
    if name == "aten::select":
        dim = int(node.args[1]) % rank  # type: ignore[arg-type]
        return given[:dim] + given[dim + 1 :]
    if name in REDUCTIONS:
        return _reduced(node, given)
    return everywhere(node)


def reduced_dims(node: Node, rank: int) -> set[int]:
    """Return the dimensions that a reduction runs over, as numbers from 0 on."""
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if dims is None or dims == []:
        return set(range(rank))
    return {int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


def _reduced(node: Node, given: Spread) -> Spread:
    dims = reduced_dims(node, len(given))
    keeps = len(_shape(node)) == len(given)
    marks = ((number, mark) for number, mark in enumerate(given))
    return tuple(
        mark and number not in dims for number, mark in marks if keeps or number not in dims
    )


def _regrouped(before: Sequence[Any], given: Spread, after: Sequence[Any]) -> Spread:
    """Follow a spread through a view: dimensions that are split or merged share their marks."""
    # Sizes of one hold nothing, wherever they stand.
    left = [(size, mark) for size, mark in zip(before, given, strict=True) if size != 1]
    right = [place for place, size in enumerate(after) if size != 1]
    found = [False] * len(after)
    while left and right:
        size, mark = left.pop()
        places = [right.pop()]
        other = after[places[0]]
        while size != other and (left or right):
            shorter = bool(size < other) if _known(size, other) else len(left) > len(right)
            if left and (shorter or not right):
                more, also = left.pop()
                size, mark = size * more, mark or also
            else:
                places.append(right.pop())
                other = other * after[places[-1]]
        for place in places:
            found[place] = mark
    return tuple(found)


def _known(*sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _shape(node: Node) -> tuple[Any, ...]:
    shape = shape_of(node)
    if shape is not None:
        return shape
    # Of several results, the first is what the others are made beside.
    return tuple(aot.size_key(size) for t in tensors_of(node)[:1] for size in t.shape)
