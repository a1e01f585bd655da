"""The learned policy and its evolution, against plain loops."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from pamm_testing.decoding_models import random_policy
from torch import Tensor

from examples.benchmarks.decoding.evolve import evolve
from pamm_compile.decoding import EvictionCache, EvictionPolicy
from pamm_compile.decoding.attention import Call
from pamm_compile.errors import InvalidOptionError, MissingPackageError

MODULE: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def feed(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shared: dict[str, Any] = {}
    key, value = layer.update(key, value, kwargs=shared)
    output: Tensor = layer.attend(Call(MODULE, query, None, 0.5), key.held[0], value.held[0])
    return output


def random(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, HEADS, tokens, WIDTH, generator=generator),
        torch.randn(1, KEY_HEADS, tokens, WIDTH, generator=generator),
        torch.randn(1, KEY_HEADS, tokens, WIDTH, generator=generator),
    )


def plain_scores(policy: EvictionPolicy, spectrum: Tensor, ages: list[int]) -> Tensor:
    """Scores of one head's tokens, all of them real, without a single matrix of all tokens."""
    logs = (spectrum + 1e-6).log()
    e = (logs - logs.mean(0)) / (logs.std(0, unbiased=False) + 1e-6)
    speeds = [50_000 ** (-2 * i / 8) for i in range(4)]
    recency = [
        [math.sin(age * s) for s in speeds] + [math.cos(age * s) for s in speeds] for age in ages
    ]
    e = torch.cat([e, torch.tensor(recency)], dim=1)
    scores = []
    for token in range(len(e)):
        weights = (policy.key(e[token:]) @ policy.query(e[token]) / 2).softmax(0)
        mixed = policy.out(weights @ policy.value(e[token:]))
        scores.append(policy.score(e[token] * (1 + mixed))[0])
    return torch.stack(scores)


def test_scores_against_plain_loops() -> None:
    policy = random_policy(0.3)
    generator = torch.Generator().manual_seed(2)
    spectrum = torch.rand(12, 17, generator=generator)
    real = torch.ones(12, dtype=torch.bool)
    age = torch.arange(11, -1, -1)
    expected = plain_scores(policy, spectrum, age.tolist())
    torch.testing.assert_close(policy(spectrum, age, real), expected, rtol=1e-4, atol=1e-4)
    # Slots without a token change nothing, whatever they hold.
    holes = torch.tensor([0, 5, 14])
    at = torch.tensor([i for i in range(15) if i not in holes])
    wide = torch.full((15, 17), 7.0).index_copy(0, at, spectrum)
    wide_age = torch.full((15,), 3).index_copy(0, at, age)
    wide_real = torch.zeros(15, dtype=torch.bool).index_fill(0, at, True)
    got = policy(wide, wide_age, wide_real)[at]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [20, 300])
def test_spectrum_against_plain_loops(prompt: int) -> None:
    """The prompt is seen in blocks, later tokens one by one; frames do not depend on it."""
    tokens = prompt + 30
    query, key, value = random(tokens)
    layer: Any = EvictionCache(random_policy(1e4))._make()
    feed(layer, query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt])
    for t in range(prompt, tokens):
        at = slice(t, t + 1)
        feed(layer, query[:, :, at], key[:, :, at], value[:, :, at])
    received = torch.zeros(KEY_HEADS, tokens, tokens + 16)
    for head in range(HEADS):
        scores = query[0, head] @ key[0, head // 2].T * 0.5
        weights = scores.masked_fill(torch.ones(tokens, tokens).triu(1) > 0, -torch.inf).softmax(1)
        received[head // 2, :, 16:] += weights.T / 2
    expected = torch.zeros(KEY_HEADS, tokens, 17)
    for start in range(0, tokens + 16 - 31, 16):
        windowed = received[..., start : start + 32] * torch.hann_window(32)
        expected = 0.99 * expected + 0.01 * torch.fft.rfft(windowed).abs()
    torch.testing.assert_close(layer.state["spectrum"][0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("budget", [None, 10])
def test_keeps_what_is_wanted_and_attends_to_it_alone(budget: int | None) -> None:
    policy = random_policy(-0.2)
    query, key, value = random(60)
    layer: Any = EvictionCache(policy, budget=budget, interval=5)._make()
    watching: Any = EvictionCache(random_policy(1e4))._make()
    first = slice(0, 50)
    feed(layer, query[:, :, first], key[:, :, first], value[:, :, first])
    feed(watching, query[:, :, first], key[:, :, first], value[:, :, first])
    layer.evict_now()
    kept = []
    for head in range(KEY_HEADS):
        score = plain_scores(policy, watching.state["spectrum"][0, head], [*range(49, -1, -1)])
        score[-1] = torch.inf
        order = [int(t) for t in score.argsort(descending=True) if score[t] > 0][:budget]
        kept.append(sorted(order))
        slots = layer.state["order"][0, head]
        assert slots[slots >= 0].tolist() == kept[head]
    if budget is None:
        assert len(kept[0]) != len(kept[1])
    for t in range(50, 55):
        at = slice(t, t + 1)
        output = feed(layer, query[:, :, at], key[:, :, at], value[:, :, at])
        for head in range(HEADS):
            seen = [*kept[head // 2], *range(50, t + 1)]
            weights = (key[0, head // 2, seen] @ query[0, head, t] * 0.5).softmax(0)
            expected = weights @ value[0, head // 2, seen]
            torch.testing.assert_close(output[0, 0, head], expected)
    # With the fifth new token a decision is due.
    longest = int((layer.state["order"] >= 0).sum(2).max())
    assert longest < max(len(k) for k in kept) + 5


def test_a_policy_that_wants_nothing_keeps_the_last_token() -> None:
    query, key, value = random(20)
    layer: Any = EvictionCache(random_policy(-1e4))._make()
    feed(layer, query, key, value)
    layer.evict_now()
    assert layer.state["position"].tolist() == [[[19], [19]]]


def test_saved_and_loaded(tmp_path: Path) -> None:
    policy = random_policy()
    policy.save(tmp_path / "policy.json", evolved_on="nothing")
    loaded = EvictionPolicy.load(tmp_path / "policy.json")
    torch.testing.assert_close(loaded.flat(), policy.flat(), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "policy.json").read_text())["evolved_on"] == "nothing"
    with pytest.raises(InvalidOptionError, match="463 parameters"):
        EvictionPolicy(torch.zeros(3))


def test_the_policy_that_ships_is_in_the_package() -> None:
    policy = EvictionPolicy.shipped()
    assert policy.flat().isfinite().all()
    assert policy.flat().abs().max() > 0


def test_evolution_climbs_and_repeats() -> None:
    target = torch.linspace(-1, 1, EvictionPolicy.size)

    def evaluate(policy: EvictionPolicy) -> float:
        calls.append(1)
        return -float((policy.flat() - target).square().mean())

    calls: list[int] = []
    before = numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = evolve(evaluate, generations=12, population=8, sigma=0.3, centre_every=6)
    assert before == (numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert [g.evaluations for g in found.generations] == [8 * n + n // 6 for n in range(1, 13)]
    assert len(calls) == found.generations[-1].evaluations
    centres = [g.centre for g in found.generations if g.centre is not None]
    assert len(centres) == 2
    assert evaluate(EvictionPolicy()) < centres[0] < centres[1]
    assert evaluate(found.policy) == pytest.approx(centres[1], abs=1e-4)
    again = evolve(evaluate, generations=2, population=8, sigma=0.3)
    other = evolve(evaluate, generations=2, population=8, sigma=0.3, seed=1)
    assert again.generations[1].best == found.generations[1].best
    assert other.generations[1].best != found.generations[1].best


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOptionError, match="interval"):
        EvictionCache(random_policy(), interval=0)
    with pytest.raises(InvalidOptionError, match="budget"):
        EvictionCache(random_policy(), budget=0)
    with pytest.raises(InvalidOptionError, match="sigma"):
        evolve(lambda policy: 0.0, sigma=0.0)
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MissingPackageError, match=r"pamm-compile\[decoding\]"):
        evolve(lambda policy: 0.0)
