"""PAMM under PyTorch's own distributed engines, in real processes.

The assertions are in the modules that the ranks run; a failure here shows the rank's traceback.
"""

from __future__ import annotations

import pytest
import torch
from pamm_testing.distributed.ranks import RankFailedError, launch


@pytest.mark.slow
def test_two_ranks() -> None:
    """DDP; the other layouts run with --everything."""
    launch("ddp_checks:main", ranks=2)


@pytest.mark.slow
@pytest.mark.everything
def test_two_ranks_in_further_ways() -> None:
    launch("ddp_checks:more", ranks=2)


@pytest.mark.slow
@pytest.mark.everything
def test_sharded_and_sequence_parallel() -> None:
    """In the same two processes."""
    launch("fsdp_checks:main", "tp_checks:sequence_parallel", ranks=2)


@pytest.mark.slow
@pytest.mark.everything
def test_directions_are_remembered_on_every_rank() -> None:
    """Of the gradients before they are reduced, in step with all others."""
    launch("remembered_checks:main", "remembered_checks:sharded", ranks=2)


@pytest.mark.slow
@pytest.mark.everything
def test_float8_training() -> None:
    pytest.importorskip("torchao.float8", reason="needs torchao: the extra float8")
    launch("float8_checks:main", "float8_checks:blocks", ranks=2)


@pytest.mark.slow
@pytest.mark.everything
def test_tensor_parallel_alone() -> None:
    """As within two dimensions, and a model that is compiled as one graph."""
    launch("tp_checks:tensor_parallel", ranks=2)


@pytest.mark.slow
@pytest.mark.everything
def test_two_dimensional_parallel() -> None:
    launch("tp_checks:main_2d", ranks=4)


@pytest.mark.slow
def test_a_rank_that_fails_is_reported_and_not_waited_for() -> None:
    with pytest.raises(RankFailedError, match="rank 1 ended with 1") as caught:
        launch("failing_checks:one_raises", ranks=2)
    assert "ValueError: this rank gives up" in str(caught.value)
    assert "still running" not in str(caught.value)


@pytest.mark.slow
def test_ranks_that_wait_are_ended_and_located() -> None:
    with pytest.raises(RankFailedError, match="still running after 5 s") as caught:
        launch("failing_checks:one_waits", ranks=2, timeout=5)
    assert "in one_waits" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("check", ["fsdp", "sequence_parallel"])
def test_on_gpus(check: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for every rank, and there are fewer than two")
    launch(f"gpu_checks:{check}", ranks=2, backend="nccl")
