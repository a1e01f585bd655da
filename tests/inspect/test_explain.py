"""explain(): the whole table, and a model left as it was."""

from __future__ import annotations

import pytest
import torch
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn

import pamm_compile


class _WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(LENGTH)
        self.attention = Attention(_sdpa())
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.attention(self.norm(x)))


@pytest.mark.quick
def test_explain_leaves_the_model_alone() -> None:
    model = _WithState().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generator = torch.get_rng_state()
    report = pamm_compile.explain(
        model, torch.randn(BATCH, LENGTH, WIDTH), using=pamm_compile.backend(256, min_tokens=1)
    )
    assert [s.parameters for s in report.compressed] == [
        ("attention.q.weight", "attention.k.weight", "attention.v.weight")
    ]
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    # One draw for the input above, none for the model's dropout.
    torch.set_rng_state(generator)
    torch.randn(BATCH, LENGTH, WIDTH)
    expected = torch.get_rng_state()
    torch.set_rng_state(generator)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    pamm_compile.explain(model, x)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(p.grad is None for p in model.parameters())


def test_explain_takes_a_compiled_model_and_no_grad() -> None:
    model = torch.compile(Attention(_sdpa()), backend="eager")
    with torch.no_grad():
        report = pamm_compile.explain(
            model,
            x=torch.randn(BATCH, LENGTH, WIDTH),
            using=pamm_compile.backend(256, min_tokens=1),
        )
    assert len(report.compressed) == 1


def test_explain_uses_the_names_of_the_model() -> None:
    model = nn.ModuleDict({"inner": Attention(_sdpa())})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks["inner"](x)

    report = pamm_compile.explain(
        Outer(), torch.randn(BATCH, LENGTH, WIDTH), using=pamm_compile.backend(256, min_tokens=1)
    )
    assert report.sites[0].parameters[0] == "blocks.inner.q.weight"


def test_explain_gives_the_reason_of_a_decline() -> None:
    report = pamm_compile.explain(
        Attention(_sdpa()), torch.randn(1, 8, WIDTH), using=pamm_compile.backend(256, min_tokens=64)
    )
    (site,) = report.declined
    assert site.reason == "TOO_FEW_TOKENS"
    assert "TOO_FEW_TOKENS (8 < 64)" in str(report)
