"""Plain kernels around the tile code: to interpret and to compile it without Inductor."""

import triton
import triton.language as tl

from pamm_compile.methods.pamm.triton.tiles import pamm_assign_tile, pamm_contract_tile, pamm_span


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
):
    split = tl.program_id(1)
    k_tiles = tl.cdiv(k, BLOCK_K)
    k_tile = tl.program_id(0) % k_tiles
    column = tl.program_id(0) // k_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
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


@triton.jit
def two_readers_kernel(X, C, OUT, n: tl.constexpr, BLOCK: tl.constexpr):
    """A tile read by a matmul and by registers: what the hazard check must find."""
    row, feature = tl.arange(0, 128), tl.arange(0, BLOCK)
    dots = tl.zeros([128, 64], tl.float32)
    squares = tl.zeros([128], tl.float32)
    for first in range(0, n, BLOCK):
        x = tl.load(X + row[:, None] * n + (first + feature)[None, :])
        c = tl.load(C + tl.arange(0, 64)[None, :] * n + (first + feature)[:, None])
        dots = tl.dot(x, c, dots)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    tl.store(OUT + row[:, None] * 64 + tl.arange(0, 64)[None, :], dots + squares[:, None])
