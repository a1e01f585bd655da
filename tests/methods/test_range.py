"""Where the exact weight gradient is finite in 16 bits, that of every method is."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from pamm_compile import GradientSubspace, Method, Pamm, Quantized, Subspace
from pamm_compile.methods.pamm.compression import compress
from pamm_compile.methods.sampling import sample_rows

B, N, M = 512, 256, 64
METHODS = (
    Pamm(16),
    Pamm(16, epsilon=0.9),
    Pamm(16, epsilon=0.3),
    Pamm(1),
    Subspace(0.125),
    Subspace(0.125, bits=None),
    Subspace(0.125, bits=8, candidates=2),
    Subspace(N),
    Subspace(N, bits=8),
    Quantized(8),
    GradientSubspace(),
    Quantized(4),
    Quantized(8, float8=True),
)
SIZES = ((7500, 1e-4), (1e-3, 7500), (60000, 1e-6), (1e-5, 30000))
"""The largest entries of X and of dZ."""


def inputs(kind: str) -> tuple[Tensor, Tensor]:
    """Return X and dZ, their largest entry 1."""
    x, z = torch.randn(B, N), torch.randn(B, M)
    if kind == "nearly constant":
        x = 1 + 0.01 * x
    elif kind == "tiny rows":
        x[::2] *= 1e-4
    elif kind == "tiny columns":
        x[:, ::2] *= 1e-4
    elif kind == "one large entry":
        x[3, 5], z[7, 2] = 1000, 1000
    return x / x.abs().max(), z / z.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["plain", "nearly constant", "tiny rows", "tiny columns", "one large entry"]
)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_finite_where_exact_is_finite(method: Method, kind: str, dtype: torch.dtype) -> None:
    x_unit, z_unit = inputs(kind)
    for x_size, z_size in SIZES:
        x, z = (x_unit * x_size).to(dtype), (z_unit * z_size).to(dtype)
        assert (z.T @ x).isfinite().all(), "the case says nothing"
        stored = method.store(x, torch.tensor(5), [M])
        straight, flipped = method.weight_gradients(stored, [z, z], [False, True])
        assert straight.to(dtype).isfinite().all(), (x_size, z_size)
        assert flipped.to(dtype).isfinite().all(), (x_size, z_size)


def test_float16_generators_are_rows_times_powers_of_two() -> None:
    x = (torch.randn(64, 48) * torch.logspace(-4, 3, 64)[:, None]).half()
    found = compress(x, torch.tensor(0), ratio=Fraction(4))
    rows = sample_rows(64, 16, torch.tensor(0), "stratified")
    ratios = (found.generators.float() / x[rows].float()).nanmedian(1).values
    assert torch.equal(ratios.log2().frac(), torch.zeros(16))
    assert found.generators.float().square().mean(1).min() >= 0.99
    assert found.scale.abs().max() <= x.abs().max()
