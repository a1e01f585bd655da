"""Small models of the four classes that the methods for generation are held to."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from pamm_compile.decoding import EvictionPolicy

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Wide enough that attention is far from uniform, so that a wrong selection shows.
    "initializer_range": 0.3,
}
# A window is shorter than the prompts, so that it shows.
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
OWN: dict[str, Any] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0},
    "gemma3": {"head_dim": 8, "num_hidden_layers": 4, **_HYBRID},
    "gpt_oss": {"head_dim": 8, "num_hidden_layers": 4, "num_local_experts": 4, **_HYBRID},
}
CLASSES = ("llama", "qwen2", "mistral", "gpt2")


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        config: Any = hf.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.3,
            **more,
        )
        model: Any = hf.GPT2LMHeadModel(config)
    else:
        kinds = {
            "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
            "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
            "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
            "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
            "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM),
            "smollm3": (hf.SmolLM3Config, hf.SmolLM3ForCausalLM),
            "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM),
            "granite": (hf.GraniteConfig, hf.GraniteForCausalLM),
            "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM),
            "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM),
        }
        make_config, make_model = kinds[name]
        more = {**OWN.get(name, {}), **more}
        model = make_model(make_config(**{**SIZES, **more}))
    with torch.no_grad():
        # Transformers starts biases at zero, where a lost one would not be noticed.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "sinks", "_norm.weight")):
                parameter.normal_(std=0.3)
    return model.eval()


def prompt(batch: int = 2, length: int = 40, padded: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and their mask; the second row begins with `padded` padding tokens."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :padded] = 0
        ids[1, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    """Greedy tokens with their scores."""
    settings = {"max_new_tokens": 8, "do_sample": False, **more}
    return model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def random_policy(bias: float = 0.0) -> EvictionPolicy:
    """A policy that keeps some tokens; all of them at a large bias."""
    generator = torch.Generator().manual_seed(5)
    parameters = 0.5 * torch.randn(EvictionPolicy.size, generator=generator)
    parameters[-1] = bias
    return EvictionPolicy(parameters)


def same(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    """Hold two generations to the same tokens, and to scores that differ by rounding."""
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
