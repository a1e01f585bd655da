"""What a method may not do: each a sentence that names the method, whatever strict is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pamm_compile
from pamm_compile import Cost, MethodError, Size

WIDTH = 8


class Half:
    """Every second row, and a place for what a test does wrong."""

    fingerprint = "1"

    def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Any:
        return (2 * x[::2],)

    def weight_gradients(
        self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
    ) -> Any:
        made = [grad[::2].T @ stored[0] for grad in grads]
        return [each.T if flip else each for each, flip in zip(made, transposed, strict=True)]

    def stored_bytes(self, size: Size) -> int:
        return size.bytes // 2

    def cost(self, size: Size) -> Cost:
        return Cost(1, 1, 1)

    def describe(self, size: Size) -> str:
        return "half"


def _storing(function: Callable[[Tensor], Any]) -> Half:
    class Mine(Half):
        def store(self, x: Tensor, seed: Tensor, outputs: Sequence[int]) -> Any:
            return function(x)

    return Mine()


def _making(function: Callable[[Sequence[Tensor], Sequence[Tensor], list[Tensor]], Any]) -> Half:
    class Mine(Half):
        def weight_gradients(
            self, stored: Sequence[Tensor], grads: Sequence[Tensor], transposed: Sequence[bool]
        ) -> Any:
            return function(stored, grads, super().weight_gradients(stored, grads, transposed))

    return Mine()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH))


def _refused(method: Half, **options: Any) -> str:
    backend = pamm_compile.backend(
        rules={"linear": method}, min_tokens=1, base="aot_eager", **options
    )
    with pytest.raises(Exception, match="MethodError") as error:
        torch.compile(_model(), backend=backend)(torch.randn(32, WIDTH)).square().mean().backward()
    inner = getattr(error.value, "inner_exception", error.value)
    assert isinstance(inner, MethodError)
    return str(inner)


def _in_place(x: Tensor) -> tuple[Tensor]:
    x.zero_()
    return (x[::2].clone(),)


def _through_a_view(x: Tensor) -> tuple[Tensor]:
    x.view(2, -1)[0].mul_(2)
    return (x[::2].clone(),)


def _through_data(x: Tensor) -> tuple[Tensor]:
    x.data.T[0] = 1
    return (x[::2].clone(),)


def _out(x: Tensor) -> tuple[Tensor]:
    torch.add(x, 1, out=x)
    return (x[::2].clone(),)


def _several(x: Tensor) -> tuple[Tensor]:
    torch._foreach_mul_([x.clone(), x], 2)
    return (x[::2].clone(),)


WRITES = [_in_place, _through_a_view, _through_data, _out, _several]


@pytest.mark.parametrize("function", WRITES)
def test_writing_to_x(function: Callable[[Tensor], Any]) -> None:
    assert re.match(r"Mine\.store writes to x in place \(aten\.\w+", _refused(_storing(function)))


@pytest.mark.parametrize("function", WRITES[:2])
def test_fidelity_refuses_it_too(function: Callable[[Tensor], Any]) -> None:
    with pytest.raises(MethodError, match=r"Mine\.store writes to x in place"):
        pamm_compile.fidelity(
            _model(),
            torch.randn(32, WIDTH),
            methods=[_storing(function)],
            loss=lambda out: out.square().mean(),
        )


def test_writing_to_a_gradient_or_to_what_is_stored() -> None:
    message = _refused(_making(lambda stored, grads, made: (grads[0].T.relu_(), made)[1]))
    assert message.startswith("Mine.weight_gradients writes to grads[0] in place")
    message = _refused(_making(lambda stored, grads, made: (stored[0].zero_(), made)[1]))
    assert message.startswith("Mine.weight_gradients writes to stored[0] in place")


def test_writing_to_ones_own_tensors_is_allowed() -> None:
    def store(x: Tensor) -> tuple[Tensor]:
        kept = torch.empty_like(x[::2])
        kept.copy_(x[::2])
        return (kept.mul_(2),)

    grads = []
    for method in (_storing(store), Half()):
        model = _model()
        backend = pamm_compile.backend(rules={"linear": method}, min_tokens=1, base="aot_eager")
        torch.compile(model, backend=backend)(torch.randn(32, WIDTH)).square().mean().backward()
        assert len(backend.report.compressed) == 1
        grads.append(model[1].weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[::2] * (1 + int(x.sum() > 0)),),
        lambda x: (x[::2] if x[0, 0] > 0 else 2 * x[::2],),
        lambda x: (x[x[:, 0] > 0],),
        lambda x: (x[::2] * x.sum().item(),),
        lambda x: (x[::2], x.nonzero()),
    ],
    ids=["int", "if", "boolean index", "item", "nonzero"],
)
def test_code_that_depends_on_values(function: Callable[[Tensor], Any], strict: bool) -> None:
    assert _refused(_storing(function), strict=strict).startswith("Mine.store depends on values")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: x[::2],
            r"Mine\.store returned a tensor \[16, 8\] .*`return \(tensor,\)`",
        ),
        (lambda x: (), r"Mine\.store returned an empty tuple"),
        (lambda x: None, r"Mine\.store returned a NoneType"),
        (lambda x: (x[::2], 3), r"Mine\.store returned a int in its tuple"),
        (lambda x: x @ x, r"Mine\.store raised \w*Error: .*"),
    ],
)
def test_other_results_of_store(function: Callable[[Tensor], Any], message: str) -> None:
    assert re.match(message, _refused(_storing(function)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: [*made, made[0]], r"2 results for 1 projection"),
        (lambda made: [], r"0 results for 1 projection"),
        (lambda made: made[0], r"a tensor .* for 1 projection"),
        (lambda made: [each.T for each in made], r"a tensor \[8, 16\] .* is \[16, 8\]"),
        (lambda made: [each.reshape(-1) for each in made], r"a tensor \[128\] .* is \[16, 8\]"),
        (lambda made: [each[None] for each in made], r"a tensor \[1, 16, 8\] .* is \[16, 8\]"),
        (lambda made: [each.half() for each in made], r"torch\.float16 .* torch\.float32"),
        (lambda made: [each.double() for each in made], r"torch\.float64 .* torch\.float32"),
        (lambda made: [each.int() for each in made], r"torch\.int32 .* torch\.float32"),
        (lambda made: [None], r"a NoneType for projection 0"),
    ],
)
def test_other_results_of_weight_gradients(
    change: Callable[[list[Tensor]], Any], message: str
) -> None:
    found = _refused(_making(lambda stored, grads, made: change(made)))
    assert re.match(rf"Mine\.weight_gradients returned .*{message}", found), found
