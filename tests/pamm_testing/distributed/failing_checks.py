"""Ranks that fail, for the test of the launcher."""

from __future__ import annotations

import time

import torch.distributed as dist


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank gives up")
    dist.barrier()


def one_waits() -> None:
    if dist.get_rank() == 1:
        time.sleep(10_000)
    dist.barrier()
