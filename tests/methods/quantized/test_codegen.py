"""What Inductor generates of an input in float8 for a GPU, looked at without one."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="code for a GPU is Triton's")

from pamm_testing.triton import casts

from examples.benchmarks.models import SHAPES

pytestmark = pytest.mark.everything

TOKENS = 4096


@pytest.fixture(scope="module")
def blocks() -> list[casts.Generated]:
    shape = SHAPES["llama-350m"]
    return [casts.generate(shape, TOKENS, exact=exact) for exact in (False, True)]


def test_weight_gradients_of_a_block_are_scaled_matmuls(blocks: list[casts.Generated]) -> None:
    ours, exact = ([g.launches(which) for which in casts.PASSES] for g in blocks)
    counts = [
        [sum(name in launch for launch in launches) for launches in (*ours, *exact)]
        for name in ("_scaled_mm", "extern_kernels.mm(")
    ]
    # Sites of q, k, v, of gate, up, and of down: three matmuls in place of six.
    assert counts[0] == [0, 3, 0, 0]
    assert [counts[1][0], counts[1][1] + 6] == counts[1][2:]
    # At most: peaks in two steps, codes, scales of rows and of columns, and the product, a site.
    assert len(ours[1]) <= len(exact[1]) - 6 + 3 * 6
    operands = re.findall(
        r"_scaled_mm\((\w+), reinterpret_tensor\(\w+, \(\d+, (\d+)\), \((\d+), (\d+)\)",
        blocks[0].wrappers["backward"],
    )
    # cuBLAS reads both along tokens: a row of the one, a column of the other.
    assert [(int(row), int(column)) for _, _, row, column in operands] == [(1, TOKENS)] * 3


def test_the_model_of_the_time_counts_what_casts_move(blocks: list[casts.Generated]) -> None:
    kernels = [each for which in casts.PASSES for each in casts.casting(blocks[0], which)]
    counted = casts.counted(SHAPES["llama-350m"], TOKENS)
    # Scales, and parts of them, are what the model leaves out.
    assert 1 <= sum(map(casts.moved, kernels)) / counted < 1.05
    assert not any(casts.casting(blocks[1], which) for which in casts.PASSES)
    forward, backward = (
        [casts.is_fused(k) for k in casts.casting(blocks[0], w)] for w in casts.PASSES
    )
    assert all(forward)
    assert not any(backward)
