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
        }
        make_config, make_model = kinds[name]
        if name == "mistral":
            more = {"sliding_window": None, **more}
        model = make_model(make_config(**{**SIZES, **more}))
    with torch.no_grad():
        # Transformers starts biases at zero, where a lost one would not be noticed.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
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
