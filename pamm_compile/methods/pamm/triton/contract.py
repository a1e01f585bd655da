"""`pamm::contract` as one Triton template over all gradients of a site, and a sum over its splits.

A program takes a tile of one gradient's columns, a tile of generators and a share of the tokens,
and multiplies by the one-hot matrix of the assignment. Partial sums are fp32 and are added in a
fixed order by Inductor, so that nothing is atomic and every run gives the same bits.

Where `model` predicts that the zeros cost more than it saves, tokens are sorted by generator first,
and a program visits only those of its own generators.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from pamm_compile.methods.pamm import eager, operators
from pamm_compile.methods.pamm.triton import model, plan
from pamm_compile.methods.triton import template
from pamm_compile.methods.triton.device import Device, Tile, device_of, power_of_two
from pamm_compile.private import inductor

# Tiles of generators that every program of the sorted kernel compares by their tokens.
_MOST_RANKED = 64


def tile_constants(
    tile: Tile, product: torch.dtype, is_sorted: bool, device: Device, precision: str
) -> dict[str, Any]:
    """Return the constants of the kernel that follow from a tile, and what is multiplied where."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_T": tile.depth,
        "SORTED": is_sorted,
        "WIDE": product == torch.float32,
        # Fewer generators than a Hopper matmul has rows are better its columns: the gradient is
        # then the left operand. From 64 on, the one-hot tile is made in the registers that the
        # matmul takes it from, at half the instructions or less.
        "GRAD_LEFT": (
            product.itemsize == 2 and device.reads_left_from_shared and tile.columns < 64
        ),
        "PRECISION": precision,
    }


def ranked(k: Any, columns: int) -> int:
    """How many tiles of generators the sorted kernel ranks by weight; 1 where it does not."""
    tiles = -(-k // columns) if isinstance(k, int) else int(-(-k // columns)) if k.is_number else 0
    return power_of_two(tiles, 1, _MOST_RANKED) if tiles <= _MOST_RANKED else 1


def _grid(k: Any, *rest: Any, cdiv: Any) -> tuple[Any, Any, Any]:
    *widths, meta = rest
    column_tiles = sum(cdiv(m, meta["BLOCK_M"]) for m in widths)
    return (column_tiles * cdiv(k, meta["BLOCK_K"]) * meta["SPLITS"], 1, 1)


@functools.cache
def _template() -> Any:
    return inductor.TritonTemplate(
        name="pamm_contract",
        grid=inductor.SymbolicGridFn(_grid),
        source=template.source(
            __package__,
            "pamm_contract",
            ("pamm_codes", "pamm_contract_tile", "pamm_heaviest", "pamm_program", "pamm_span"),
        ),
    )


def _eager(index, scale, *rest, out):  # type: ignore[no-untyped-def]
    # Only timed, against the templates; where it wins, the operator itself is called instead.
    grads = [tensor for tensor in rest if tensor.dim() == 2]
    out[0].copy_(eager.contract(index, scale, grads, out.shape[2]).T)
    return out


@functools.cache
def _eager_choice() -> Any:
    return inductor.ExternKernelChoice(_eager, name="pamm_contract_eager")


def _sorted(index: Any, k: Any) -> tuple[Any, Any, Any]:
    """Sorted index, the tokens in that order, and where each generator's tokens start."""
    aten, lower = torch.ops.aten, inductor.aten_lowering
    device = index.get_device()
    values, order = lower(aten.sort.stable)(index, stable=True, dim=0, descending=False)
    ends = lower(torch.ops.prims.iota.default)(
        k + 1, start=0, step=1, dtype=torch.int32, device=device, requires_grad=False
    )
    wide = inductor.to_dtype(values, torch.int32)
    return wide, order, lower(aten.searchsorted.Tensor)(wide, ends, out_int32=True)


def _example(dtype: torch.dtype, fill: Any) -> Any:
    """What to time with for an input that is an index: `fill` takes its length and device."""

    def generate(node: Any) -> torch.Tensor:
        length = inductor.expression_hint(node.get_size()[0], 16384)
        values: torch.Tensor = fill(length, node.get_device())
        return values.to(dtype)

    return generate


def _examples(dtype: torch.dtype, b: int, k: int, is_sorted: bool) -> dict[int, Any]:
    """Indices to time with, as random integers would point outside of the tensors."""
    even = _example(dtype, lambda rows, device: torch.arange(rows, device=device) * k // rows)
    if not is_sorted:
        return {0: even}
    order = _example(torch.int64, lambda rows, device: torch.arange(rows, device=device))
    starts = _example(torch.int32, lambda ends, device: torch.arange(ends, device=device) * b // k)
    return {0: even, 2: order, 3: starts}


def lower(index: Any, scale: Any, grads: Sequence[Any], num_generators: Any) -> Any:
    """Lower `pamm::contract` inside Inductor.

    Args:
        index: Inductor node, [b].
        scale: Inductor node, [b].
        grads: Inductor nodes, [b, m_p] each.
        num_generators: k, int or sympy expression.

    Returns:
        Node of [k, Σ m_p].
    """
    aten, lowering = torch.ops.aten, inductor.aten_lowering
    device, dtypes = index.get_device(), {scale.get_dtype(), grads[0].get_dtype()}
    call = inductor.fallback_handler(operators.contract, add_to_fallback_set=False)
    if not inductor.is_triton_device(device) or not dtypes <= template.TRITON_DTYPES:
        return call(index, scale, grads, num_generators)

    k, limits = num_generators, device_of(device)
    b = grads[0].get_size()[0]
    widths = [grad.get_size()[1] for grad in grads]
    k_hint, b_hint = inductor.expression_hint(k, 128), inductor.expression_hint(b, 16384)
    product = grads[0].get_dtype() if len(dtypes) == 1 else torch.float32
    width_hints = [inductor.expression_hint(m, 1024) for m in widths]
    is_sorted = model.is_sorted(b_hint, width_hints, k_hint, product, limits)
    ways = plan.contract_tiles(k_hint, product, limits, is_sorted)
    several = inductor.is_max_autotune()
    shares = plan.splits(
        b_hint,
        width_hints,
        k_hint,
        grads[0].get_dtype().itemsize,
        ways[0],
        limits,
        is_sorted,
    )
    key, *sorting = _sorted(index, k) if is_sorted else (index,)
    nodes = [inductor.realized(n, dense=True) for n in (key, scale, *sorting)]
    nodes += [inductor.realized(grad) for grad in grads]
    size = [shares, sum(widths), k]
    layout = inductor.FixedLayout(device, torch.float32, size, [size[1] * k, k, 1])

    choices: list[Any] = []
    for tile in ways if several else ways[:1]:
        _template().maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            call_sizes=[k, *widths],
            num_warps=tile.warps,
            num_stages=tile.stages,
            **template.constants(
                GRADS=len(grads),
                SPLITS=shares,
                EVEN_M=all(inductor.is_divisible(m, tile.rows) for m in widths),
                ONE=inductor.is_one([shares, *size[1:]]),
                K_TILES=ranked(k, tile.columns) if is_sorted else 1,
                **tile_constants(tile, product, is_sorted, limits, template.float32_precision()),
            ),
            ACC_TYPE="tl.float32",
        )
    if several:
        _eager_choice().maybe_append_choice(choices, input_nodes=nodes, layout=layout)
    examples = _examples(key.get_dtype(), b_hint, k_hint, is_sorted)
    partial = inductor.select_choice("pamm_contract", choices, nodes, layout, examples)
    if not inductor.is_template_output(partial):
        return call(index, scale, grads, num_generators)
    if shares == 1:
        total = lowering(aten.select.int)(partial, 0, 0)
    else:
        total = lowering(aten.sum.dim_IntList)(partial, [0])
    return lowering(aten.permute.default)(total, [1, 0])
