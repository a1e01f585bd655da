"""Errors of methods on a batch, and what is chosen by them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pamm_compile import (
    GradientSubspace,
    InvalidOptionError,
    MeasurementError,
    Pamm,
    Subspace,
    fidelity,
    recommend,
)
from pamm_compile.methods.base import Method

TOKENS, WIDTH = 96, 16


class Block(nn.Module):
    """Attention, then a linear layer beside another one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(1, TOKENS, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        mixed = self.dropout(mixed.transpose(1, 2).reshape(TOKENS, WIDTH))
        return (self.out(mixed) + self.frozen(x)).square().mean()


def build() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block(), torch.randn(TOKENS, WIDTH)


METHODS: list[Method] = [
    Subspace(WIDTH, bits=None),
    Pamm(1),
    Subspace(4),
    Pamm(32),
]


def test_every_method_is_compared_at_every_site_and_nothing_changes() -> None:
    model, x = build()
    model.out.weight.grad = torch.ones_like(model.out.weight)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    random = torch.get_rng_state()
    found = fidelity(model, x, methods=METHODS, draws=3)

    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(model.out.weight.grad, torch.ones_like(model.out.weight))
    assert model.qkv.weight.grad is None

    assert {row.parameters for row in found.sites} == {("qkv.weight",), ("out.weight",)}
    assert [row.method for row in found.sites] == [*map(str, METHODS)] * 2
    for row in found.sites:
        assert row.shape == (TOKENS, WIDTH)
        assert row.error**2 == pytest.approx(row.bias**2 + row.noise**2, abs=1e-9)
        assert row.bytes_exact == 4 * TOKENS * WIDTH
        if row.method in (str(METHODS[0]), str(METHODS[1])):
            assert row.error < 1e-5
            assert row.cosine == pytest.approx(1)
            assert math.isnan(row.lasting) or row.lasting == pytest.approx(1)
        else:
            assert 0.05 < row.error < 1.5
            assert row.cosine < 0.999
            assert row.bytes_stored < row.bytes_exact
    assert {row.target for row in found.sites if "qkv.weight" in row.parameters} == {"qkv"}

    text = found.text()
    assert "qkv.weight" in text
    assert "k = 3" in text
    assert json.loads(found.to_json())["sites"][0]["parameters"] == ["qkv.weight"]
    assert len(found.plot().axes) == len(found.targets)


def test_what_gradients_have_in_common_is_told_from_their_noise() -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 32, bias=False)
    # One direction with a gradient that all tokens share, the others with none but noise.
    x = torch.randn(900, 32)
    x[:, 0] = 3.0
    push = 3 * torch.randn(900, 32) + 2.0

    def loss(output: Tensor) -> Tensor:
        return (output * push).sum()

    methods = [GradientSubspace(2)]
    rows = fidelity(model, x, methods=methods, draws=1, loss=loss).sites
    for row in rows:
        # What is lost is noise nearly alone.
        assert row.error > 5 * abs(1 - row.lasting)
        assert row.lasting == pytest.approx(1, abs=0.1)


def test_what_is_remembered_is_of_other_tokens() -> None:
    model, x = build()
    (row, *_) = fidelity(model, x, methods=[GradientSubspace(4)], draws=2).sites
    assert 0.1 < row.error < 1
    assert row.noise == 0
    assert row.described.startswith("r = 4, 1 of 10 in 8 bits")


def test_errors_are_those_of_the_methods() -> None:
    model, x = build()
    model.eval()
    (row,) = (
        row
        for row in fidelity(model, x, rules={"qkv": Subspace(4, bits=None)}, draws=1).sites
        if row.target == "qkv"
    )
    assert math.isnan(row.noise)
    # X = norm(x), and its best four directions bound what four can do from below.
    normed = model.norm(x)
    seen: dict[str, Tensor] = {}
    model.qkv.register_full_backward_hook(lambda _m, _i, out: seen.update(dz=out[0]))
    model(x).backward()
    exact = model.qkv.weight.grad
    assert exact is not None
    basis = torch.linalg.svd(normed, full_matrices=False).Vh[:4]
    best = seen["dz"].T @ normed @ basis.T @ basis
    assert row.error > 0.5 * float((best - exact).detach().norm() / exact.norm())
    assert row.error < 1


def test_the_cheapest_that_is_close_enough_is_chosen() -> None:
    model, x = build()
    found = recommend(model, x, max_error=1e-4, methods=METHODS)
    # Both are exact; PAMM with a generator a token stores more.
    assert set(found.rules.values()) == {METHODS[0]}
    assert "qkv" in found.rules
    assert recommend(model, x, max_error=10, methods=METHODS).rules["qkv"] == min(
        METHODS, key=lambda m: [r.bytes_stored for r in found.fidelity.sites if r.method == str(m)]
    )
    assert set(recommend(model, x, max_error=1e-9, methods=METHODS[2:]).rules.values()) == {None}
    assert str(METHODS[0]) in str(found)


@pytest.mark.parametrize("given", [{}, {"rules": "qkv=pamm", "methods": [Pamm()]}, {"methods": []}])
def test_it_is_told_what_to_compare(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match="either rules"):
        fidelity(*build(), **given)


def test_what_cannot_be_measured_is_said() -> None:
    model, x = build()
    with pytest.raises(MeasurementError, match="pass loss="):
        fidelity(nn.Linear(WIDTH, 4), x, methods=METHODS)
    with pytest.raises(MeasurementError, match="nothing to compare"):
        fidelity(model, x, rules={"mlp": None, "linear": None})
    with pytest.raises(InvalidOptionError, match="max_error=0"):
        recommend(model, x, max_error=0)
    found = fidelity(nn.Linear(WIDTH, 4), x, methods=METHODS[:1], loss=lambda out: out.sum())
    assert len(found.sites) == 1


def test_the_least_error_in_a_time_is_chosen_for_all_targets_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    x = torch.randn(4096, 256)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    few, many = (GradientSubspace(r) for r in (8, 64))
    methods = [few, many, Subspace(256, bits=None)]
    chosen = recommend(model, x, time=0.9, methods=methods, draws=1, loss=loss)
    slow = recommend(model, x, time=0.999, methods=methods, draws=1, loss=loss)
    never = recommend(model, x, time=0.01, methods=methods, draws=1, loss=loss)
    assert chosen.predicted_time <= 0.9
    assert list(chosen.rules.values()) == [many]
    assert never.predicted_time <= chosen.predicted_time <= slow.predicted_time < 1
    assert list(never.rules.values()) == [few]
    assert "0.9 of a step's time" in chosen.text()
    assert chosen.to_dict()["max_error"] is None
    assert chosen.renewed(model, x).rules == chosen.rules


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs one of task"),
        ({"max_error": 0.2, "time": 0.8}, "needs one of task"),
        ({"task": "tuning", "max_error": 0.2}, "needs one of task"),
        ({"task": "tune"}, "task='tune' is not allowed.*Did you mean 'tuning'"),
        ({"time": 1.5}, "time"),
    ],
)
def test_a_task_an_error_or_a_time_is_asked_for(options: dict[str, Any], said: str) -> None:
    model, x = build()
    with pytest.raises(InvalidOptionError, match=said):
        recommend(model, x, **options)
