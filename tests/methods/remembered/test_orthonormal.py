"""Rows that are orthonormal, of matrices that span much, little and nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pamm_compile.methods.remembered.orthonormal import orthonormal


def rows(sizes: Tensor, n: int = 64) -> Tensor:
    """Rows whose singular values are these."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(len(sizes), len(sizes), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, len(sizes), generator=generator)).Q
    return (left * sizes) @ right.T


def identity(of: Tensor) -> Tensor:
    return torch.eye(of.shape[-2]).expand(*of.shape[:-2], -1, -1)


def test_it_spans_what_a_householder_factorisation_spans() -> None:
    y = rows(torch.logspace(0, -3, 16))
    q, wanted = orthonormal(y, passes=2), torch.linalg.qr(y.double().mT).Q.mT.float()
    assert torch.allclose(q @ q.mT, identity(q), atol=1e-6)
    assert torch.allclose(q.mT @ q, wanted.mT @ wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 15])
def test_rows_that_span_less_are_filled(dtype: torch.dtype, rank: int) -> None:
    sizes = torch.zeros(16)
    sizes[:rank] = 1
    y = rows(sizes)
    q = orthonormal(y, passes=2, dtype=dtype)
    assert torch.allclose(q @ q.mT, identity(q), atol=1e-4)
    assert torch.allclose(y @ q.mT @ q, y, atol=1e-3)


@pytest.mark.parametrize(("r", "n", "rank"), [(25, 26, 1), (31, 40, 3), (1, 2, 1), (7, 8, 2)])
def test_nearly_as_many_rows_as_columns_are_filled(r: int, n: int, rank: int) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(r, rank, generator=generator)
        q = orthonormal(left @ torch.randn(rank, n, generator=generator), passes=2)
        assert torch.allclose(q @ q.mT, identity(q), atol=1e-4), seed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_nothing(value: float) -> None:
    y = rows(torch.ones(8))
    y[2, 3] = value
    q = orthonormal(y, passes=2)
    assert torch.allclose(q @ q.mT, identity(q), atol=1e-5)


def test_several_are_made_as_each_alone() -> None:
    matrices = [rows(torch.linspace(1, 0.1 * k, 8)) for k in range(3)]
    together = orthonormal(torch.stack(matrices), passes=2)
    for one, q in zip(matrices, together, strict=True):
        alone = orthonormal(one, passes=2)
        assert torch.allclose(alone.mT @ alone, q.mT @ q, atol=1e-5)
