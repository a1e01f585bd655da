"""Orthonormal rows of several matrices at once, without waiting for the device.

A Householder factorisation goes through a matrix column by column, and libraries for GPUs have it
for one matrix at a time. A Cholesky factor of the Gram matrices makes the same of all together.
"""

from __future__ import annotations

import torch
from torch import Tensor

# By dtype: of a row that is added to rows of length 1, and of the Gram matrices' trace. What is
# added is not far below the root of the shift, so that one pass makes rows of it alone long.
_FILL = {torch.float64: 1e-6, torch.float32: 1e-3}
_SHIFT = {torch.float64: 1e-13, torch.float32: 1e-6}
_SEED = 1


def orthonormal(y: Tensor, *, passes: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return rows that are orthonormal and span what those of a matrix span.

    Equivalent to `torch.linalg.qr(y.mT).Q.mT`, up to the choice of a basis. Where the rows of `y`
    span less, what they leave is filled at random.

    Args:
        y: [..., r, n], r at most n; what is not finite counts as nothing.
        passes: 1 leaves rows that nearly depend on one another shorter than 1; 2 makes all
            orthonormal. Float32 takes one more.
        dtype: that is computed in; None for float64 where the device has it.

    Returns:
        [..., r, n], float32.

    Source: T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, Shifted Cholesky QR
        for computing the QR factorization of ill-conditioned matrices, 2020.
    """
    wide = dtype or (torch.float32 if y.device.type == "mps" else torch.float64)
    r, n = y.shape[-2:]
    z = torch.where(y.isfinite(), y, 0.0).to(wide)
    sizes = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    generator = torch.Generator(y.device).manual_seed(_SEED)
    fill = torch.randn(r, n, generator=generator, device=y.device, dtype=wide)
    z = z / torch.where(sizes > 0, sizes, 1.0) + _FILL[wide] / n**0.5 * fill
    identity = torch.eye(r, dtype=wide, device=y.device)
    for _ in range(passes + (wide is torch.float32)):
        # The trace is the number of rows, or less: all are as long as 1 at most.
        gram = z @ z.mT + _SHIFT[wide] * r * identity
        z = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, z, upper=False)
    rows: Tensor = z.float()
    return rows
