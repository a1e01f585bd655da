"""What a model is called with is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pamm_compile
from pamm_compile import InvalidOptionError


class _TakesAnything(nn.Module):
    """As models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(x).sum()


class _HasAGoal(_TakesAnything):
    def forward(self, x: Tensor, goal: Tensor, **kwargs: Any) -> Tensor:
        return (self.layer(x) - goal).sum()


@pytest.mark.parametrize("look", [pamm_compile.explain, pamm_compile.predict_saved])
@pytest.mark.parametrize("compiled", [False, True])
def test_options_do_not_go_to_the_model(look: Callable[..., Any], compiled: bool) -> None:
    model: nn.Module = _TakesAnything()
    model = torch.compile(model, backend="eager") if compiled else model
    for given in (
        {"backend": pamm_compile.backend()},
        {"plan": pamm_compile.backend()},
        {"rules": "linear=subspace"},
        {"goal": "speed"},
        {"min_tokens": 1},
    ):
        with pytest.raises(InvalidOptionError, match=r"using=pamm_compile\.backend"):
            look(model, torch.randn(4, 8), **given)


def test_fidelity_says_which_options_it_takes() -> None:
    with pytest.raises(InvalidOptionError, match=r"rules=… or methods=…"):
        pamm_compile.fidelity(_TakesAnything(), torch.randn(4, 8), using=pamm_compile.backend())


def test_a_model_may_have_arguments_of_such_names() -> None:
    x = torch.randn(4, 8)
    pamm_compile.explain(_HasAGoal(), x, goal=torch.zeros(8), other=1)
