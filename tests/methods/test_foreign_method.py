"""A complete method of somebody else's, in some thirty lines, and what the package makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from pamm_testing.forms import FusedQKV
from pamm_testing.graphs import step
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor

import pamm_compile
from pamm_compile import Cost, Size, methods
from pamm_compile.driver import make_pipeline


@dataclass(frozen=True)
class EverySecondRow:
    """Keep every second row of X, and count it twice."""

    offset: int = 0

    @property
    def fingerprint(self) -> str:
        return str(self.offset)

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return (2 * x[self.offset :: 2],)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        (rows,) = stored
        kept = [grad[self.offset :: 2] for grad in grads]
        made = [grad.T @ rows for grad in kept]
        return [each.T if flip else each for each, flip in zip(made, transposed, strict=True)]

    def stored_bytes(self, size: Size) -> int:
        return -(-(size.tokens - self.offset) // 2) * size.features * size.dtype.itemsize

    def cost(self, size: Size) -> Cost:
        flops = size.tokens * size.features * sum(size.outputs)
        return Cost(flops, size.bytes, 1 + len(size.outputs))

    def describe(self, size: Size) -> str:
        return "every second row"


def _run(backend: object) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = FusedQKV()
    batch = {"x": torch.randn(BATCH, LENGTH, WIDTH)}
    run = step(model, torch.compile(model, backend=backend), batch, lambda out: out.square().mean())
    torch._dynamo.reset()
    return run.loss, run.grads


@dataclass(frozen=True)
class Everything(EverySecondRow):
    """Keep X as it is."""

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> tuple[Tensor, ...]:
        return (x,)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> list[Tensor]:
        made = [grad.T @ stored[0] for grad in grads]
        return [each.T if flip else each for each, flip in zip(made, transposed, strict=True)]


@pytest.mark.parametrize("first", [False, True], ids=["input of the graph", "made in it"])
def test_what_is_stored_may_be_the_input_itself(first: bool) -> None:
    layer = torch.nn.Linear(WIDTH, WIDTH)
    model = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), layer) if first else layer
    x, found = torch.randn(BATCH * LENGTH, WIDTH), []
    ours = pamm_compile.backend(
        rules={"linear": Everything()}, min_tokens=1, goal="any", base="aot_eager"
    )
    ours.report.clear()
    for backend in ("aot_eager", ours):
        torch._dynamo.reset()
        layer.zero_grad()
        torch.compile(model, backend=backend)(x).square().mean().backward()
        found.append(layer.weight.grad.clone())  # type: ignore[union-attr]
    assert len(ours.report.compressed) == 1
    torch.testing.assert_close(*found)


def test_it_works_end_to_end() -> None:
    backend = pamm_compile.backend(
        rules={"qkv": EverySecondRow()}, min_tokens=1, goal="memory", base="aot_eager"
    )
    backend.report.clear()
    exact_loss, exact = _run("aot_eager")
    loss, grads = _run(backend)
    (site,) = backend.report.compressed
    assert site.method == "every second row"
    assert site.bytes_after * 2 == site.bytes_before
    assert "every second row" in str(backend.report)

    assert torch.equal(loss, exact_loss)
    changed = {name for name, grad in exact.items() if not torch.equal(grad, grads[name])}
    assert changed == set(site.parameters)

    # What it is to compute, from the same X and dZ.
    torch.manual_seed(0)
    model = FusedQKV()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    seen: dict[str, Tensor] = {}
    model.c_attn.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model.c_attn.register_full_backward_hook(lambda _, __, grad: seen.update(dz=grad[0]))
    model(x).square().mean().backward()
    rows, dz = (seen[name].flatten(0, -2)[::2] for name in ("x", "dz"))
    expected = 2 * (dz.T @ rows)
    got = grads[site.parameters[0]]
    torch.testing.assert_close(got, expected if got.shape == expected.shape else expected.T)


def test_explain_shows_it() -> None:
    backend = pamm_compile.backend(rules={"qkv": EverySecondRow(1)}, min_tokens=1)
    report = pamm_compile.explain(FusedQKV(), torch.randn(BATCH, LENGTH, WIDTH), using=backend)
    assert [site.method for site in report.compressed] == ["every second row"]
    assert report.sites[0].time is not None


def test_rules_as_text_find_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr("pamm_compile.rules.METHODS", methods.METHODS)
    pamm_compile.register_method("second", EverySecondRow)
    assert pamm_compile.backend(rules="qkv=second:1").options.rules[0].method == EverySecondRow(1)


def test_cache_keys_tell_it_from_every_other() -> None:
    @dataclass(frozen=True)
    class Impostor(EverySecondRow):
        """Declares the same fingerprint."""

    def uuid(method: EverySecondRow) -> str:
        backend = pamm_compile.backend(rules={"qkv": method})
        return make_pipeline(backend.options, {}).uuid()

    assert uuid(EverySecondRow()) == uuid(EverySecondRow())
    assert len({uuid(EverySecondRow()), uuid(EverySecondRow(1)), uuid(Impostor())}) == 3
