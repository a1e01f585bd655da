"""k-means by cosine out of PAMM's two operators."""

from __future__ import annotations

import pytest
import torch

from pamm_compile.decoding.clusters import cosine_kmeans


@pytest.mark.quick
def test_kmeans_tells_a_direction_from_its_opposite() -> None:
    x = torch.randn(1, 8).repeat(20, 1) + 0.01 * torch.randn(20, 8)
    x[10:] *= -3
    index, means, sizes = cosine_kmeans(x, 2, 4, 100)
    assert index.tolist() == [0] * 10 + [1] * 10
    assert sizes.tolist() == [10, 10]
    torch.testing.assert_close(means, torch.stack([x[:10].mean(0), x[10:].mean(0)]))


def test_a_cluster_that_lost_its_rows_is_empty() -> None:
    x = torch.ones(6, 4)
    index, means, sizes = cosine_kmeans(x, 3, 2, 100)
    assert index.tolist() == [0] * 6
    assert sizes.tolist() == [6, 0, 0]
    assert means[1:].abs().sum() == 0
