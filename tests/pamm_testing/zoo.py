"""Small instances of real model classes, for the tests that hold over all of them.

Every case says which weights are expected to be compressed, as regular expressions over parameter
names: the expectation is written by hand from the architecture, never read off our own report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 61
BATCH, LENGTH = 2, 24
WIDTH, HEADS, LAYERS = 32, 4, 2

Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model class with inputs, and what is to be compressed in it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    compressed: tuple[str, ...]
    """Patterns; together they cover exactly the weights whose gradients are approximated."""
    sites: int
    """How many inputs are compressed."""
    loss: Callable[[Any], Tensor] = field(default=lambda out: out.loss)


def tokens(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(4, VOCAB, (batch, length))


def causal() -> Batch:
    ids = tokens()
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def masked() -> Batch:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def sequence_to_sequence() -> Batch:
    return {"input_ids": tokens(), "labels": tokens(length=20), "use_cache": False}


def _decoder(config: str, model: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        # Dropped first where a family names its sizes otherwise.
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        sizes.update(more)
        sizes = {k: v for k, v in sizes.items() if v is not None}
        return getattr(hf, model)(getattr(hf, config)(**sizes))

    return build


def _llama_like(name: str, *, config: str, model: str, **more: Any) -> Case:
    qkv = (r"\.self_attn\.[qkv]_proj\.weight$",)
    return Case(name, _decoder(config, model, **more), causal, qkv, LAYERS)


DECODERS = [
    _llama_like("llama", config="LlamaConfig", model="LlamaForCausalLM"),
    _llama_like("mistral", config="MistralConfig", model="MistralForCausalLM", sliding_window=16),
    _llama_like("qwen2", config="Qwen2Config", model="Qwen2ForCausalLM"),
    _llama_like("qwen3", config="Qwen3Config", model="Qwen3ForCausalLM", head_dim=8),
    _llama_like(
        "gemma2",
        config="Gemma2Config",
        model="Gemma2ForCausalLM",
        head_dim=8,
        attn_implementation="eager",
    ),
    _llama_like("gemma3", config="Gemma3TextConfig", model="Gemma3ForCausalLM", head_dim=8),
    Case(
        "phi3",
        _decoder("Phi3Config", "Phi3ForCausalLM", resid_pdrop=0.0),
        causal,
        (r"\.self_attn\.qkv_proj\.weight$",),
        LAYERS,
    ),
    # Multi-head latent attention: what projects down from the stream has the wide input.
    Case(
        "deepseek_v3",
        _decoder(
            "DeepseekV3Config", "DeepseekV3ForCausalLM", num_key_value_heads=HEADS,
            first_k_dense_replace=LAYERS, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8,
        ),
        causal,
        (r"\.self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.weight$",),
        LAYERS,
    ),
    Case(
        "gpt2",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64
            )
        ),
        causal,
        (r"\.attn\.c_attn\.weight$",),
        LAYERS,
    ),
    Case(
        "gpt_neox",
        _decoder(
            "GPTNeoXConfig", "GPTNeoXForCausalLM", num_key_value_heads=None,
            use_parallel_residual=False,
        ),
        causal,
        (r"\.attention\.query_key_value\.weight$",),
        LAYERS,
    ),
    Case(
        "opt",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, max_position_embeddings=64, word_embed_proj_dim=WIDTH,
            )
        ),
        causal,
        (r"\.self_attn\.[qkv]_proj\.weight$",),
        LAYERS,
    ),
]  # fmt: skip


def _encoder(name: str, config: str, model: str, pattern: str, **more: Any) -> Case:
    build = _decoder(config, model, num_key_value_heads=None, **more)
    return Case(name, build, masked, (pattern,), LAYERS)


_SELF = r"\.self\.(query|key|value)\.weight$"

ENCODERS = [
    _encoder("bert", "BertConfig", "BertForMaskedLM", _SELF),
    _encoder("roberta", "RobertaConfig", "RobertaForMaskedLM", _SELF),
    Case(
        "distilbert",
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(
                vocab_size=VOCAB, dim=WIDTH, hidden_dim=48, n_layers=LAYERS, n_heads=HEADS,
                max_position_embeddings=64,
            )
        ),
        masked,
        (r"\.attention\.[qkv]_lin\.weight$",),
        LAYERS,
    ),
    _encoder(
        "albert", "AlbertConfig", "AlbertForMaskedLM",
        r"\.attention\.(query|key|value)\.weight$", embedding_size=16,
    ),
]  # fmt: skip


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, image_size=16, patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def _clip() -> nn.Module:
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }  # fmt: skip
    text = {**sizes, "vocab_size": VOCAB, "max_position_embeddings": 64, "eos_token_id": VOCAB - 1}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _clip_batch() -> Batch:
    ids = tokens()
    ids[:, -1] = VOCAB - 1
    return {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 16, 16), "return_loss": True}


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48,
            decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


# Of an encoder-decoder with L layers each: L encoder inputs, L decoder inputs, L cross-attention
# queries, and one encoder output that all L cross-attention keys and values read.
_CROSS_SITES = 3 * LAYERS + 1

OTHERS = [
    Case(
        "t5", _t5, sequence_to_sequence,
        (r"\.SelfAttention\.[qkv]\.weight$", r"\.EncDecAttention\.[qkv]\.weight$"), _CROSS_SITES,
    ),
    Case(
        "bart", _bart, sequence_to_sequence,
        (r"\.(self_attn|encoder_attn)\.[qkv]_proj\.weight$",), _CROSS_SITES,
    ),
    Case(
        "whisper", _whisper,
        lambda: {
            "input_features": torch.randn(BATCH, 8, 40), "labels": tokens(length=20),
            "use_cache": False,
        },
        (r"\.(self_attn|encoder_attn)\.[qkv]_proj\.weight$",), _CROSS_SITES,
    ),
    Case(
        "vit", _vit,
        lambda: {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.tensor([0, 2])},
        (r"\.attention\.(attention\.(query|key|value)|[qkv]_proj)\.weight$",),
        LAYERS,
    ),
    Case("clip", _clip, _clip_batch, (r"\.self_attn\.[qkv]_proj\.weight$",), 2 * LAYERS),
]  # fmt: skip

TRANSFORMERS = [*DECODERS, *ENCODERS, *OTHERS]


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout probability to 0, wherever the classes keep it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
