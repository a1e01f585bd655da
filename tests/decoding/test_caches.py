"""Every cache through `model.generate`: four classes, padding, beams, compiled, and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pamm_testing.decoding_models import CLASSES, build, generate, prompt, random_policy, same

from pamm_compile import decoding
from pamm_compile.errors import CacheStateError, InvalidOptionError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

# From a budget in tokens; nothing is whole, so that every layer chooses.
CACHES: dict[str, Callable[[int], Any]] = {
    "clusters": lambda n: decoding.ClusterCache(
        n, sinks=2, tokens_per_cluster=4, interval=3, whole_layers=0
    ),
    "offloaded": lambda n: decoding.ClusterCache(
        n, sinks=2, tokens_per_cluster=4, whole_layers=1, offload=True
    ),
    "pages": lambda n: decoding.PageCache(n, page=4, whole_layers=0),
    "window": lambda n: decoding.WindowCache(n),
    "heavy hitters": lambda n: decoding.HeavyHitterCache(n),
    "norms": lambda n: decoding.NormCache(n, whole_layers=1),
    # Wants everything where there is room.
    "policy": lambda n: decoding.EvictionCache(random_policy(1e4), budget=n, interval=2),
}
KEEPING = ("clusters", "offloaded", "pages")


@pytest.mark.parametrize("name", CLASSES)
def test_full_budget_is_the_model_itself(name: str) -> None:
    model = build(name)
    inputs = prompt(padded=5)
    expected = generate(model, inputs)
    decoding.attach(model)
    same(generate(model, inputs), expected)
    for make in CACHES.values():
        same(generate(model, inputs, past_key_values=make(100)), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_all_clusters_chosen_changes_nothing(name: str) -> None:
    model = build(name)
    inputs = prompt(padded=5)
    expected = generate(model, inputs)
    # One token more than the budget from the first step on, and that token is not in a cluster.
    cache = decoding.ClusterCache(40, sinks=2, tokens_per_cluster=4, whole_layers=0)
    same(generate(decoding.attach(model), inputs, past_key_values=cache), expected)
    assert all(layer.state["sizes"].sum() > 0 for layer in cache.layers)


@pytest.mark.parametrize("name", CLASSES)
def test_padding_does_not_change_what_is_chosen(name: str) -> None:
    model = decoding.attach(build(name))
    both = prompt(padded=7)
    alone = {key: tensor[1:, 7:] for key, tensor in both.items()}
    plain = generate(model, alone).logits[-1]
    for cache_name, make in CACHES.items():
        if cache_name in ("pages", "policy"):
            # Pages and frames count from the first slot, so that padding moves their borders.
            continue
        together = generate(model, both, past_key_values=make(12))
        single = generate(model, alone, past_key_values=make(12))
        assert torch.equal(together.sequences[1, 40:], single.sequences[0, 33:])
        torch.testing.assert_close(together.logits[-1][1:], single.logits[-1], rtol=1e-4, atol=1e-4)
        assert (single.logits[-1] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("cache", CACHES)
def test_beam_search(cache: str) -> None:
    model = build("llama")
    inputs = prompt(padded=5)
    beams = {"num_beams": 3, "max_new_tokens": 5}
    expected = generate(model, inputs, **beams)
    decoding.attach(model)
    got = generate(model, inputs, past_key_values=CACHES[cache](100), **beams)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)


def test_compiled() -> None:
    model = decoding.attach(build("llama"))
    short = {"max_new_tokens": 3}
    expected = [generate(model, prompt(), past_key_values=m(12), **short) for m in CACHES.values()]
    model.forward = torch.compile(model.forward, backend="aot_eager")
    for make, eager in zip(CACHES.values(), expected, strict=True):
        same(generate(model, prompt(), past_key_values=make(12), **short), eager)


@pytest.mark.parametrize("cache", CACHES)
def test_thin_keys_in_a_cache_that_chooses(cache: str) -> None:
    model = build("llama")
    inputs = prompt()
    decoding.attach(decoding.factor_keys(model, 4, rotary="pairs"))
    same(
        generate(model, inputs, past_key_values=CACHES[cache](100)),
        generate(model, inputs),
    )
    generate(model, inputs, past_key_values=CACHES[cache](12))


@pytest.mark.parametrize("cache", CACHES)
def test_assisted_generation(cache: str) -> None:
    model, assistant = build("llama"), build("llama", num_hidden_layers=1)
    inputs = prompt(batch=1)
    expected = generate(model, inputs, max_new_tokens=6)
    decoding.attach(model)
    settings = {"assistant_model": assistant, "max_new_tokens": 6}
    if cache in KEEPING:
        got = generate(model, inputs, past_key_values=CACHES[cache](100), **settings)
        assert torch.equal(got.sequences, expected.sequences)
    else:
        with pytest.raises(ValueError, match="can be cropped"):
            generate(model, inputs, past_key_values=CACHES[cache](100), **settings)


def test_first_layers_are_whole() -> None:
    model = decoding.attach(build("llama"))
    cache = decoding.ClusterCache(12, sinks=2)
    generate(model, prompt(), past_key_values=cache)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "WholeLayer",
        "WholeLayer",
        "ClusterLayer",
    ]


@pytest.mark.parametrize("cache", CACHES)
def test_model_that_is_not_attached(cache: str) -> None:
    with pytest.raises(CacheStateError, match="attach"):
        generate(build("llama"), prompt(), past_key_values=CACHES[cache](12))


def test_models_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        decoding.attach(build("mistral", sliding_window=16))
    model = decoding.attach(build("llama"))
    model.train()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(CacheStateError, match=r"model\.eval"):
        model(**prompt(), cache=CACHES["window"](12))
    with pytest.raises(UnsupportedModelError, match="masks of allowed tokens"):
        model.eval()(
            prompt()["input_ids"],
            attention_mask=torch.zeros(2, 1, 40, 40),
            cache=CACHES["window"](12),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoding.ClusterCache(16), "budget must be an integer of at least 17"),
        (lambda: decoding.ClusterCache(16.5), "budget must be an integer"),
        (lambda: decoding.ClusterCache(64, interval=0), "interval"),
        (lambda: decoding.ClusterCache(64, tokens_per_cluster=0), "tokens_per_cluster"),
        (lambda: decoding.ClusterCache(64, sample=0), "sample"),
        (lambda: decoding.PageCache(31), "budget must be an integer of at least 32"),
        (lambda: decoding.WindowCache(4), "budget must be an integer of at least 5"),
        (lambda: decoding.HeavyHitterCache(8, recent=9), "budget must be an integer of at least 9"),
        (lambda: decoding.NormCache(8, recent=0), "recent"),
    ],
)
def test_values_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        make()


def test_the_training_side_imports_nothing_of_it() -> None:
    code = (
        "import sys, pamm_compile; rooms = ('pamm_compile.decoding', 'transformers'); "
        "assert not [m for m in sys.modules if m.startswith(rooms)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
