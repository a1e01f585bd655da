"""What operators do, by name: the tables that reading a joint graph rests on."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from pamm_compile.private import aot

# Rearrange or cast: every element of the result is an element of the operand.
CHAIN = {
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::permute", "aten::t",
    "aten::transpose", "aten::squeeze", "aten::unsqueeze", "aten::expand", "aten::clone",
    "aten::alias", "aten::detach", "aten::contiguous", "aten::_to_copy", "aten::to",
    "prims::convert_element_type", "prims::view_of", "aten::lift_fresh_copy",
}  # fmt: skip

# Of these, what keeps shape, order and dtype; F.dropout(x, 0.0) leaves a clone, for one.
COPIES = {
    "aten::alias", "aten::clone", "aten::contiguous", "aten::detach", "aten::lift_fresh_copy",
    "prims::view_of",
}  # fmt: skip

# A weight's gradient reaches the graph's output through these, and no others.
GRADIENT_PATH = CHAIN | {
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::neg", "aten::sum", "aten::cat",
    "aten::stack", "aten::slice", "aten::slice_scatter", "aten::slice_backward", "aten::select",
    "aten::select_scatter", "aten::select_backward", "aten::split", "aten::split_with_sizes",
    "aten::constant_pad_nd", "aten::unbind", "aten::as_strided", "aten::new_zeros",
    "aten::zeros_like",
}  # fmt: skip

# Read a tensor's shape and none of its elements; the partitioner saves the numbers.
SHAPE_READS = {
    "aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset",
}  # fmt: skip

_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
_CONVOLUTIONS = {"aten::convolution", "aten::_convolution"}
TRANSPOSES = {"aten::t", "aten::permute", "aten::transpose"}

_ATEN_ATTENTION = re.compile(
    r"aten::(_scaled_dot_product_\w*attention\w*|_(flash|efficient|cudnn)_attention_forward)$"
)
# Libraries whose forward takes (q, k, v, …); `register_attention` adds to these.
_LIBRARY_ATTENTION = {
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "torch_attn::_varlen_attn",
    "higher_order::flex_attention",
}
_EXPONENTIALS = {"aten::exp", "aten::_softmax", "aten::_safe_softmax", "aten::softmax"}
_EMBEDDINGS = {"aten::embedding", "aten::_embedding_bag"}
ACTIVATION_SUMS = {"aten::add", "aten::sub"}


def register_attention(operator: str) -> None:
    """Declare an operator to be attention, so that its projections are found.

    Args:
        operator: "namespace::name" of a forward operator whose first three arguments are the
            query, key and value.
    """
    _LIBRARY_ATTENTION.add(operator)


def attention_operators() -> tuple[str, ...]:
    """Return the library operators taken for attention, sorted."""
    return tuple(sorted(_LIBRARY_ATTENTION))


def op_name(node: Node) -> str:
    """Return "namespace::name" of a node's operator, without the overload; "" if it has none."""
    target: Any = node.target
    if isinstance(target, aot.OpOverload):
        return str(target._schema.name)
    if isinstance(target, aot.HigherOrderOperator):
        return f"higher_order::{target.name()}"
    return ""


def is_matmul(node: Node) -> bool:
    """Tell whether a node is mm, addmm, bmm or baddbmm."""
    return op_name(node) in _MATMULS


def is_convolution(node: Node) -> bool:
    """Tell whether a node is a forward convolution."""
    return op_name(node) in _CONVOLUTIONS


def is_embedding(node: Node) -> bool:
    """Tell whether a node looks rows up in a table."""
    return op_name(node) in _EMBEDDINGS


def is_exponential(node: Node) -> bool:
    """Tell whether a node is an exponential or a softmax, as between scores and probabilities."""
    return op_name(node) in _EXPONENTIALS


def is_attention(node: Node) -> bool:
    """Tell whether a node is an attention operator: query, key and value are its first arguments.

    The backward operators are none.
    """
    return is_attention_operator(op_name(node))


def is_attention_operator(name: str) -> bool:
    """Tell whether "namespace::name" is an operator that `is_attention` takes for attention."""
    if name in _LIBRARY_ATTENTION:
        return True
    return _ATEN_ATTENTION.match(name) is not None and "backward" not in name
