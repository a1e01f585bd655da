"""Running a model to look at it, and leaving it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put a model's buffers and the states of random-number generators back afterwards.

    Args:
        model: what is run meanwhile.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(d for d in devices if d is not None)):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
