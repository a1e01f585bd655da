"""What operators do, by name: the tables that reading a joint graph rests on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
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

# Of CHAIN, what regroups dimensions, and what changes the dtype alone.
VIEWS = {"aten::view", "aten::_unsafe_view", "aten::reshape"}
CASTS = {"aten::_to_copy", "aten::to", "prims::convert_element_type"}

# Keep every element within bounds, which a cast to float8 does by itself.
CLAMPS = {"aten::clamp", "aten::clamp_min", "aten::clamp_max"}

# A weight's gradient reaches the graph's output through these, and no others.
GRADIENT_PATH = CHAIN | {
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::neg", "aten::sum", "aten::cat",
    "aten::stack", "aten::slice", "aten::slice_scatter", "aten::slice_backward", "aten::select",
    "aten::select_scatter", "aten::select_backward", "aten::split", "aten::split_with_sizes",
    "aten::constant_pad_nd", "aten::unbind", "aten::as_strided", "aten::new_zeros",
    "aten::zeros_like",
}  # fmt: skip

# Of these, what neither scales nor shifts: a gradient behind them is a sum of what is before them.
SUMMED = CHAIN | {
    "aten::add", "aten::sum", "aten::cat", "aten::stack", "aten::slice", "aten::slice_scatter",
    "aten::slice_backward", "aten::select", "aten::select_scatter", "aten::select_backward",
    "aten::split", "aten::split_with_sizes", "aten::constant_pad_nd", "aten::unbind",
    "aten::index_put", "aten::_unsafe_index_put", "aten::index_add", "aten::scatter_add",
    "aten::embedding_dense_backward",
}  # fmt: skip

# Read a tensor's shape and none of its elements; the partitioner saves the numbers.
SHAPE_READS = {
    "aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset",
}  # fmt: skip

# Forms tensors by moving elements of others, without changing any.
MOVES = CHAIN | {
    "aten::cat", "aten::stack", "aten::slice", "aten::select", "aten::split",
    "aten::split_with_sizes", "aten::unbind", "aten::constant_pad_nd", "aten::narrow",
    "aten::as_strided", "aten::flip", "aten::roll", "aten::repeat", "aten::unfold",
    "aten::tril", "aten::triu", "aten::diagonal",
}  # fmt: skip

# Pick elements of the first operand by the numbers in the others.
PICKS = {
    "aten::index", "aten::_unsafe_index", "aten::index_select", "aten::gather", "aten::take",
    "aten::take_along_dim", "aten::masked_select", "aten::embedding",
}  # fmt: skip

# Run over the dimensions that their second argument names, or over all.
REDUCTIONS = {
    "aten::sum", "aten::mean", "aten::nansum", "aten::amax", "aten::amin", "aten::var",
    "aten::std", "aten::prod", "aten::logsumexp", "aten::linalg_vector_norm", "aten::var_mean",
}  # fmt: skip

# Make a tensor from the shape of another, and none of its elements.
_SHAPED_LIKE = {
    "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty", "aten::zeros_like",
    "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::new_empty_strided",
    "aten::rand_like", "aten::randn_like", "aten::bernoulli",
}  # fmt: skip

# Sums, by the places of the summands among the arguments. One that is added to some rows or
# columns of the first (index_add and the like) counts as a summand of all.
SUMS = {
    "aten::add": (0, 1), "aten::sub": (0, 1), "aten::rsub": (0, 1), "aten::addcmul": (0, 1, 2),
    "aten::addcdiv": (0, 1, 2), "aten::lerp": (0, 1, 2), "aten::index_add": (0, 3),
    "aten::scatter_add": (0, 3), "aten::scatter_reduce": (0, 3), "aten::index_put": (0, 2),
    "aten::_unsafe_index_put": (0, 2), "prims::fma": (0, 1, 2),
}  # fmt: skip
_PARTIAL_SUMS = {
    "aten::index_add", "aten::scatter_add", "aten::scatter_reduce", "aten::index_put",
    "aten::_unsafe_index_put",
}  # fmt: skip
# Of these, what may replace elements too: the argument that tells, and what it says of a sum.
_SUMS_IF = {
    "aten::index_put": (3, True), "aten::_unsafe_index_put": (3, True),
    "aten::scatter_reduce": (4, "sum"),
}  # fmt: skip

# Multiply the elements of one operand with those of another, or add these.
SHIFTS = {*SUMS, "aten::mul", "aten::div", "aten::where", "aten::pow", "aten::atan2"}

_FOREACH_SUMS = {
    "aten::_foreach_add", "aten::_foreach_sub", "aten::_foreach_addcmul", "aten::_foreach_addcdiv",
    "aten::_foreach_lerp",
}  # fmt: skip
_REDUCED_SUMS = {"aten::sum", "aten::mean", "aten::nansum"}

_SCALED_MATMUL = "aten::_scaled_mm"
_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", _SCALED_MATMUL}
# "dtype" asks for another dtype of the result; those with `out` write to an argument.
_MATMUL_OVERLOADS = {"default", "dtype"}
# Other products with a weight, which are not read as matmuls.
_OTHER_PRODUCTS = re.compile(
    r"aten::(_?scaled_mm\w*|_?(scaled_)?grouped_mm|_scaled_grouped_mm\w*|addbmm|mv|addmv|_int_mm"
    r"|_weight_int\w+|linear|mkldnn_linear|bilinear|_trilinear|matmul|_sparse\w*mm|mm|bmm|addmm"
    r"|baddbmm|_?convolution|einsum|tensordot|_cdist_forward)$"
)
# Mix tokens, as attention does, by scans or transforms.
_SCANS = re.compile(
    r"aten::(cumsum|cumprod|logcumsumexp|_fft_\w+)$|higher_order::(associative_scan|scan|while_loop)$"
)
_FULL = {"aten::full", "aten::new_full", "aten::full_like"}
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
    """Tell whether a node is mm, addmm, bmm, baddbmm or _scaled_mm, and returns its result."""
    if op_name(node) not in _MATMULS:
        return False
    target: Any = node.target
    return target._overloadname in _MATMUL_OVERLOADS


def is_scaled_matmul(node: Node) -> bool:
    """Tell whether a node is a matmul of factors that it divides by scales."""
    return op_name(node) == _SCALED_MATMUL and is_matmul(node)


def schema_arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of an operator by name, as far as they are given."""
    target: Any = node.target
    names = (argument.name for argument in target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def fills_with(node: Any, number: float) -> bool:
    """Tell whether a node is a tensor of one number, whatever its shape."""
    if not isinstance(node, Node):
        return False
    if op_name(node) in ("aten::ones", "aten::new_ones", "aten::ones_like"):
        return number == 1
    fill = schema_arguments(node).get("fill_value") if op_name(node) in _FULL else None
    return fill is not None and fill == number


def is_other_product(node: Node) -> bool:
    """Tell whether a node multiplies by a weight otherwise: scaled, grouped, or a convolution."""
    return not is_matmul(node) and _OTHER_PRODUCTS.match(op_name(node)) is not None


def is_foreign(node: Node) -> bool:
    """Tell whether a node is an operator of a library, a Triton kernel, or of higher order."""
    namespace = op_name(node).partition("::")[0]
    return namespace not in ("", "aten", "prims", "prim", "_c10d_functional", "inductor_prims")


def is_fusible(node: Node) -> bool:
    """Tell whether a node is computed along with others: elementwise, a reduction, or a view."""
    tags = getattr(node.target, "tags", ())
    moved = op_name(node) in MOVES or op_name(node) in REDUCTIONS or is_getitem(node)
    return moved or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags)


def is_scan(node: Node) -> bool:
    """Tell whether a node mixes tokens by a scan or a Fourier transform."""
    return _SCANS.match(op_name(node)) is not None


def is_detach(node: Node) -> bool:
    """Tell whether a node cuts the way of gradients; decomposed, it is an alias."""
    if op_name(node) == "aten::alias":
        return str(node.meta.get("original_aten", "")).startswith("aten.detach")
    return op_name(node) == "aten::detach"


def is_getitem(node: Node) -> bool:
    """Tell whether a node picks one of several results of another."""
    return getattr(node.target, "__name__", "") == "getitem"


def is_shaped_like(node: Node) -> bool:
    """Tell whether a node depends on the shapes of its operands alone."""
    return op_name(node) in _SHAPED_LIKE


def is_partial_sum(node: Node) -> bool:
    """Tell whether a node, if it is a sum, adds to some elements of its first operand alone."""
    return op_name(node) in _PARTIAL_SUMS


def summands(node: Node) -> list[Node]:
    """Return what a node sums, however the sum is written; nothing if it is none.

        add(x, y)   addcmul(x, gate, y)   lerp(x, y, weight)   index_add(x, 0, rows, y)
        sum(stack([x, y]), 0)   mean(cat([x, y]), 0)   _foreach_add([x], [y])[0]

    Args:
        node: any.

    Returns:
        The operands, of products within a sum all factors.
    """
    name = op_name(node)
    if name in _SUMS_IF:
        place, wanted = _SUMS_IF[name]
        if len(node.args) <= place or node.args[place] != wanted:
            return []
    if name in SUMS:
        return [a for i in SUMS[name] if i < len(node.args) and isinstance(a := node.args[i], Node)]
    if name in _REDUCED_SUMS:
        return _stacked(node.args[0])
    if is_getitem(node) and op_name(node.all_input_nodes[0]) in _FOREACH_SUMS:
        lists = node.all_input_nodes[0].args
        number: Any = node.args[1]
        return [
            a
            for each in lists
            if isinstance(each, list | tuple) and isinstance(a := each[number], Node)
        ]
    return []


def _stacked(operand: Any) -> list[Node]:
    """Return the tensors that were stacked or concatenated to an operand."""
    while isinstance(operand, Node) and op_name(operand) in CHAIN:
        operand = operand.args[0]
    if not isinstance(operand, Node) or op_name(operand) not in ("aten::cat", "aten::stack"):
        return []
    return [item for item in operand.args[0] if isinstance(item, Node)]  # type: ignore[union-attr]


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


@dataclass(frozen=True)
class Extra:
    """What a matmul computes beside its product: alpha · product + beta · addend."""

    alpha: float = 1
    beta: float = 1
    addend: Node | None = None
    """None where nothing is added, as with beta = 0, which torch takes for no addend at all."""


def matmul_extra(node: Node) -> Extra | None:
    """Return what addmm and baddbmm compute beside the product; None if a factor is symbolic."""
    assert is_matmul(node), node
    if is_scaled_matmul(node):
        return Extra(addend=schema_arguments(node).get("bias"))
    if op_name(node) not in ("aten::addmm", "aten::baddbmm"):
        return Extra()
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if not (isinstance(alpha, int | float) and isinstance(beta, int | float)):
        return None
    addend = node.args[0]
    assert isinstance(addend, Node)
    return Extra(alpha, beta, addend if beta != 0 else None)
