"""Activation checkpointing: what it saves without PAMM, and whether PAMM adds to it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.zoo import WIDTH
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import pamm_compile
from pamm_compile.inspect.predict import predict_saved

TOKENS = 1024
_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(keep: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE


class _Blocks(nn.Module):
    """Two attention blocks, each checkpointed with a policy; None checkpoints nothing."""

    def __init__(self, keep: set[Any] | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(_sdpa(is_causal=True)) for _ in range(2))
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.keep is None:
                x = x + block(x)
                continue
            policy = functools.partial(_policy, self.keep)
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            x = x + checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def _saved(keep: set[Any] | None, *, compressed: bool) -> tuple[int, set[str | None]]:
    backend = pamm_compile.backend(256) if compressed else "exact"
    with FakeTensorMode():
        x = torch.randn(4, TOKENS // 4, WIDTH)
        found = predict_saved(_Blocks(keep), x, using=backend)
    return found.saved_bytes, {site.reason for site in found.report.sites}


def test_selective_checkpointing_leaves_nothing_to_save() -> None:
    """Sites in a checkpointed region are declined, also where its policy saves the norm."""
    plain, _ = _saved(None, compressed=False)
    ours, reasons = _saved(None, compressed=True)
    x = TOKENS * WIDTH * 4
    assert reasons == {None}
    assert 0.8 * 2 * x < plain - ours < 2 * x

    for keep in (_SAVED, {*_SAVED, torch.ops.aten.native_layer_norm.default}):
        selective, _ = _saved(keep, compressed=False)
        both, reasons = _saved(keep, compressed=True)
        print(f"none {plain:,}, PAMM {ours:,}, selective {selective:,}, both {both:,}")
        assert reasons == {"RECOMPUTED"}
        assert both == selective
