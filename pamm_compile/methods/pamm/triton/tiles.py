# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
"""Tile code of the two kernels: imported by the launchers of the tests, pasted into templates.

Triton compiles these functions from their text, so they use nothing but `tl` and each other.
Offsets take the type of `row`, `column` and `token`: int64 where the tensors ask for it.
"""

import triton
import triton.language as tl


@triton.jit
def pamm_dots(
    X,
    C,
    row,
    b,
    n,
    x_column,
    c_column,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    WITH_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products of a tile of tokens with a tile of generators, and the tokens' squared norms.

    X: pointers to rows of X, [BLOCK_B, 1], those the last one's past the end. C: pointers to
    rows of C, [1, BLOCK_K]. The norms are 0 if not WITH_NORM.
    """
    dots = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_B], tl.float32)
    for first in range(0, n, BLOCK_N):
        feature = (first + tl.arange(0, BLOCK_N)).to(row.dtype)
        x_at = X + feature[None, :] * x_column
        c_at = C + feature[:, None] * c_column
        if EVEN_N:
            x = tl.load(x_at)
            c = tl.load(c_at)
        else:
            x = tl.load(x_at, mask=feature[None, :] < n, other=0.0)
            c = tl.load(c_at, mask=feature[:, None] < n, other=0.0)
        if WITH_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            # A pipelined tile that an asynchronous matmul reads and registers read too is refilled
            # too early by Triton; the select makes the matmul take it from registers.
            x = tl.where((row < b)[:, None], x, 0.0)
        dots = tl.dot(x, c, dots, input_precision=PRECISION)
    return dots, squares


@triton.jit
def pamm_assign_tile(
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
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    WITH_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f, α and, if WITH_NORM, the cosine of the tokens `row`.

    INVERSE holds 1/‖C_j‖; 0 where C_j is zero, -1 where its norm is not finite. A non-finite entry
    of X makes the dot product with every finite generator non-finite, so it is found without
    another look at X.
    """
    # Rows past the end repeat the last one: no mask in the loop, and the caller stores none.
    x_rows = X + tl.minimum(row, b - 1)[:, None] * x_row
    squares = tl.zeros([BLOCK_B], tl.float32)
    best = tl.full([BLOCK_B], -2.0, tl.float32)
    best_dot = tl.zeros([BLOCK_B], tl.float32)
    best_index = tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, k, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        c_rows = C + tl.minimum(j, k - 1).to(row.dtype)[None, :] * c_row
        dots, squares = pamm_dots(
            x_rows,
            c_rows,
            row,
            b,
            n,
            x_column,
            c_column,
            BLOCK_B,
            BLOCK_K,
            BLOCK_N,
            EVEN_N,
            WITH_NORM,
            PRECISION,
        )
        inverse = tl.load(INVERSE + j, mask=j < k, other=-1.0)[None, :]
        size = tl.abs(dots)
        score = tl.where(inverse > 0, size * inverse, -1.0)
        score = tl.where((inverse >= 0) & ~(size < float("inf")), float("inf"), score)
        top, at = tl.max(score, axis=1, return_indices=True)
        at_dot = tl.sum(tl.where(tl.arange(0, BLOCK_K)[None, :] == at[:, None], dots, 0.0), axis=1)
        # Strictly better: of equal generators, the one with the lowest index stays.
        better = top > best
        best = tl.where(better, top, best)
        best_dot = tl.where(better, at_dot, best_dot)
        best_index = tl.where(better, first + at, best_index)

    finite = best < float("inf")
    if WITH_NORM:
        finite = finite & (squares < float("inf"))
    index = tl.where(finite, best_index, 0)
    near = tl.load(INVERSE + index)
    usable = near > 0
    nan = float("nan")
    alpha = tl.where(finite, tl.where(usable, best_dot * near * near, 0.0), nan)
    cosine = tl.zeros([BLOCK_B], tl.float32)
    if WITH_NORM:
        norm = tl.sqrt(squares)
        alpha = tl.where(finite & (norm == 0), 0.0, alpha)
        cosine = tl.where(usable, best_dot * near / norm, 0.0)
        cosine = tl.where(finite, tl.where(norm > 0, cosine, 1.0), nan)
    return index, alpha, cosine


@triton.jit
def pamm_codes(INDEX, SCALE, ORDER, first, stop, BLOCK_T: tl.constexpr, SORTED: tl.constexpr):
    """f and α of one tile of positions."""
    position = first + tl.arange(0, BLOCK_T)
    live = position < stop
    # Positions past the end repeat the last one, with α = 0: no mask on the wide load.
    position = tl.maximum(tl.minimum(position, stop - 1), 0)
    token = position
    if SORTED:
        token = tl.load(ORDER + position)
    alpha = tl.where(live, tl.load(SCALE + token), 0.0)
    return tl.load(INDEX + position).to(tl.int32), alpha


@triton.jit
def pamm_contract_tile(
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
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EVEN_M: tl.constexpr,
    SORTED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """B̃ᵀ of `column` × `generator` over the positions [start, stop), as a one-hot matmul.

    Positions are tokens; if SORTED, ORDER maps them to tokens and INDEX is in sorted order. A
    non-finite gradient meets the zeros of the one-hot matrix, and so makes its whole column
    non-finite.
    """
    if GRAD_LEFT:
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    else:
        acc = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    # f and α are fetched a tile ahead, so that no matmul waits for them.
    f, alpha = pamm_codes(INDEX, SCALE, ORDER, start, stop, BLOCK_T, SORTED)
    for first in range(start, stop, BLOCK_T):
        token = tl.minimum(first + tl.arange(0, BLOCK_T), stop - 1)
        if SORTED:
            token = tl.load(ORDER + token)
        token = token.to(column.dtype)
        grad_at = GRAD + token[:, None] * grad_row + column[None, :] * grad_column
        if EVEN_M:
            grad = tl.load(grad_at)
        else:
            grad = tl.load(grad_at, mask=(column < m)[None, :], other=0.0)
        if WIDE:
            alpha = alpha.to(tl.float32)
            grad = grad.to(tl.float32)
        # Both orders give the same sums: Hopper's matmul reads the left gradient from shared memory
        # as it lies, others would first have to transpose it in registers.
        if GRAD_LEFT:
            onehot = tl.where(f[:, None] == generator[None, :], alpha[:, None], 0.0)
            acc = tl.dot(tl.trans(grad), onehot, acc, input_precision=PRECISION)
        else:
            onehot = tl.where(generator[:, None] == f[None, :], alpha[None, :], 0.0)
            acc = tl.dot(onehot, grad, acc, input_precision=PRECISION)
        f, alpha = pamm_codes(INDEX, SCALE, ORDER, first + BLOCK_T, stop, BLOCK_T, SORTED)
    if not GRAD_LEFT:
        acc = tl.trans(acc)
    return acc


@triton.jit
def pamm_heaviest(OFFSETS, k, place, BLOCK_K: tl.constexpr, K_TILES: tl.constexpr):
    """The tile of generators that has the `place`-th most tokens; of equal ones the first."""
    tile = tl.arange(0, K_TILES)
    first = tl.minimum(tile * BLOCK_K, k)
    tokens = tl.load(OFFSETS + tl.minimum(first + BLOCK_K, k)) - tl.load(OFFSETS + first)
    heavier = tokens[None, :] > tokens[:, None]
    earlier = (tokens[None, :] == tokens[:, None]) & (tile[None, :] < tile[:, None])
    rank = tl.sum((heavier | earlier).to(tl.int32), axis=1)
    return tl.sum(tl.where(rank == place, tile, 0), axis=0)


@triton.jit
def pamm_program(
    k,
    m_tiles,
    OFFSETS,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SORTED: tl.constexpr,
    K_TILES: tl.constexpr,
):
    """The tile of generators, the tile of columns and the split that a program works on.

    Sorted, the tiles of most tokens come first, so that none of them is left for the end. K_TILES
    is 1 where there are too many to rank.
    """
    program = tl.program_id(0)
    if SORTED:
        m_tile = program % m_tiles
        split = program // m_tiles % SPLITS
        k_tile = program // (m_tiles * SPLITS)
        if K_TILES > 1:
            k_tile = pamm_heaviest(OFFSETS, k, k_tile, BLOCK_K, K_TILES)
    else:
        # Programs that read the same gradient run side by side.
        k_tiles = tl.cdiv(k, BLOCK_K)
        k_tile = program % k_tiles
        m_tile = program // k_tiles % m_tiles
        split = program // (k_tiles * m_tiles)
    return k_tile, m_tile, split


@triton.jit
def pamm_span(
    b,
    k,
    k_tile,
    split,
    OFFSETS,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SORTED: tl.constexpr,
):
    """The positions that one program sums: a share of all tokens, or of those of its generators.

    OFFSETS, read only if SORTED: [k + 1], where each generator's tokens start in sorted order.
    """
    if SORTED:
        first = tl.load(OFFSETS + k_tile * BLOCK_K).to(tl.int32)
        end = tl.load(OFFSETS + tl.minimum(k_tile * BLOCK_K + BLOCK_K, k)).to(tl.int32)
    else:
        first = 0
        end = b
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_T) * BLOCK_T
    start = first + split * share
    return start, tl.minimum(start + share, end)
