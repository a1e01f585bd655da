"""Whole models on a GPU: what no CPU can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.zoo import DECODERS, WIDTH, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import pamm_compile

pytestmark = pytest.mark.gpu

_LLAMA = next(case for case in DECODERS if case.name == "llama")


def _gradients(
    model: torch.nn.Module, compiled: Any, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    out = compiled(*args, **kwargs)
    (out.loss if hasattr(out, "loss") else out.float().square().mean()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _check(
    model: torch.nn.Module, sites: int, *args: Any, mode: str | None = None, **kwargs: Any
) -> None:
    """At ratio 1 all gradients agree with the exact compile's, to the rounding of the dtype."""
    exact = _gradients(model, torch.compile(model, mode=mode), *args, **kwargs)
    torch.compiler.reset()
    backend = pamm_compile.backend(ratio=1, min_tokens=1)
    backend.report.clear()
    compiled = torch.compile(model, backend=backend, mode=mode)
    # CUDA graphs record on the second call and replay from the third.
    for _ in range(3 if mode else 1):
        ours = _gradients(model, compiled, *args, **kwargs)
    assert len(backend.report.compressed) == sites
    for name, grad in exact.items():
        tolerance = 1e-3 if grad.dtype == torch.float32 else 3e-2
        assert (ours[name] - grad).norm() <= tolerance * grad.norm() + 1e-9, name


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("case", [_LLAMA], ids=["llama"])
def test_llama(case: Case, mode: str | None) -> None:
    model = case.build().cuda().bfloat16()
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.batch().items()}
    _check(model, case.sites, mode=mode, **batch)


@pytest.mark.parametrize(
    "kernel",
    [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
)
def test_fused_attention_kernels(kernel: SDPBackend) -> None:
    model = Attention(_sdpa(is_causal=True)).cuda().bfloat16()
    x = torch.randn(2, 64, WIDTH, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(kernel):
        _check(model, 1, x)


class _Flex(torch.nn.Module):
    """Heads of 16, the least that flex_attention takes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.qkv = torch.nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v)


def test_flex_attention() -> None:
    _check(_Flex().cuda(), 1, torch.randn(2, 128, 64, device="cuda"))
