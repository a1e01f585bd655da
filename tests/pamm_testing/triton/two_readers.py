"""A kernel that must not be written so: what the hazard check has to find."""

import triton
import triton.language as tl


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
