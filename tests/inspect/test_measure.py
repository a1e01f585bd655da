"""Bytes saved and peaks, against what can be computed by hand or read off the partition."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import weakref
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from pamm_testing.options import make_options
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import GraphModule, Node
from torch.testing._internal.two_tensor import TwoTensor

import pamm_compile
from pamm_compile import compare_memory, measure_memory
from pamm_compile.driver import make_pipeline
from pamm_compile.inspect.measure import PEAK_ACCELERATOR, PEAK_CPU, saved_storages
from pamm_compile.names import names_of
from pamm_compile.private import aot, memory

gpu = pytest.mark.gpu

BUDGETS = (0.99, 0.5)
BLOCK = 64 * 32 * 4
"""Bytes of a float32 tensor [64, 32]."""


class Layer(nn.Module):
    """Norm and attention, then norm and perceptron, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(32), nn.RMSNorm(32)])
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (
            projection(h).unflatten(-1, (2, 16)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


def small_model() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Layer()), torch.randn(4, 128, 32)


def saved_bytes(fn: Callable[[], Any], model: nn.Module | None = None) -> int:
    return sum(storage.bytes for storage in saved_storages(fn, model=model))


# Eager, by hand.


def test_counts_what_eager_operators_save() -> None:
    x, weight = torch.randn(64, 32), nn.Parameter(torch.randn(32, 32))
    # mm saves x and the weight; sigmoid saves its result.
    assert saved_bytes(lambda: (x @ weight).sigmoid().sum()) == 2 * BLOCK


def test_counts_a_storage_once_however_often_it_is_saved() -> None:
    x = torch.randn(64, 32)
    first, second = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(64, 64))
    assert saved_bytes(lambda: ((x @ first).sum(), (x.t() @ second).sum())) == BLOCK


def test_counts_the_whole_storage_of_a_slice() -> None:
    x, weight = torch.randn(64, 32), nn.Parameter(torch.randn(32, 32))
    assert saved_bytes(lambda: x[:2] @ weight) == BLOCK


def test_leaves_out_parameters_always_and_buffers_if_told_the_model() -> None:
    model = nn.Linear(32, 32, bias=False)
    model.register_buffer("table", torch.randn(64, 32))
    frozen = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    model.frozen = frozen
    x = torch.randn(64, 32)

    def fn() -> Tensor:
        return (model(x) * model.table) @ model.frozen

    frozen_bytes = frozen.numel() * 4
    assert saved_bytes(fn) == 2 * BLOCK + frozen_bytes
    assert saved_bytes(fn, model) == BLOCK


def test_leaves_out_what_is_freed_before_forward_ends() -> None:
    x, weight = torch.randn(64, 32), nn.Parameter(torch.randn(32, 32))

    def fn() -> Tensor:
        (x.clone() @ weight).sigmoid()
        return x @ weight

    assert saved_bytes(fn) == BLOCK


def test_is_zero_without_gradients() -> None:
    x = torch.randn(64, 32)
    used = measure_memory(lambda: (x.exp() * x).sum())
    assert used.saved_bytes == 0
    # The exponential is gone when the sum begins.
    assert used.peak_bytes == 2 * BLOCK


@dataclasses.dataclass
class Output:
    loss: Tensor
    extra: list[Tensor]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda y: {"loss": y}, id="mapping"),
        pytest.param(lambda y: Output(torch.zeros(()), [y]), id="dataclass"),
        pytest.param(lambda y: (None, 3, (y,)), id="tuple"),
    ],
)
def test_takes_any_structure_of_outputs(wrap: Callable[[Tensor], Any]) -> None:
    x, weight = torch.randn(64, 32), nn.Parameter(torch.randn(32, 32))
    assert measure_memory(lambda: wrap((x @ weight).sigmoid())).saved_bytes == 2 * BLOCK


def test_counts_the_parts_of_subclasses_and_of_sparse_tensors() -> None:
    two = TwoTensor(torch.randn(64, 32), torch.randn(64, 32)).requires_grad_()
    assert saved_bytes(lambda: two.exp()) == 2 * BLOCK
    sparse = torch.eye(64).to_sparse()
    weight = nn.Parameter(torch.randn(64, 32))
    # Two int64 indices and a float32 value for each of 64 entries.
    assert saved_bytes(lambda: torch.sparse.mm(sparse, weight)) == 64 * (2 * 8 + 4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_refuses_what_it_cannot_count() -> None:
    sparse, weight = torch.eye(64).to_sparse_csr(), nn.Parameter(torch.randn(64, 32))
    with pytest.raises(pamm_compile.MeasurementError, match="sparse_csr"):
        saved_bytes(lambda: sparse @ weight)


def test_leaves_no_trace() -> None:
    model, x = small_model()
    outputs: list[weakref.ref[Tensor]] = []

    def fn() -> Tensor:
        out = model(x)
        outputs.append(weakref.ref(out))
        return out.sum()

    used = measure_memory(fn, model=model, warmup=0)
    gc.collect()
    assert len(outputs) == 2
    assert all(ref() is None for ref in outputs)
    assert all(parameter.grad is None for parameter in model.parameters())
    data = json.loads(used.to_json())
    assert data["saved_bytes"] == used.saved_bytes > 0
    assert data["peak_source"] == PEAK_CPU


@pytest.mark.parametrize(
    ("device", "source"), [("cpu", PEAK_CPU), pytest.param("cuda", PEAK_ACCELERATOR, marks=gpu)]
)
def test_peak_is_the_high_water_mark_of_the_allocator(device: str, source: str) -> None:
    x = torch.randn(64, 32, device=device)

    def fn() -> list[Tensor]:
        a = x.exp()
        b = a.exp()
        del a
        return [b.exp()]

    used = measure_memory(fn)
    assert used.peak_bytes == 2 * BLOCK
    assert used.peak_source == source


def test_peak_includes_backward() -> None:
    weight = nn.Parameter(torch.randn(64, 32))
    # Forward holds exp's result and the sum; backward adds its own 1 and the gradient.
    used = measure_memory(lambda: weight.exp().sum())
    assert used.saved_bytes == BLOCK
    assert used.peak_bytes == 2 * BLOCK + 4 + 4


def test_an_accelerator_without_a_driver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch names "cuda" as its accelerator on machines that have no GPU."""
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: None if check_available else torch.device("cuda"),
    )
    x = torch.randn(64, 32)
    assert measure_memory(lambda: [x.exp()]).peak_source == PEAK_CPU


# Compiled, against the partition.


def partitioned_bytes(
    forward: GraphModule, backward: GraphModule, parameters: Collection[str]
) -> int:
    """Return the bytes that a forward graph hands to its backward graph, parameters aside."""
    wanted = {node.name for node in backward.graph.find_nodes(op="placeholder")}
    storages = {}
    for node in forward.graph.output_node().args[0]:
        if not isinstance(node, Node) or node.name not in wanted:
            continue
        val = node.meta["val"]
        if aot.input_key(node.meta.get("desc")) in parameters:
            continue
        if isinstance(val, Tensor):
            storage = val.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("compressed", "budget", "generate_code"),
    [(True, 1.0, True), (False, 1.0, False), *itertools.product([False, True], BUDGETS, [False])],
)
def test_compiled_bytes_are_those_of_the_partition(
    compressed: bool, budget: float, generate_code: bool
) -> None:
    model, x = small_model()
    parts: dict[bool, GraphModule] = {}
    parameters: dict[str, str] = {}

    def inner(gm: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        parts[kwargs.get("is_backward", False)] = gm
        if generate_code:
            return compile_fx_inner(gm, inputs, **kwargs)
        return aot.boxed_nop(gm, inputs)

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        patches = {}
        parameters.update(names_of(gm).by_key)
        if compressed:
            pipeline = make_pipeline(make_options(ratio=64, min_tokens=1), parameters)
            patches["joint_custom_pre_pass"] = pipeline
        # A cache would answer without showing the parts.
        with functorch_config.patch(enable_autograd_cache=False), memory.memory_budget(budget):
            return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)

    compiled = torch.compile(model, backend=backend)
    used = measure_memory(lambda: compiled(x).square().mean(), model=model)
    inside = partitioned_bytes(parts[False], parts[True], parameters)
    # square, outside of the compiled graph, saves the model's output.
    assert used.saved_bytes == inside + x.nbytes


class Stashing(torch.autograd.Function):
    """Double; keep a product as an attribute, where no hook sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # A matmul is what the partitioner does not recompute.
        ctx.product = x @ weight
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2 + 0 * ctx.product, None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_counts_what_is_kept_past_the_hooks(compiled: bool) -> None:
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(32, 32)

    def fn() -> Tensor:
        return Stashing.apply(x, weight)

    run = torch.compile(fn, backend="aot_eager") if compiled else fn
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        run()
    assert not seen
    assert saved_bytes(run) == BLOCK


@pytest.mark.usefixtures("no_code")
def test_five_arms() -> None:
    model, x = small_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    backend = pamm_compile.backend(64, min_tokens=1, strict=True)
    backend.report.clear()
    heard: list[str] = []
    found = compare_memory(
        model,
        lambda model: model(x).square().mean(),
        backend=backend,
        steps=2,
        progress=heard.append,
    )
    names = ["eager", "compile", "compile + budget 0.99", "PAMM", "PAMM + budget 0.99"]
    assert [arm.name for arm in found.arms] == heard == names
    report = backend.report.graphs[0]
    difference = sum(site.bytes_before - site.bytes_after for site in report.sites)
    exact, pamm = found["compile"], found["PAMM"]
    assert exact.memory.saved_bytes - pamm.memory.saved_bytes == difference > 0
    assert found["compile + budget 0.99"].memory.saved_bytes < exact.memory.saved_bytes
    assert exact.loss == pamm.loss
    assert exact.time_ratio == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None

    data = json.loads(found.to_json())
    assert [arm["name"] for arm in data["arms"]] == names
    for arm in data["arms"]:
        assert all(math.isfinite(v) for v in arm.values() if not isinstance(v, str))
    lines = str(found).splitlines()
    assert all(line.startswith(name) for line, name in zip(lines[2:], names, strict=False))


@pytest.mark.usefixtures("no_code")
def test_timing_is_optional_and_user_settings_survive() -> None:
    model, x = small_model()
    with memory.memory_budget(0.9):
        found = compare_memory(
            model, lambda model: model(x).sum(), backend=pamm_compile.backend(64), steps=0
        )
        assert functorch_config.activation_memory_budget == 0.9
    assert {arm.time_ratio for arm in found.arms} == {None}
    assert "step time:" not in found.text()


@pytest.mark.parametrize("budget", [-0.1, 1.5, math.nan])
def test_rejects_a_budget_outside_its_range(budget: float) -> None:
    model, x = small_model()
    with pytest.raises(pamm_compile.InvalidOptionError, match="from 0"):
        compare_memory(model, lambda m: m(x).sum(), backend=pamm_compile.backend(), budget=budget)


def test_says_when_nothing_was_compiled() -> None:
    model, x = small_model()
    with pytest.raises(pamm_compile.MeasurementError, match="compiled no graph"):
        compare_memory(model, lambda _: model(x).sum(), backend=pamm_compile.backend())
