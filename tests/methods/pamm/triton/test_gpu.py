"""The compiled kernels on a real GPU: bf16, repeatability, CUDA graphs, autotuning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pamm_compile
from pamm_compile.methods.pamm import assign, contract, eager, index_dtype
from pamm_compile.methods.pamm import triton as lowering

pytestmark = pytest.mark.gpu


def operators(k: int) -> Callable[..., tuple[Tensor, ...]]:
    def run(x: Tensor, c: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        index, scale, cosine = assign(x, c, index_dtype(k))
        return index, scale, cosine, contract(index, scale, list(grads), k)

    return run


def inputs(b: int, n: int, k: int, widths: list[int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(b, n, device="cuda").to(dtype)
    grads = torch.randn(b, sum(widths), device="cuda").to(dtype).split(widths, dim=1)
    return [x, x[torch.arange(k, device="cuda") * b // k], *grads]


def check(got: tuple[Tensor, ...], given: list[Tensor], k: int) -> None:
    """Every output is as good as the eager kernel's, in float64."""
    x, c, *grads = given
    index, scale, cosine, sums = got
    wide_x, wide_c = x.double(), c.double()
    norms, at = wide_c.norm(dim=1), index.long()
    scores = (wide_x @ wide_c.T).abs() / norms / wide_x.norm(dim=1, keepdim=True)
    expected = eager.assign(x, c, torch.int64)

    def lost(index: Tensor) -> Tensor:
        return (scores.max(dim=1).values - scores.gather(1, index[:, None])[:, 0]).max()

    assert lost(at) <= 2 * lost(expected[0]) + 1e-5
    exact = (wide_x * wide_c[at]).sum(1) / norms[at].square()
    unit = torch.finfo(x.dtype).eps
    torch.testing.assert_close(scale.double(), exact, rtol=2 * unit, atol=1e-5)
    signed = exact * norms[at] / wide_x.norm(dim=1)
    torch.testing.assert_close(cosine.double(), signed, rtol=1e-4, atol=1e-5)
    alone = torch.zeros(k, sums.shape[1], dtype=torch.float64, device="cuda")
    alone.index_add_(0, at, scale.double()[:, None] * torch.cat(grads, dim=1).double())
    theirs = (eager.contract(index, scale, grads, k) - alone).abs().max()
    assert (sums - alone).abs().max() <= 2 * theirs + 1e-6 * alone.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("b", "n", "k", "widths"),
    [
        (4096, 512, 16, [512, 512, 512]),
        (16384, 2048, 64, [2048, 512, 512]),
        (4099, 1000, 100, [300, 70, 1]),
        (8192, 1024, 256, [1024]),
        (8192, 1024, 700, [1024, 256, 256]),
        (3, 33, 2, [17, 40]),
    ],
)
def test_compiled_operators(b: int, n: int, k: int, widths: list[int], dtype: torch.dtype) -> None:
    lowering.register()
    given = inputs(b, n, k, widths, dtype)
    check(torch.compile(operators(k))(*given), given, k)


@pytest.mark.parametrize("k", [64, 700])
def test_equal_inputs_give_equal_bits(k: int) -> None:
    lowering.register()
    given = inputs(16384, 1024, k, [1024, 512], torch.bfloat16)
    compiled = torch.compile(operators(k))
    first = [t.clone() for t in compiled(*given)]
    for _ in range(10):
        for ours, before in zip(compiled(*given), first, strict=True):
            assert torch.equal(ours, before)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    lowering.register()
    given = inputs(16384, 1024, 64, [1024, 512], torch.bfloat16)
    compiled = torch.compile(operators(64), mode=mode)
    for _ in range(3):
        got = [t.clone() for t in compiled(*given)]
    check(tuple(got), given, 64)


@pytest.mark.parametrize("epsilon", [None, 0.9])
def test_training_step(epsilon: float | None) -> None:
    """Forward is that of exact compilation up to rounding, and with ratio 1 so is dW.

    Bitwise equality is likely and not promised: Inductor may fuse around the removed X otherwise.
    """
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        256, 4, 512, dropout=0.0, batch_first=True, norm_first=True, device="cuda"
    ).to(torch.bfloat16)
    hidden = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("inductor", pamm_compile.backend(ratio=1, epsilon=epsilon, strict=True)):
        torch._dynamo.reset()
        layer.zero_grad()
        out = torch.compile(layer, backend=backend)(hidden)
        out.float().square().mean().backward()
        weight = layer.self_attn.in_proj_weight
        results.append((out.detach(), weight.grad.float()))
    (out, exact), (ours, approximate) = results
    assert (out - ours).norm() <= 0.01 * out.norm()
    assert (exact - approximate).norm() <= 0.05 * exact.norm()
