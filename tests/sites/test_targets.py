"""The named targets, over many architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from unittest import mock

import pytest
import torch
from pamm_testing.architectures import ARCHITECTURES, Architecture
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.graphs import look
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F

from pamm_compile import InvalidOptionError, Pamm, fidelity
from pamm_compile.environment import options_from_environment
from pamm_compile.rules import parse_rules
from pamm_compile.targets import TARGETS, Target, Use


def _matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    names = list(names)
    found = {name for name in names if any(re.search(p, name) for p in patterns)}
    for pattern in patterns:
        assert any(re.search(pattern, name) for name in found), f"{pattern} matches no parameter"
    return found


LIKE_OTHERS = {
    "gemma": "granite olmo2 smollm3 starcoder2",
    "mixtral": "qwen3_moe gpt_oss",
    "phi": "cohere2 falcon gptj",
    "electra": "xlm_roberta",
    "siglip": "dinov2",
    "marian": "mbart pegasus",
}
"""What is much like another, in what reads what."""
REPEATED = {name for names in LIKE_OTHERS.values() for name in names.split()}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.everything] if c.name in REPEATED else [])
        for c in ARCHITECTURES
    ],
)
def test_targets_of_architectures(case: Architecture) -> None:
    if case.library:
        pytest.importorskip(case.library, reason="of the extra [diffusion]")
    model = case.build().train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = look(model, case.batch())

    qkv, output = _matching(case.qkv, names), _matching(case.output, names)
    assert found.held("qkv") == qkv
    assert found.held("attention") == qkv | output
    assert found.held("mlp") == _matching(case.mlp, names)
    assert found.held("head") == _matching(case.head, names)

    exact = {n: reason for p, reason in case.exact.items() for n in _matching([p], names)}
    assert {n: r for n, r in found.reasons.items() if n in qkv} == exact
    # A packed weight may be exact for queries made of parameters, and compressed for the rest.
    assert found.compressed - exact.keys() == qkv - exact.keys()
    assert len(found.decision.accepted) == case.sites
    unread = {n: t for p, t in case.unread.items() for n in _matching([p], names)}
    assert {
        w.name: target
        for each in found.match.unmatched
        for w in each.parameters
        for target in TARGETS
        if target != "linear" and TARGETS[target].has(each.uses)
    } == unread
    assert not any(p.unclear for p in found.match.projections)


class _Block(nn.Module):
    """A block with low-rank additions, and an MLP of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(_sdpa())
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.modulate = nn.Linear(WIDTH, 2 * WIDTH)
        self.classify = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.attention(x)
        scale, shift = self.modulate(F.silu(condition))[:, None].chunk(2, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        x = x + self.down(F.silu(self.gate(h)) * (self.up(h) + self.b(self.a(h))))
        return self.classify(x.mean(1)).logsumexp(-1).mean()


@pytest.mark.quick
def test_adapters_belong_to_what_they_adapt_and_conditioning_to_nothing() -> None:
    batch = {"x": torch.randn(BATCH, LENGTH, WIDTH), "condition": torch.randn(BATCH, WIDTH)}
    found = look(_Block(), batch)
    weights = {f"{name}.weight" for name in ("gate", "up", "down", "a", "b")}
    assert found.held("mlp") == weights
    assert found.held("head") == {"classify.weight"}
    assert found.held("attention") == {f"attention.{name}.weight" for name in "qkvo"}
    assert "modulate.weight" in found.held("linear")
    assert len(found.held("linear")) == 11


class _Gated(nn.Module):
    """Attention whose output is gated; experts chosen by weights of a router."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.router = nn.Linear(WIDTH, 2)
        self.up, self.down = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (WIDTH,))
        y = F.scaled_dot_product_attention(*(t(h).unsqueeze(1) for t in (self.q, self.k, self.v)))
        x = x + self.o(y[:, 0] * self.g(h).sigmoid())
        h = F.layer_norm(x, (WIDTH,))
        weights = self.router(h).softmax(-1)
        parts = [d(F.gelu(u(h))) for u, d in zip(self.up, self.down, strict=True)]
        mixed = sum(p * weights[..., i, None] for i, p in enumerate(parts))
        return (x + mixed).square().mean()


def test_gates_belong_to_attention_and_experts_to_the_mlp() -> None:
    found = look(_Gated(), {"x": torch.randn(BATCH, LENGTH, WIDTH)})
    assert found.held("attention") == {f"{name}.weight" for name in "qkvgo"}
    experts = {f"{name}.{i}.weight" for name in ("up", "down") for i in range(2)}
    assert found.held("mlp") == experts
    assert found.held("linear") - found.held("mlp") - found.held("attention") == {"router.weight"}


def test_a_named_target_is_an_entry_of_one_table() -> None:
    """What docs/extending.md says of adding one: targets.py, and nothing else."""
    behind = Target("what reads the output of attention", frozenset({Use.READS_ATTENTION}))
    # In front: reports name the first target that holds a projection.
    with mock.patch.dict(TARGETS, {"behind": behind, **TARGETS}, clear=True):
        _check_behind()


def _check_behind() -> None:
    model, inputs = _Gated(), {"x": torch.randn(BATCH, LENGTH, WIDTH)}
    found = look(model, inputs, "behind=pamm:4, /router/=exact")
    assert found.held("behind") == {"o.weight", "g.weight"}
    assert options_from_environment({"PAMM_COMPILE_TARGETS": "behind"}) == {"targets": "behind"}
    with pytest.raises(InvalidOptionError, match="Did you mean 'behind'"):
        parse_rules("behnd=pamm:4")
    rows = fidelity(model, **inputs, methods=[Pamm(4)], draws=1).sites
    assert {n for row in rows if row.target == "behind" for n in row.parameters} == {"o.weight"}


def test_a_stack_of_layers_without_a_stream_has_no_clear_target() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    found = look(model, {"input": torch.randn(8, WIDTH)}, "mlp=pamm:4")
    assert found.reasons == dict.fromkeys(("0.weight", "2.weight"), "UNCLEAR_TARGET") | {
        "targets": "NOT_A_PROJECTION"
    }
