"""`pamm::assign` as one Triton template.

A program takes a tile of tokens, goes over the generators tile by tile and keeps the best of each
row. X is read once for every tile of generators, after the first mostly from the L2 cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from pamm_compile.methods.pamm import eager, operators
from pamm_compile.methods.pamm.triton import plan
from pamm_compile.methods.triton import template
from pamm_compile.methods.triton.device import Tile, device_of
from pamm_compile.private import inductor


def tile_constants(tile: Tile, with_norm: bool, precision: str) -> dict[str, Any]:
    """Return the constants of the kernel that follow from a tile."""
    return {
        "BLOCK_B": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_N": tile.depth,
        "WITH_NORM": with_norm,
        "PRECISION": precision,
    }


@functools.cache
def _template() -> Any:
    return inductor.TritonTemplate(
        name="pamm_assign",
        grid=inductor.SymbolicGridFn(_grid),
        source=template.source(__package__, "pamm_assign", ("pamm_dots", "pamm_assign_tile")),
    )


def _grid(b: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(b, meta["BLOCK_B"]), 1, 1)


def _inverse_norms(generators: Any) -> Any:
    """1/‖C_j‖; 0 for a zero generator, -1 for one whose norm is not finite.

    Left to Inductor, which computes it where it gathers the generators.
    """
    aten, lower = torch.ops.aten, inductor.aten_lowering
    wide = inductor.to_dtype(generators, torch.float32)
    squares = lower(aten.sum.dim_IntList)(lower(aten.mul.Tensor)(wide, wide), [1])
    inverse = lower(aten.rsqrt.default)(squares)
    infinite = float("inf")
    # The GPU's rsqrt gives ∞ for zero and, rounding them to zero, for subnormal numbers.
    inverse = lower(aten.where.self)(lower(aten.lt.Scalar)(inverse, infinite), inverse, 0.0)
    finite = lower(aten.lt.Scalar)(squares, infinite)
    return lower(aten.where.self)(finite, inverse, -1.0)


def _eager(x, generators, inverse, scale, cosine=None, *, out):  # type: ignore[no-untyped-def]
    # Only timed, against the templates; where it wins, the operator itself is called instead.
    index, alpha, cos = eager.assign(x, generators, out.dtype)
    out.copy_(index)
    scale.copy_(alpha)
    if cosine is not None:
        cosine.copy_(cos)
    return out


@functools.cache
def _eager_choice() -> Any:
    return inductor.ExternKernelChoice(_eager, name="pamm_assign_eager")


def lower(x: Any, generators: Any, index_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Lower `pamm::assign` inside Inductor.

    Args:
        x: Inductor node, [b, n].
        generators: Inductor node, [k, n].
        index_dtype: integer dtype that holds k - 1.

    Returns:
        Nodes of index, scale and cosine.
    """
    call = inductor.fallback_handler(operators.assign, add_to_fallback_set=False)
    dtype, device = x.get_dtype(), x.get_device()
    if not inductor.is_triton_device(device) or dtype not in template.TRITON_DTYPES:
        return tuple(call(x, generators, index_dtype))

    x, generators = inductor.realized(x), inductor.realized(generators)
    (b, n), k = x.get_size(), generators.get_size()[0]
    with_norm = inductor.has_reader(2)
    empty = functools.partial(inductor.empty_strided, [b], None, device=device)
    scale = empty(dtype=dtype)
    cosine = empty(dtype=torch.float32)
    written = [scale, cosine] if with_norm else [scale]
    inputs = [x, generators, inductor.realized(_inverse_norms(generators)), *written]
    layout = inductor.FixedLayout(device, index_dtype, [b], [1])

    several = inductor.is_max_autotune()
    limits = device_of(device)
    ways = plan.assign_tiles(
        inductor.expression_hint(k, 128),
        inductor.expression_hint(n, 1024),
        dtype,
        limits,
        inductor.expression_hint(b, 16384),
    )
    choices: list[Any] = []
    for tile in ways if several else ways[:1]:
        _template().maybe_append_choice(
            choices,
            input_nodes=inputs,
            layout=layout,
            mutated_inputs=written,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **template.constants(
                EVEN_N=inductor.is_divisible(n, tile.depth),
                ONE=inductor.is_one([b]),
                **tile_constants(tile, with_norm, template.float32_precision()),
            ),
            ACC_TYPE="tl.int32",
        )
    if several:
        _eager_choice().maybe_append_choice(choices, input_nodes=inputs, layout=layout)
    index = inductor.select_choice("pamm_assign", choices, inputs, layout, {})
    if not inductor.is_template_output(index):
        return tuple(call(x, generators, index_dtype))
    return index, scale, cosine
