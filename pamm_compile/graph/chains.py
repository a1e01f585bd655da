"""Values, and the chains of views and casts that they go through.

A *value chain* is a node followed back through operations that only rearrange or cast its
elements; the node where that ends is the chain's base:

    mul_4 [B,S,n] ── convert_element_type ── view [b,n] ── mm
    └ base                └──────── chain ───────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from pamm_compile.graph.vocabulary import CHAIN, COPIES, TRANSPOSES, VIEWS, is_matmul, op_name
from pamm_compile.private import aot


def matmul_operands(node: Node) -> tuple[Node, Node]:
    """Return the left and right factor of a matmul, leaving out the addend of addmm and baddbmm."""
    assert is_matmul(node), node
    factors = node.args[1:3] if op_name(node) in ("aten::addmm", "aten::baddbmm") else node.args[:2]
    left, right = factors
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return left, right


def value(node: Node) -> Any:
    """Return the fake tensor (or symbolic number) that a node stands for."""
    return node.meta.get("val")


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """Return the shape of a tensor, comparable without a guard; None for anything else."""
    val = value(node)
    return tuple(map(aot.size_key, val.shape)) if isinstance(val, torch.Tensor) else None


def is_transpose(node: Node) -> bool:
    """Tell whether a node swaps the last two dimensions and leaves the others in place."""
    name, val = op_name(node), value(node)
    if name not in TRANSPOSES or not isinstance(val, torch.Tensor):
        return False
    rank = val.dim()
    if name == "aten::t":
        return rank == 2
    if name == "aten::permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]
    return rank >= 2 and {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]


def strip_transposes(node: Node) -> tuple[Node, bool]:
    """Follow a node back through transposes of its last two dimensions.

    Returns:
        The first node that is no such transpose, and whether their number was odd.
    """
    odd = False
    while is_transpose(node):
        node, odd = node.all_input_nodes[0], not odd
    return node, odd


@dataclass(frozen=True)
class Chain:
    """A value chain: where it starts and, in order, what was done to the elements."""

    base: Node
    steps: tuple[tuple[Any, ...], ...]


def chain_of(node: Node) -> Chain:
    """Follow a node back through operations that only rearrange or cast its elements.

    Returns:
        The base and the steps from it to `node`, comparable between nodes.
    """
    steps: list[tuple[Any, ...]] = []
    while op_name(node) in CHAIN:
        source = node.args[0]
        if not isinstance(source, Node):
            break
        # A copy holds what its source does: without it, equal chains compare so.
        if _is_view(node):
            if shape_of(node) != shape_of(source):
                steps.append(view_step(node))
        elif op_name(node) not in COPIES:
            options = tuple(sorted(node.kwargs.items()))
            steps.append((op_name(node), _freeze(node.args[1:]), _freeze(options)))
        node = source
    return Chain(node, tuple(reversed(steps)))


def view_step(node: Node) -> tuple[Any, ...]:
    """Return the step of a chain that gives it a node's shape, however that is written."""
    return ("aten::view", shape_of(node))


def _is_view(node: Node) -> bool:
    # Views as another dtype have this name too.
    return op_name(node) in VIEWS and not isinstance(node.args[1], torch.dtype)


def _freeze(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return tuple(_freeze(item) for item in arg)
    return arg


def is_chain_step(node: Node) -> bool:
    """Tell whether a node only rearranges or casts the elements of its operand."""
    return op_name(node) in CHAIN
