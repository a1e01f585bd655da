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


@pytest.mark.parametrize(("name", "rotary"), WAYS)
def test_full_rank_is_the_model_itself(name: str, rotary: Any) -> None:
    model = build(name)
    inputs = prompt(padded=5)
    expected = generate(model, inputs)
    same(generate(decoding.factor_keys(model, 8, rotary=rotary), inputs), expected)


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
    assert {layer.keys.shape[-1] for layer in cache.layers} == {2}
    assert {layer.values.shape[-1] for layer in cache.layers} == {8}
    full = DynamicCache()
    generate(build(name), prompt(), past_key_values=full)
    keys = decoding.cache_bytes(full) / 2
    assert decoding.cache_bytes(cache) == keys / 4 + keys


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


@pytest.mark.parametrize(("name", "rotary"), [WAYS[2], WAYS[3], WAYS[6]])
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
    with pytest.raises(UnsupportedModelError, match="type 'dynamic'"):
        decoding.factor_keys(
            build(
                "llama",
                rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            ),
            4,
        )
    with pytest.raises(UnsupportedModelError, match="no thin keys"):
        decoding.train_queries_and_keys(build("llama"))


def test_keys_before_rotation_refuse_a_cache_they_cannot_read() -> None:
    thin = decoding.factor_keys(build("llama"), 4)
    decoding.attach(thin)
    with pytest.raises(CacheStateError, match="rotary='pairs'"):
        generate(thin, prompt(), past_key_values=decoding.ClusterCache(budget=32))
