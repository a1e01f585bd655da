"""Looking at a model puts everything back that running it changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pamm_compile
from pamm_compile import MeasurementError, Pamm

WIDTH, TOKENS = 16, 64


class Restless(nn.Module):
    """Changes all that a module can change while it runs."""

    none_yet: Tensor | None
    to_be_deleted: Tensor

    def __init__(self, steady: bool = False) -> None:
        super().__init__()
        # What is called many times may not ask for a new graph at every call.
        self.steady = steady
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("none_yet", None)
        self.register_buffer("to_be_deleted", torch.ones(2))
        self.register_buffer("average", torch.zeros(WIDTH), persistent=False)
        self.plain, self.count, self.history = torch.zeros(2), 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        self.in_place.add_(1)
        self.none_yet = torch.ones(3)
        self.average.data.copy_(x.detach().mean(0))
        self.plain.add_(1)
        if not self.steady:
            self.count += 1
            self._outside()
        out: Tensor = self.head(self.drop(self.layer(self.norm(x)).relu()))
        return out.square().mean()

    @torch._dynamo.disable
    def _outside(self) -> None:
        if hasattr(self, "to_be_deleted"):
            del self.to_be_deleted
        self.history.append(len(self.history))
        self.register_buffer("added", torch.ones(1))
        self.late = nn.Linear(2, 2)
        self.drop.eval()
        random.random()
        np.random.rand()
        torch.rand(1)


def _look_explain(model: nn.Module, x: Tensor) -> None:
    pamm_compile.explain(model, x)


def _look_fidelity(model: nn.Module, x: Tensor) -> None:
    pamm_compile.fidelity(model, x, methods=[Pamm(4)], draws=1)


def _look_recommend(model: nn.Module, x: Tensor) -> None:
    pamm_compile.recommend(model, x, max_error=0.5, methods=[Pamm(4)], draws=1)


def _look_predict(model: nn.Module, x: Tensor) -> None:
    pamm_compile.predict_saved(model, x)


def _look_compare(model: nn.Module, x: Tensor) -> None:
    backend = pamm_compile.backend(base="aot_eager")
    pamm_compile.compare_memory(model, lambda model: model(x), backend=backend, steps=0)


def _state(model: nn.Module, x: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {f"buffer {name}": each for name, each in model.named_buffers()}
    found |= {f"in {n}.{k}": v for n, m in model.named_modules() for k, v in vars(m).items()}
    found |= {f"gradient {name}": each.grad for name, each in model.named_parameters()}
    found |= {"x": x, "gradient x": x.grad, "torch": torch.get_rng_state()}
    state = np.random.get_state()
    found |= {"python": random.getstate(), "numpy": (state[0], state[1].tolist(), *state[2:])}
    return found


def _kept(state: dict[str, Any]) -> dict[str, tuple[int, Any]]:
    """What each is, and a copy of what is in it."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().tolist()
        return value.copy() if isinstance(value, dict | list | set) else value

    fresh = ("torch", "python", "numpy")
    return {k: (0 if k in fresh else id(value), copy(value)) for k, value in state.items()}


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    "look", [_look_explain, _look_fidelity, _look_recommend, _look_predict, _look_compare]
)
def test_everything_is_put_back(look: Callable[[nn.Module, Tensor], None]) -> None:
    model = Restless(steady=look is _look_compare)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    x.grad = torch.ones_like(x)
    called: list[str] = []
    if not model.steady:
        # Dynamo guards on the length of the list.
        model.layer.register_forward_hook(lambda *_: called.append("forward"))
    model.layer.weight.register_hook(lambda _: called.append("gradient"))
    model.layer.weight.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    x.register_hook(lambda _: called.append("input"))
    state = _state(model, x)
    kept = _kept(state)

    look(model, x)

    assert _kept(_state(model, x)) == kept
    if look is _look_compare:
        # Its inputs are the caller's affair.
        assert set(called) == {"input"}
    else:
        assert called == ["forward"]
    # Hooks are back as well.
    model(x).backward()
    assert {"gradient", "accumulated", "input"} <= set(called)


def test_it_is_put_back_after_an_error() -> None:
    class Failing(Restless):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("on purpose")

    model, x = Failing(), torch.randn(TOKENS, WIDTH)
    kept = _kept(_state(model, x))
    with pytest.raises(ValueError, match="on purpose"):
        pamm_compile.explain(model, x)
    assert _kept(_state(model, x)) == kept


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def test_a_model_on_the_meta_device_is_predicted_as_a_fake_one() -> None:
    backend = pamm_compile.backend(rules="linear=pamm:8", min_tokens=1, goal="any")
    found = []
    for place in (torch.device("meta"), torch._subclasses.FakeTensorMode()):
        with place:
            model, x = _block(), torch.randn(TOKENS, WIDTH)
        parameters = [*model.parameters()]
        for using in ("exact", backend):
            found.append(pamm_compile.predict_saved(model, x, using=using).saved_bytes)
        after = zip(model.parameters(), parameters, strict=True)
        assert all(each is before for each, before in after)
    assert found[:2] == found[2:]
    assert 0 < found[1] < found[0]


@pytest.mark.parametrize("place", [torch.device("meta"), torch._subclasses.FakeTensorMode()])
def test_measuring_needs_values(place: Any) -> None:
    with place:
        model, x = _block(), torch.randn(TOKENS, WIDTH)
    backend = pamm_compile.backend()
    for measure in (
        lambda: pamm_compile.fidelity(model, x, rules="linear=pamm", loss=torch.sum),
        lambda: pamm_compile.recommend(model, x, max_error=0.1, loss=torch.sum),
        lambda: pamm_compile.compare_memory(model, lambda m: m(x).sum(), backend=backend),
    ):
        with pytest.raises(MeasurementError, match="needs values"):
            measure()
