# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, unused-ignore"
"""Plain kernels around the tile code: to interpret and to compile it without Inductor."""

import triton
import triton.language as tl

from pamm_compile.methods.pamm.triton.tiles import (
    pamm_assign_tile,
    pamm_contract_tile,
    pamm_program,
    pamm_span,
)


@triton.jit
def assign_kernel(
    X,
    C,
    INVERSE,
    INDEX,
    SCALE,
    COSINE,
    b,
    k,
    n,
    x_row,
    x_column,
    c_row,
    c_column,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    WITH_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    index, scale, cosine = pamm_assign_tile(
        X,
        C,
        INVERSE,
        row,
        b,
        k,
        n,
        x_row,
        x_column,
        c_row,
        c_column,
        BLOCK_B,
        BLOCK_K,
        BLOCK_N,
        EVEN_N,
        WITH_NORM,
        PRECISION,
    )
    tl.store(INDEX + row, index.to(INDEX.dtype.element_ty), mask=row < b)
    tl.store(SCALE + row, scale.to(SCALE.dtype.element_ty), mask=row < b)
    if WITH_NORM:
        tl.store(COSINE + row, cosine, mask=row < b)


@triton.jit
def contract_kernel(
    INDEX,
    SCALE,
    ORDER,
    OFFSETS,
    GRAD,
    OUT,
    b,
    k,
    m,
    grad_row,
    grad_column,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EVEN_M: tl.constexpr,
    SORTED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    K_TILES: tl.constexpr,
):
    k_tile, m_tile, split = pamm_program(
        k, tl.cdiv(m, BLOCK_M), OFFSETS, SPLITS, BLOCK_K, SORTED, K_TILES
    )
    column = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    generator = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    start, stop = pamm_span(b, k, k_tile, split, OFFSETS, SPLITS, BLOCK_K, BLOCK_T, SORTED)
    acc = pamm_contract_tile(
        INDEX,
        SCALE,
        ORDER,
        GRAD,
        start,
        stop,
        generator,
        column,
        m,
        grad_row,
        grad_column,
        BLOCK_K,
        BLOCK_M,
        BLOCK_T,
        EVEN_M,
        SORTED,
        WIDE,
        GRAD_LEFT,
        PRECISION,
    )
    at = OUT + (split * m + column[:, None]) * k + generator[None, :]
    tl.store(at, acc, mask=(column[:, None] < m) & (generator[None, :] < k))
