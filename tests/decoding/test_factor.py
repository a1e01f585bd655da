"""Factored keys against the model itself (full rank) and against the low-rank product (less)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pamm_testing.decoding_models import build, generate, prompt, same
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from pamm_compile import decoding
from pamm_compile.errors import CacheStateError, InvalidOptionError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

WAYS = [
    ("llama", "before"),
    ("llama", "pairs"),
    ("qwen2", "before"),
    ("qwen2", "pairs"),
    ("mistral", "before"),
    ("mistral", "pairs"),
    ("gpt2", "before"),
]
# What others have between projection and cache: norms, layers without rotation, experts, scales.
NEWER = ("qwen3", "olmo2", "smollm3", "mixtral", "granite")


def attentions(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def low_rank(model: Any, rank: int) -> Any:
    """The same model with every head's key projection replaced by its best rank-r matrix."""
    model = copy.deepcopy(model)
    for attention in attentions(model):
        d = attention.head_dim
        fused = hasattr(attention, "c_attn")
        weight = attention.c_attn.weight.T if fused else attention.k_proj.weight
        keys = slice(weight.shape[1], 2 * weight.shape[1]) if fused else slice(None)
        for head in weight.data[keys].split(d):
            u, s, v = torch.linalg.svd(head, full_matrices=False)
            head.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    return model


def without_pairs(model: Any, thin: Any) -> Any:
    """The same model with the rows of all frequencies that `thin` dropped set to zero."""
    model = copy.deepcopy(model)
    for attention, kept in zip(attentions(model), attentions(thin), strict=True):
        d, groups = attention.head_dim, attention.num_key_value_groups
        for head, pairs in enumerate(kept.pairs):
            dropped = torch.ones(d, dtype=torch.bool)
            dropped[pairs] = dropped[pairs + d // 2] = False
            queries = range(head * groups, (head + 1) * groups)
            for projection, members in (("k_proj", [head]), ("q_proj", queries)):
                linear = getattr(attention, projection)
                for member in members:
                    linear.weight.data[member * d : (member + 1) * d][dropped] = 0
                    if linear.bias is not None:
                        linear.bias.data[member * d : (member + 1) * d][dropped] = 0
    return model


@pytest.mark.parametrize(
    ("name", "rotary"), [*WAYS, *((n, r) for n in NEWER for r in ("before", "pairs"))]
)
def test_full_rank_is_the_model_itself(name: str, rotary: Any) -> None:
    model = build(name)
    inputs = prompt(padded=5)
    expected = generate(model, inputs)
    same(generate(decoding.factor_keys(model, 8, rotary=rotary), inputs), expected)


@pytest.mark.parametrize("name", NEWER)
def test_low_rank_product_of_newer_models(name: str) -> None:
    thin = decoding.factor_keys(build(name), 4)
    same(generate(thin, prompt()), generate(low_rank(build(name), 4), prompt()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "smollm3"])
def test_newer_checkpoints(name: str, tmp_path: Path) -> None:
    thin = decoding.factor_keys(build(name), 4, rotary="pairs")
    thin.save_pretrained(tmp_path)
    same(generate(decoding.load_thin(tmp_path), prompt()), generate(thin, prompt()), tolerance=0)


@pytest.mark.parametrize(("name", "rotary"), WAYS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_less_than_full_rank_is_the_low_rank_product(name: str, rotary: Any, cache: str) -> None:
    model = build(name)
    thin = decoding.factor_keys(copy.deepcopy(model), 4, rotary=rotary)
    reference = without_pairs(model, thin) if rotary == "pairs" else low_rank(model, 4)
    # The first tokens that the reference would choose are not those of the model itself.
    inputs = prompt(padded=5)
    result = generate(thin, inputs, cache_implementation=cache)
    same(result, generate(reference, inputs))
    assert not torch.equal(result.logits[0], generate(model, inputs).logits[0])


@pytest.mark.parametrize(("name", "rotary"), WAYS)
def test_cache_holds_thin_keys(name: str, rotary: Any) -> None:
    thin = decoding.factor_keys(build(name), 2, rotary=rotary)
    cache = DynamicCache()
    generate(thin, prompt(), past_key_values=cache)
    assert {layer.keys.shape[-1] for layer in cache.layers[:3]} == {2}
    assert {layer.values.shape[-1] for layer in cache.layers[:3]} == {8}
    full = DynamicCache()
    generate(build(name), prompt(), past_key_values=full)
    keys = decoding.cache_bytes(full) / 2
    # A cosine and a sine for each pair of dimensions, once for all layers and heads.
    angles = cache.layers[0].keys.shape[2] * 2 * 8 * 4 * (rotary == "before" and name != "gpt2")
    assert decoding.cache_bytes(cache) == keys / 4 + keys + angles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "rotary"), WAYS)
def test_half_precision(name: str, rotary: Any, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    exact = generate(low_rank(build(name).to(dtype).float(), 4), prompt(), max_new_tokens=1)
    if rotary == "pairs":
        thin = decoding.factor_keys(build(name), 4, rotary=rotary)
        exact = generate(without_pairs(build(name), thin), prompt(), max_new_tokens=1)
    thin = decoding.factor_keys(model, 4, rotary=rotary)
    assert {p.dtype for p in thin.parameters()} == {dtype}
    got = generate(thin, prompt(), max_new_tokens=1).logits[0].float()
    error = (got - exact.logits[0]).norm() / exact.logits[0].norm()
    assert error < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize(("name", "rotary"), WAYS)
def test_checkpoint(name: str, rotary: Any, tmp_path: Path) -> None:
    thin = decoding.factor_keys(build(name, tie_word_embeddings=True), 4, rotary=rotary)
    thin.save_pretrained(tmp_path)
    loaded = decoding.load_thin(tmp_path)
    same(generate(loaded, prompt()), generate(thin, prompt()), tolerance=0)
    assert loaded.config.thin_keys == {"rank": 4, "rotary": rotary}
    if rotary == "pairs" or name == "gpt2":
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_without_thin_keys_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no `thin_keys`"):
        decoding.load_thin(tmp_path)


@pytest.mark.parametrize(("name", "rotary"), WAYS)
def test_fine_tuning_moves_queries_and_keys_alone(name: str, rotary: Any) -> None:
    thin = decoding.factor_keys(build(name), 4, rotary=rotary)
    before = {n: p.clone() for n, p in thin.named_parameters()}
    optimizer = torch.optim.SGD(decoding.train_queries_and_keys(thin), lr=0.1)
    inputs = prompt()
    thin(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = {n.split(".")[-2] for n, p in thin.named_parameters() if not torch.equal(p, before[n])}
    others = {"self_attn"} if rotary == "before" and name != "gpt2" else set()
    assert moved == {"q_proj", "k_proj"} | others


@pytest.mark.parametrize(("name", "rotary"), WAYS)
def test_thin_keys_from_nothing(name: str, rotary: Any) -> None:
    full = build(name)
    count = sum(p.numel() for p in full.parameters())
    thin = decoding.thin_keys(build(name), 2, rotary=rotary)
    inputs = prompt()
    thin(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in thin.parameters())
    if rotary == "pairs":
        assert sum(p.numel() for p in thin.parameters()) < count
        assert attentions(thin)[0].pairs.tolist() == [[0], [0]]
    # Decoding with a cache gives what one pass over the sequence gives.
    result = generate(thin, inputs)
    whole = thin(result.sequences).logits[:, -2]
    torch.testing.assert_close(result.logits[-1], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "rotary"), [WAYS[2]])
def test_compiled_whole(name: str, rotary: Any) -> None:
    thin = decoding.factor_keys(build(name), 4, rotary=rotary)
    expected = generate(thin, prompt(), cache_implementation="static", max_new_tokens=3)
    thin.forward = torch.compile(thin.forward, backend="aot_eager", fullgraph=True)
    got = generate(thin, prompt(), cache_implementation="static", max_new_tokens=3)
    same(got, expected)


def test_static_cache_that_is_longer_than_the_sequence() -> None:
    model = low_rank(build("llama"), 4)
    thin = decoding.factor_keys(build("llama"), 4)
    cache = StaticCache(thin.config, max_cache_len=100)
    same(generate(thin, prompt(padded=5), past_key_values=cache), generate(model, prompt(padded=5)))


@pytest.mark.parametrize(
    ("name", "call", "error", "message"),
    [
        ("llama", {"rank": 0}, InvalidOptionError, "from 1 to 8"),
        ("llama", {"rank": 9}, InvalidOptionError, "from 1 to 8"),
        ("llama", {"rank": 3, "rotary": "pairs"}, InvalidOptionError, "must be even"),
        ("llama", {"rank": 4, "rotary": "after"}, InvalidOptionError, "'before' or 'pairs'"),
    ],
)
def test_values_refused(name: str, call: Any, error: type, message: str) -> None:
    model = build(name)
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=message):
        decoding.factor_keys(model, **call)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_models_refused() -> None:
    thin = decoding.factor_keys(build("llama"), 4)
    with pytest.raises(InvalidOptionError, match="thin already"):
        decoding.factor_keys(thin, 4)
    adapted = build("llama")
    adapted.model.layers[1].self_attn.k_proj = torch.nn.Sequential()
    with pytest.raises(UnsupportedModelError, match="merge adapters"):
        decoding.factor_keys(adapted, 4)
    with pytest.raises(UnsupportedModelError, match="reorder_and_upcast_attn"):
        decoding.factor_keys(build("gpt2", reorder_and_upcast_attn=True), 4)
    with pytest.raises(UnsupportedModelError, match="no thin keys"):
        decoding.train_queries_and_keys(build("llama"))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_before_rotation_in_a_cache_that_chooses(name: str) -> None:
    """It gets whole keys: those of the low-rank product."""
    model = decoding.attach(low_rank(build(name), 4))
    thin = decoding.attach(decoding.factor_keys(build(name), 4))
    for cache in (decoding.ClusterCache, decoding.WindowCache):
        inputs = prompt(padded=5)
        same(
            generate(thin, inputs, past_key_values=cache(20)),
            generate(model, inputs, past_key_values=cache(20)),
        )


def test_a_cache_filled_by_other_means_is_refused() -> None:
    thin = decoding.factor_keys(build("llama"), 4)
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 8), layer)
    with pytest.raises(CacheStateError, match="positions of 1"):
        thin(torch.tensor([[5]]), cache=cache)


POSITIONS = {
    "packed": lambda n: torch.arange(n) % (n // 2),
    "offset": lambda n: torch.arange(n) + 90,
    "gaps": lambda n: torch.arange(n) * 3,
    "two rows": lambda n: torch.stack([torch.arange(n), torch.arange(n).flip(0)]),
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("given", POSITIONS)
def test_positions_that_are_not_one_run(given: str, cache: str) -> None:
    model, ids = build("llama"), prompt()["input_ids"]
    thin = decoding.factor_keys(copy.deepcopy(model), 8)
    position = POSITIONS[given](40).expand(2, -1)
    # One piece: Transformers looks for packed sequences where there is no cache yet.
    pieces = (slice(0, 40),) if given == "packed" else (slice(0, 25), slice(25, 26), slice(26, 40))
    found = []
    for each in (model, thin):
        kept = DynamicCache() if cache == "dynamic" else StaticCache(each.config, max_cache_len=50)
        logits = [each(ids[:, p], position_ids=position[:, p], cache=kept).logits for p in pieces]
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_positions_follow_rows_that_are_reordered_and_cropped() -> None:
    model, ids = build("llama"), prompt()["input_ids"]
    position = POSITIONS["two rows"](40)
    found = []
    for each in (model, decoding.factor_keys(copy.deepcopy(model), 8)):
        cache = DynamicCache()
        each(ids, position_ids=position, cache=cache)
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([1]))
        found.append(each(ids[:1, :3], position_ids=position[:1, :3], cache=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn"])
def test_frequencies_that_change_with_the_length(rope_type: str) -> None:
    """Angles are kept as they were, as the model keeps keys that were rotated then."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=32)
    thin = decoding.factor_keys(copy.deepcopy(model), 8)
    same(generate(thin, prompt()), generate(model, prompt()), tolerance=1e-3)


@pytest.mark.parametrize("before", [True, False])
def test_attentions_and_hidden_states_are_given(before: bool) -> None:
    """Whether they were asked for before keys were factored, or only after."""
    model = build("llama", attn_implementation="eager")
    ids = prompt()["input_ids"]
    ask = {"output_attentions": True, "output_hidden_states": True}
    expected = model(ids, **ask)
    fresh = model if before else build("llama", attn_implementation="eager")
    got = decoding.factor_keys(fresh, 8)(ids, **ask)
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(expected[name]) > 0
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_copied_and_pickled(tmp_path: Path) -> None:
    thin = decoding.attach(decoding.factor_keys(build("qwen2"), 4))
    expected = generate(thin, prompt())
    same(generate(copy.deepcopy(thin), prompt()), expected, tolerance=0)
    torch.save(thin, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    same(generate(loaded, prompt()), expected, tolerance=0)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.update(eos_token_id=[5, 6], do_sample=True, temperature=0.3)
    thin = decoding.factor_keys(model, 4).to(torch.bfloat16)
    thin.save_pretrained(tmp_path, max_shard_size="10kB")
    loaded = decoding.load_thin(tmp_path)
    for name in ("eos_token_id", "do_sample", "temperature"):
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name)
    assert loaded.dtype == torch.bfloat16
    assert type(loaded) is type(thin)
    assert not loaded.training
    assert decoding.load_thin(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_weights_that_are_not_there_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.to("meta")
    before = {n: type(m) for n, m in model.named_modules()}
    for change in (decoding.factor_keys, decoding.thin_keys):
        with pytest.raises(UnsupportedModelError, match="on the meta device or offloaded"):
            change(model, 4)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_no_generator_is_moved(tmp_path: Path) -> None:
    model = build("qwen3")
    state = torch.get_rng_state()
    decoding.attach(decoding.factor_keys(model, 4)).save_pretrained(tmp_path)
    decoding.load_thin(tmp_path)
    decoding.EvictionCache()
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_of_accelerate_stay_in_front() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("qwen2")
    expected = generate(model, prompt())
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn, hooks.AlignDevicesHook(execution_device="cpu"))
    same(generate(decoding.factor_keys(model, 8), prompt()), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windows_beside_full_attention(cache: str) -> None:
    for name, window in (
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ):
        model = build(name, **window)
        thin = decoding.factor_keys(copy.deepcopy(model), 8)
        inputs = prompt(padded=5)
        expected = generate(model, inputs, cache_implementation=cache)
        same(generate(thin, inputs, cache_implementation=cache), expected)


def test_adapters_elsewhere_change_nothing() -> None:
    peft = pytest.importorskip("peft")
    for target, rotary in (("up_proj", "before"), ("up_proj", "pairs"), ("k_proj", "before")):
        model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=[target], r=2))
        if target == "up_proj":
            expected = generate(model, prompt())
            same(generate(decoding.factor_keys(model, 8, rotary=rotary), prompt()), expected)
        else:
            with pytest.raises(UnsupportedModelError, match=r"peft.*merge_and_unload"):
                decoding.factor_keys(model, 8, rotary=rotary)
