"""Training loops: shapes that vary, accumulation, scaling, whole steps under Inductor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from pamm_testing.forms import Attention, _sdpa, split_heads
from pamm_testing.graphs import step
from pamm_testing.zoo import DECODERS, ENCODERS, HEADS, WIDTH, Case, causal, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

import pamm_compile


def _block(**options: Any) -> tuple[Attention, Any, pamm_compile.Backend]:
    model = Attention(_sdpa(is_causal=True))
    backend = pamm_compile.backend(**{"ratio": 4, "min_tokens": 1, **options})
    backend.report.clear()
    return model, backend, backend


def _square(out: Any) -> Tensor:
    return (out.loss if hasattr(out, "loss") else out.square().mean()) * 1.0


_INDUCTOR_CASES = [
    pytest.param(case, id=case.name, marks=[pytest.mark.everything] if case in ENCODERS else [])
    for case in [*DECODERS, *ENCODERS]
    if case.name in ("llama", "bert")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", _INDUCTOR_CASES)
def test_inductor_loss_is_equal_and_other_gradients_to_rounding(case: Case) -> None:
    """With the class's own dropout: our pass draws nothing from torch's generators."""
    model = case.build().train()
    for layers in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
        # What is generated for the second layer is what is there for the first.
        del layers[1:]
    batch = case.batch()
    exact = step(model, torch.compile(model), batch, case.loss)
    torch._dynamo.reset()
    backend = pamm_compile.backend(ratio=4, min_tokens=1)
    backend.report.clear()
    ours = step(model, torch.compile(model, backend=backend), batch, case.loss)
    assert torch.equal(exact.loss, ours.loss)
    compressed = {name for site in backend.report.compressed for name in site.parameters}
    assert len(backend.report.compressed) == 1
    for name, grad in exact.grads.items():
        if name not in compressed:
            torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "base", ["aot_eager", pytest.param("inductor", marks=pytest.mark.everything)]
)
def test_ratio_1_gives_the_exact_weight_gradient(base: Any) -> None:
    model, backend, _ = _block(ratio=1, base=base, goal="any")
    batch = {"x": torch.randn(3, 33, WIDTH)}
    exact = step(model, model, batch, _square)
    ours = step(model, torch.compile(model, backend=backend), batch, _square)
    assert len(backend.report.compressed) == 1
    for name, grad in exact.grads.items():
        error = (ours.grads[name] - grad).norm() / grad.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize(
    ("base", "sampling", "epsilon"),
    [
        *itertools.product(["aot_eager"], ["stratified", "uniform"], [None, 0.5]),
        pytest.param("inductor", "stratified", None, marks=pytest.mark.everything),
        ("inductor", "uniform", 0.5),
    ],
)
def test_dynamic_batch_and_length(base: Any, sampling: Any, epsilon: float | None) -> None:
    model, backend, _ = _block(ratio=1, base=base, sampling=sampling, epsilon=epsilon)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=True)
    # Dynamo may analyse a frame twice before its first run, but never again for another shape.
    step(model, compiled, {"x": torch.randn(4, 12, WIDTH)}, _square)
    frames = counter.frame_count
    backend.report.clear()
    for batch, length in [(2, 24), (3, 17), (5, 40), (2, 9)]:
        x = {"x": torch.randn(batch, length, WIDTH)}
        exact = step(model, model, x, _square)
        ours = step(model, compiled, x, _square)
        for name, grad in exact.grads.items():
            assert (ours.grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name
    assert counter.frame_count == frames
    assert backend.report.graphs == ()


def test_a_gradient_that_reads_the_size_of_the_input_does_not_keep_it() -> None:
    """GPT-2's Conv1D flattens its input, and its backward pass asks that for its size."""
    model, backend, _ = _block(base="aot_eager")
    model.q, model.k, model.v = (Conv1D(WIDTH, WIDTH) for _ in range(3))
    step(
        model,
        torch.compile(model, backend=backend, dynamic=True),
        {"x": torch.randn(2, 12, WIDTH)},
        _square,
    )
    (site,) = backend.report.sites
    assert site.compressed, site.detail
    assert site.parameters == ("q.weight", "k.weight", "v.weight")


def test_number_of_generators_follows_a_dynamic_shape() -> None:
    """One compiled graph; a compressed gradient has the rank of its k generators."""
    model, backend, _ = _block(ratio=8, base="aot_eager")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in [(2, 16), (3, 24), (2, 40)]:
        run = step(model, compiled, {"x": torch.randn(batch, length, WIDTH)}, _square)
        k = batch * length // 8
        rank = torch.linalg.matrix_rank(run.grads["v.weight"].double(), rtol=1e-6)
        assert rank == min(k, WIDTH)


def test_a_second_shape_recompiles_by_itself() -> None:
    model, backend, _ = _block(base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    for length in (16, 20, 28, 36):
        out = compiled(torch.randn(2, length, WIDTH))
        out.sum().backward()
    assert len(backend.report.graphs) == 2, "once for the first shape, once for all others"
    assert all(site.compressed for site in backend.report.sites)


def test_gradients_accumulate() -> None:
    model, backend, _ = _block(base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    batches = [torch.randn(2, 24, WIDTH) for _ in range(3)]
    each = [step(model, compiled, {"x": x}, _square).grads for x in batches]
    model.zero_grad(set_to_none=True)
    for x in batches:
        _square(compiled(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, sum(grads[name] for grads in each))


def test_gradient_buffers_do_not_overlap() -> None:
    """A site's weight gradients are cut from one matmul; writing to one must leave the rest."""
    model, backend, _ = _block(base="aot_eager")
    step(model, torch.compile(model, backend=backend), {"x": torch.randn(2, 24, WIDTH)}, _square)
    compiled = torch.compile(model, backend=backend)
    _square(compiled(torch.randn(2, 24, WIDTH))).backward()
    q, k = model.q.weight.grad, model.k.weight.grad
    assert q is not None
    assert k is not None
    before = k.clone()
    q.zero_()
    assert torch.equal(k, before)


def test_same_input_same_gradient() -> None:
    """Sampling is seeded by what it samples: a step can be run again and gives the same bits."""
    model, backend, _ = _block(base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    x = {"x": torch.randn(2, 24, WIDTH)}
    first = step(model, compiled, x, _square, seed=1)
    again = step(model, compiled, x, _square, seed=2)
    assert all(torch.equal(g, again.grads[n]) for n, g in first.grads.items())


def test_another_step_draws_other_generators() -> None:
    model, backend, _ = _block(ratio=24, base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 24, WIDTH)
    spans = []
    for _ in range(4):
        run = step(model, compiled, {"x": x}, _square)
        # Rows of dW lie in the span of the generators, two of them here.
        spans.append(torch.linalg.svd(run.grads["v.weight"], full_matrices=False).Vh[:2])
        with torch.no_grad():
            model.norm.weight.mul_(1.001)
    overlaps = [(spans[0] @ span.T).norm() for span in spans[1:]]
    assert min(overlaps) < 1.2, "two spans of dimension 2 overlap by √2 if they are the same"


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_grad_scaler_skips_a_step_on_an_inf(where: str) -> None:
    model, backend, _ = _block(base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(2, 24, WIDTH)
    if where == "input":
        x[1, 5, 3] = torch.inf
    out = compiled(x)
    if where == "gradient":
        out = out * torch.ones_like(out).index_fill(1, torch.tensor([7]), torch.inf)
    scaler.scale(out.square().mean()).backward()
    for name in ("q", "k", "v"):
        grad = getattr(model, name).weight.grad
        assert not grad.isfinite().all(), name
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class _SharedWeight(nn.Module):
    """One projection used on two inputs, so that its gradient is a sum over two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attention = _sdpa()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (split_heads(self.qkv(z)) for z in (x.sin(), y.cos(), y.cos()))
        return self.attention(q, k, v)


def test_shared_weights_sum_over_their_sites() -> None:
    backend = pamm_compile.backend(ratio=1, min_tokens=1, base="aot_eager", goal="any")
    backend.report.clear()
    model = _SharedWeight()
    batch = {"x": torch.randn(2, 24, WIDTH), "y": torch.randn(2, 24, WIDTH)}
    exact = step(model, model, batch, _square)
    ours = step(model, torch.compile(model, backend=backend), batch, _square)
    assert backend.report.compressed
    torch.testing.assert_close(
        ours.grads["qkv.weight"], exact.grads["qkv.weight"], rtol=1e-4, atol=1e-7
    )


def test_loss_goes_down() -> None:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    backend = pamm_compile.backend(ratio=16, min_tokens=1, base="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = tokens(8, 32)
    losses = []
    for _ in range(30):
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_parameters() -> None:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=HEADS,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).bfloat16()
    backend = pamm_compile.backend(ratio=1, min_tokens=1, base="aot_eager", goal="any")
    backend.report.clear()
    batch = causal()
    exact = step(model, torch.compile(model, backend="aot_eager"), batch, _square)
    torch._dynamo.reset()
    ours = step(model, torch.compile(model, backend=backend), batch, _square)
    (site,) = backend.report.compressed
    assert site.dtype == "bfloat16"
    for name in site.parameters:
        # Both round to bf16; ratio 1 leaves nothing else to differ by.
        error = (ours.grads[name].float() - exact.grads[name].float()).norm()
        assert error < 2e-2 * exact.grads[name].float().norm()
