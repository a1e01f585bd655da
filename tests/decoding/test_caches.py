"""Every cache through `model.generate`: four classes, padding, beams, compiled, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
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
    "keydiff": lambda n: decoding.KeyDiffCache(n),
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
    model = decoding.attach(build("llama", num_hidden_layers=1))
    short = {"max_new_tokens": 2}
    chosen = [CACHES["heavy hitters"]]
    expected = [generate(model, prompt(), past_key_values=m(12), **short) for m in chosen]
    model.forward = torch.compile(model.forward, backend="aot_eager")
    for make, eager in zip(chosen, expected, strict=True):
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


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_windows_stay_and_other_layers_choose(name: str) -> None:
    model = build(name, attn_implementation="eager")
    inputs = prompt(padded=5)
    expected = generate(model, inputs)
    decoding.attach(model)
    same(generate(model, inputs), expected)
    for cache_name in ("clusters", "pages", "heavy hitters", "keydiff", "policy"):
        cache = CACHES[cache_name](100)
        same(generate(model, inputs, past_key_values=cache), expected)
        assert [layer.is_sliding for layer in cache.layers] == [True, False] * 2
        assert cache.layers[0].keys.shape[2] == 7
    generate(model, inputs, past_key_values=CACHES["clusters"](12))
    whole = generate(model, inputs, past_key_values=CACHES["window"](12))
    pieces = generate(model, inputs, past_key_values=CACHES["window"](12), prefill_chunk_size=13)
    assert torch.equal(whole.sequences, pieces.sequences)


@pytest.mark.parametrize("cache", ["window", "heavy hitters", "norms", "keydiff", "clusters"])
def test_padding_on_the_right_is_not_there(cache: str) -> None:
    model, inputs = decoding.attach(build("llama")), prompt()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 31:] = 0

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept, found, place = CACHES[cache](12), [], mask.sum(1, keepdim=True)
        model(ids, attention_mask=mask, cache=kept)
        for step in range(6):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            new = torch.full_like(ids[:, :1], 5 + step)
            given = {"attention_mask": mask, "position_ids": place + step, "cache": kept}
            found.append(model(new, **given).logits[0, -1])
        return torch.stack(found)

    alone = run(inputs["input_ids"][:1, :31], mask[:1, :31])
    both = run(inputs["input_ids"], mask)
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 13])
@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_chunks_is_one_prompt(cache: str, size: int) -> None:
    """The last of three chunks of 13 is one token."""
    model, inputs = decoding.attach(build("llama")), prompt()
    whole = generate(model, inputs, past_key_values=CACHES[cache](12))
    pieces = generate(model, inputs, past_key_values=CACHES[cache](12), prefill_chunk_size=size)
    assert torch.equal(whole.sequences, pieces.sequences)


def test_adapters_and_embeddings_are_generated_from() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    decoding.attach(model.eval())
    inputs = prompt()
    whole = generate(model, inputs, cache=decoding.WindowCache(12))
    pieces = generate(model, inputs, cache=decoding.WindowCache(12), prefill_chunk_size=13)
    assert torch.equal(whole.sequences, pieces.sequences)
    model = decoding.attach(build("llama"))
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}
    whole = generate(model, embedded)
    same(generate(model, embedded, cache=decoding.ClusterCache(100)), whole)


def refused(config: Any, match: str) -> None:
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=match):
        decoding.attach(model)
    assert model.config._attn_implementation == before
    with pytest.raises(UnsupportedModelError, match=match):
        decoding.factor_keys(model, 4)
    # Without having asked: at the first call, not at the first new token.
    ids = torch.randint(3, 60, (1, 20))
    with pytest.raises((UnsupportedModelError, CacheStateError)):
        model(ids, cache=decoding.WindowCache(100))


def test_attention_that_offers_too_little_is_refused_at_once() -> None:
    small = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    dense = {"first_k_dense_replace": 2, "v_head_dim": 4, "intermediate_size": 32}
    refused(hf.DeepseekV3Config(**small, **latent, **dense), "holds latents")
    refused(hf.GPTNeoXConfig(**small, intermediate_size=32), "does not pass its keyword arguments")
    refused(hf.MptConfig(vocab_size=61, d_model=32, n_layers=1, n_heads=4), "the model's own")
    refused(hf.BertConfig(**small, intermediate_size=32), "not causal")
    moshi = {"intermediate_size": 32, "ffn_dim": 32, "sliding_window": 8}
    refused(hf.MoshiConfig(**small, **moshi), "other windows than its configuration")
    refused(hf.Gemma2Config(**small, intermediate_size=32, head_dim=8), "caps its attention")


def test_models_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window"):
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
