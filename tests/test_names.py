"""Names of parameters: as the compiled module gives them, however Dynamo reached them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pamm_testing.forms import HEAD, _sdpa, join_heads, split_heads
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn

import pamm_compile
from pamm_compile.names import readable

attend = _sdpa()


class Block(nn.Module):
    """Attention whose forward does not call its first argument self, and may be interrupted."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.norm, self.breaks = nn.LayerNorm(WIDTH), breaks
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(this, x: Tensor) -> Tensor:
        if this.breaks:
            torch._dynamo.graph_break()
        h = this.norm(x)
        q, k, v = (split_heads(layer(h), WIDTH // HEAD) for layer in (this.q, this.k, this.v))
        return x + join_heads(attend(q, k, v))


class Stack(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(breaks) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _x() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)


def _backend(**more: Any) -> pamm_compile.Backend:
    chosen = {"ratio": 4, "min_tokens": 1, "base": "aot_eager", "seed": 21, **more}
    backend = pamm_compile.backend(**chosen)
    backend.report.clear()
    return backend


def _names(backend: pamm_compile.Backend) -> list[tuple[str, ...]]:
    return [site.parameters for site in backend.report.compressed]


def _qkv(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}.weight" for name in "qkv")


def test_whatever_forward_calls_its_first_argument() -> None:
    backend = _backend()
    torch.compile(Block(), backend=backend)(_x())
    assert _names(backend) == [_qkv("")]
    torch._dynamo.reset()
    backend.report.clear()
    torch.compile(Block().forward, backend=backend)(_x())
    assert _names(backend) == [_qkv("")]
    torch._dynamo.reset()
    backend.report.clear()
    block = Block()
    block.compile(backend=backend)
    block(_x())
    assert _names(backend) == [_qkv("")]


def test_a_compiled_function_names_the_variable_that_holds_the_model() -> None:
    model, models, backend = Stack(), [Block()], _backend()
    torch.compile(lambda x: model(x), backend=backend)(_x())
    assert _names(backend) == [_qkv("model.layers.0."), _qkv("model.layers.1.")]
    backend.report.clear()

    def step(net: nn.Module, x: Tensor) -> Tensor:
        return net(x) + models[0](x)

    torch.compile(step, backend=backend)(model, _x())
    assert _names(backend) == [
        _qkv("net.layers.0."), _qkv("net.layers.1."), _qkv("models.0."),
    ]  # fmt: skip


class Trainer:
    """No module, though its method's first argument is called self."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def test_a_method_of_what_is_no_module() -> None:
    trainer, backend = Trainer(Block()), _backend()
    torch.compile(trainer.step, backend=backend)(_x())
    assert _names(backend) == [_qkv("model.")]


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = inner

    def forward(self, *args: Any) -> Tensor:
        return self._checkpoint_wrapped_module(*args)


def test_wrappers_leave_no_trace_in_names() -> None:
    backend = _backend()
    model = nn.Sequential(Wrapper(torch.compile(Block(), backend=backend)))
    torch.compile(model, backend=backend)(_x())
    assert _names(backend) == [_qkv("0.")]


def _notes(backend: pamm_compile.Backend) -> list[str]:
    return [note.what for note in backend.report.notes if note.reason == "AMBIGUOUS_NAME"]


_BOTH = ", ".join(f"layers.{{0,1}}.{name}.weight" for name in "qkv")


def test_names_after_a_graph_break_are_those_of_the_compiled_model() -> None:
    backend = _backend()
    torch.compile(Stack(breaks=True), backend=backend)(_x())
    # One graph serves both layers.
    assert _names(backend) == [_qkv("layers.0.")]
    assert _notes(backend) == [_BOTH]


class InAComprehension(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return torch.cat([self.block(x)[: int(size.item())] for size in sizes])


def test_names_after_a_graph_break_in_a_comprehension() -> None:
    """Dynamo then runs code with a dict among its constants, which has no hash."""
    backend = _backend()
    model = torch.compile(InAComprehension(), backend=backend)
    model(_x(), torch.tensor([1, 2])).sum().backward()
    assert _qkv("block.") in _names(backend)


def test_patterns_are_told_that_names_after_a_graph_break_are_ambiguous() -> None:
    backend = _backend(targets=re.compile(r"layers\.0\.q"))
    torch.compile(Stack(breaks=True), backend=backend)(_x())
    (note,) = _notes(backend)
    assert "layers.{0,1}.q.weight" in note
    assert "layers.{0,1}.norm.weight" in note


class Skipping(Stack):
    """Skips layers now and then, and so breaks the graph in the loop over them."""

    way = "for"

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "function":
            for layer in self.layers:
                x = _skip_or(layer, x)
            return x
        if self.way == "arguments":
            for layer in self.layers:
                x = _skip_or_any((layer, x))
            return x
        for layer in self.layers:
            if self.way == "attribute":
                self.current = layer
            if torch.rand([]) < 0:
                continue
            x = (self.current if self.way == "attribute" else layer)(x)
        return x


def _skip_or(layer: nn.Module, x: Tensor) -> Tensor:
    return x if torch.rand([]) < 0 else layer(x)


def _skip_or_any(pair: tuple[nn.Module, Tensor]) -> Tensor:
    return pair[1] if torch.rand([]) < 0 else pair[0](pair[1])


class WithCall(Block):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "way"),
    [(Block, "for"), (WithCall, "for"), (Block, "function"), (Block, "arguments"),
     (Block, "attribute")],
)  # fmt: skip
def test_no_gradient_changes_that_is_not_listed(kind: type[Block], way: str) -> None:
    torch.manual_seed(0)
    model, x = Skipping(), torch.randn(BATCH, LENGTH, WIDTH)
    model.way = way
    model.layers = nn.ModuleList(kind() for _ in range(3))
    backend = _backend()
    grads = []
    for each in ("aot_eager", backend):
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend=each)(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    changed = {n for n, grad in grads[0].items() if not torch.equal(grad, grads[1][n])}
    assert changed >= set(_qkv("layers.2."))
    listed = {name for names in _names(backend) for name in names}
    meant = {f"layers.{i}.{n}.weight" for i in range(3) for n in "qkv" if _notes(backend)}
    assert changed <= listed | meant
    for note in _notes(backend):
        assert note == ", ".join(f"layers.{{0,1,2}}.{name}.weight" for name in "qkv")


def test_explain_says_it_too() -> None:
    report = pamm_compile.explain(Stack(breaks=True), _x(), using=_backend())
    assert [note.what for note in report.notes if note.reason == "AMBIGUOUS_NAME"] == [_BOTH]


def test_tied_and_wrapped_weights_are_no_others() -> None:
    """Reached by another name than their own, though always the same."""
    backend = _backend(targets="linear")
    model = nn.Sequential(Wrapper(Block()), Wrapper(Block()))
    model[1]._checkpoint_wrapped_module.q = model[0]._checkpoint_wrapped_module.q
    torch.compile(model, backend=backend)(_x())
    assert len(_names(backend)) == 2
    assert _notes(backend) == []


def test_patterns_are_told_nothing_where_names_are_clear() -> None:
    backend = _backend(targets=re.compile(r"layers\.0\.[qkv]"))
    torch.compile(Stack(), backend=backend)(_x())
    assert _names(backend) == [_qkv("layers.0.")]
    assert backend.report.notes == ()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['h']._modules['0']._parameters['weight']", "h.0.weight"),
        ("L['self'].model.layers[1].q_proj.weight", "model.layers.1.q_proj.weight"),
        ("L['self']._orig_mod.q.weight", "q.weight"),
        ("G['model'].q.weight", "model.q.weight"),
        ("L['self'].__dict__['_modules']['base'].q.weight", "base.q.weight"),
        ("L['args'][0]._modules['model']._parameters['q']", "model.q"),
    ],
)
def test_dynamo_sources_read_as_names(source: str, name: str) -> None:
    assert readable(source) == name
