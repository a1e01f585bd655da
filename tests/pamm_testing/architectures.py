"""More model classes, in one layer each: for what is matched in them, not for a training step.

As in `zoo`, every expectation is written by hand from the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from pamm_testing.zoo import BATCH, HEADS, LENGTH, VOCAB, WIDTH, Batch, causal, masked, tokens


@dataclass(frozen=True)
class Architecture:
    """A model class, and patterns that cover exactly the weights that each target holds."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    qkv: tuple[str, ...]
    sites: int
    """How many inputs of these are compressed."""
    output: tuple[str, ...] = ()
    """What "attention" holds besides."""
    mlp: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    exact: dict[str, str] = field(default_factory=dict)
    """Patterns of weights of "qkv" that stay exact, with the reason."""
    unread: dict[str, str] = field(default_factory=dict)
    """Patterns of weights that no matmul reads, with the target that lists them."""
    loss: Callable[[Any], Tensor] = field(default=lambda out: out.loss)
    library: str = ""
    """What else must be installed."""


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _build(config: str, model: str, **more: Any) -> Callable[[], nn.Module]:
    sizes = {k: v for k, v in {**_SIZES, **more}.items() if v is not None}
    return lambda: getattr(hf, model)(getattr(hf, config)(**sizes))


_PROJECTIONS = (r"\.self_attn\.[qkv]_proj\.weight$",)
_OUTPUT = (r"\.self_attn\.o_proj\.weight$",)
_GATED = (r"\.mlp\.(gate|up|down)_proj\.weight$",)
_HEAD = (r"^lm_head\.weight$",)
_TIED = (r"\.(embed_tokens|word_embeddings|tok_embeddings)\.weight$",)
_SHARED = "SHARED_INPUT"


def _llama_like(name: str, family: str, **more: Any) -> Architecture:
    own: dict[str, Any] = {"qkv": _PROJECTIONS, "sites": 1, "output": _OUTPUT, "mlp": _GATED}
    own |= {"head": _HEAD, "exact": {}, "unread": {}}
    own |= {key: more.pop(key) for key in list(more) if key in own}
    build = _build(f"{family}Config", f"{family}ForCausalLM", **{"num_key_value_heads": 2, **more})
    return Architecture(name, build, causal, **own)


# Attention and MLP read one input: nothing is freed unless both are compressed.
def _parallel(name: str, family: str, pattern: str, **more: Any) -> Architecture:
    return _llama_like(name, family, qkv=(pattern,), sites=0, exact={pattern: _SHARED}, **more)


_EXPERTS = {
    r"\.mlp\.experts\.(gate_up_proj|down_proj)$": "mlp",
}

DECODERS = [
    _llama_like("gemma", "Gemma", head=_TIED, head_dim=8),
    _llama_like("granite", "Granite"),
    _llama_like("olmo2", "Olmo2"),
    _llama_like("smollm3", "SmolLM3", head=_TIED),
    _llama_like("starcoder2", "Starcoder2", mlp=(r"\.mlp\.c_(fc|proj)\.weight$",), head=_TIED),
    _llama_like(
        "mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, mlp=(), unread=_EXPERTS
    ),
    _llama_like(
        "qwen2_moe", "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, unread=_EXPERTS,
        mlp=(r"\.mlp\.shared_expert\.(gate|up|down)_proj\.weight$",),
    ),
    _llama_like(
        "qwen3_moe", "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        head_dim=8, mlp=(), unread=_EXPERTS,
    ),
    _llama_like(
        "gpt_oss", "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, mlp=(),
        unread=_EXPERTS,
    ),
    _parallel("cohere2", "Cohere2", _PROJECTIONS[0], head=_TIED),
    _parallel(
        "phi", "Phi", _PROJECTIONS[0], output=(r"\.self_attn\.dense\.weight$",),
        mlp=(r"\.mlp\.fc[12]\.weight$",),
    ),
    _parallel(
        "falcon", "Falcon", r"\.self_attention\.query_key_value\.weight$", num_key_value_heads=None,
        output=(r"\.self_attention\.dense\.weight$",), mlp=(r"\.mlp\.dense_\w+\.weight$",),
        head=_TIED,
    ),
    Architecture(
        "gptj",
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=HEADS, rotary_dim=4)
        ),
        causal, (r"\.attn\.[qkv]_proj\.weight$",), 0, (r"\.attn\.out_proj\.weight$",),
        (r"\.mlp\.fc_(in|out)\.weight$",), _HEAD, {r"\.attn\.[qkv]_proj\.weight$": _SHARED},
    ),
    Architecture(
        "bloom",
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=1, n_head=HEADS)
        ),
        causal, (r"\.query_key_value\.weight$",), 1, (r"\.self_attention\.dense\.weight$",),
        (r"\.mlp\.dense_\w+\.weight$",), _TIED,
    ),
]  # fmt: skip

_SELF = (r"\.self\.(query|key|value)\.weight$",)
_BERT_LIKE: dict[str, Any] = {
    "qkv": _SELF, "sites": 1, "output": (r"\.attention\.output\.dense\.weight$",),
    "mlp": (r"\.\d\.(intermediate|output)\.dense\.weight$",),
}  # fmt: skip

ENCODERS = [
    Architecture(
        "electra", _build("ElectraConfig", "ElectraForMaskedLM", embedding_size=16), masked,
        **_BERT_LIKE,
        head=(r"^generator_predictions\.dense\.weight$", r"\.word_embeddings\.weight$"),
    ),
    Architecture(
        "xlm_roberta", _build("XLMRobertaConfig", "XLMRobertaForMaskedLM"), masked, **_BERT_LIKE,
        head=(r"^lm_head\.(dense|decoder)\.weight$",),
    ),
    # Keys and queries of relative positions are projections of parameters.
    Architecture(
        "deberta_v2",
        _build(
            "DebertaV2Config", "DebertaV2ForMaskedLM", relative_attention=True,
            pos_att_type=["c2p", "p2c"], share_att_key=False, position_buckets=4,
        ),
        masked,
        qkv=(r"\.self\.(\w+_)?(query|key|value)(_proj)?\.weight$",), sites=1,
        output=_BERT_LIKE["output"], mlp=_BERT_LIKE["mlp"],
        head=(r"^cls\.predictions\.transform\.dense\.weight$", r"\.word_embeddings\.weight$"),
        exact={r"\.self\.pos_(query|key)_proj\.weight$": "LEARNED_INPUT"},
    ),
    Architecture(
        "modernbert",
        _build(
            "ModernBertConfig", "ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2,
            num_hidden_layers=2,
        ),
        masked, qkv=(r"\.attn\.Wqkv\.weight$",), sites=2, output=(r"\.attn\.Wo\.weight$",),
        mlp=(r"\.mlp\.W[io]\.weight$",),
        head=(r"^head\.dense\.weight$", r"\.tok_embeddings\.weight$"),
    ),
]  # fmt: skip


def _perceiver() -> nn.Module:
    return hf.PerceiverForMaskedLM(
        hf.PerceiverConfig(
            vocab_size=VOCAB, d_model=WIDTH, d_latents=24, num_latents=6, num_blocks=1,
            num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
            max_position_embeddings=LENGTH, qk_channels=16, v_channels=24,
        )
    )  # fmt: skip


def _image_classifier(config: str, model: str, **more: Any) -> Callable[[], nn.Module]:
    sizes = {k: _SIZES[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"image_size": 16, "patch_size": 4, "num_labels": 3, "intermediate_size": 48}
    given = {k: v for k, v in {**sizes, **more}.items() if v is not None}
    return lambda: getattr(hf, model)(getattr(hf, config)(**given))


def _images() -> Batch:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.tensor([0, 2])}


def _siglip() -> nn.Module:
    sizes = {k: v for k, v in _SIZES.items() if k.startswith(("hidden", "inter", "num"))}
    text = {**sizes, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))


def _translator(config: str, model: str) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(
        getattr(hf, config)(
            vocab_size=VOCAB, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


_TRANSLATOR: dict[str, Any] = {
    "batch": lambda: {"input_ids": tokens(), "labels": tokens(length=20), "use_cache": False},
    "qkv": (r"\.(self_attn|encoder_attn)\.[qkv]_proj\.weight$",), "sites": 4,
    "output": (r"attn\.out_proj\.weight$",), "mlp": (r"\.fc[12]\.weight$",),
    "head": (r"^(lm_head|model\.shared)\.weight$",),
}  # fmt: skip

OTHERS = [
    # Latents are parameters, and what queries them as well.
    Architecture(
        "perceiver", _perceiver, lambda: {"inputs": (ids := tokens()), "labels": ids},
        qkv=(r"\.self\.(query|key|value)\.weight$",), sites=3,
        output=(r"\.attention\.output\.dense\.weight$",), mlp=(r"\.mlp\.dense[12]\.weight$",),
        head=(r"\.embeddings\.weight$",),
        exact={r"cross_attention\.attention\.self\.query\.weight$": "LEARNED_INPUT"},
    ),
    Architecture(
        "wav2vec2",
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS,
                intermediate_size=48, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4),
                num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
            )
        ),
        lambda: {"input_values": torch.randn(BATCH, 400), "labels": tokens(length=4)},
        qkv=(r"\.attention\.[qkv]_proj\.weight$",), sites=1,
        output=(r"\.attention\.out_proj\.weight$",),
        mlp=(r"\.feed_forward\.(intermediate|output)_dense\.weight$",),
    ),
    Architecture(
        "swin",
        _image_classifier(
            "SwinConfig", "SwinForImageClassification", embed_dim=16, depths=[1, 1],
            num_heads=[2, 2], window_size=2, patch_size=2, hidden_size=None,
            num_hidden_layers=None, num_attention_heads=None, intermediate_size=None,
        ),
        _images, qkv=(r"\.attention\.([qkv]_proj|self\.(query|key|value))\.weight$",), sites=2,
        output=(r"\.attention\.(o_proj|output\.dense)\.weight$",),
        mlp=(r"\.mlp\.fc[12]\.weight$|\.\d\.(intermediate|output)\.dense\.weight$",),
        head=(r"^classifier\.weight$",),
    ),
    Architecture(
        "dinov2", _image_classifier("Dinov2Config", "Dinov2ForImageClassification"), _images,
        qkv=(r"\.attention\.([qkv]_proj|attention\.(query|key|value))\.weight$",), sites=1,
        output=(r"\.attention\.(o_proj|output\.dense)\.weight$",), mlp=(r"\.mlp\.fc[12]\.weight$",),
        head=(r"^classifier\.weight$",),
    ),
    # The pooling head attends by a query that is a parameter.
    Architecture(
        "siglip", _siglip,
        lambda: {
            "input_ids": tokens(), "pixel_values": torch.randn(BATCH, 3, 16, 16),
            "return_loss": True,
        },
        qkv=(r"\.self_attn\.[qkv]_proj\.weight$", r"in_proj_weight$"), sites=3,
        output=(r"\.out_proj\.weight$",), mlp=(r"\.mlp\.fc[12]\.weight$",),
        head=(r"^text_model\.head\.weight$",),
        exact={r"in_proj_weight$": "LEARNED_INPUT"},
    ),
    Architecture("marian", _translator("MarianConfig", "MarianMTModel"), **_TRANSLATOR),
    Architecture(
        "mbart", _translator("MBartConfig", "MBartForConditionalGeneration"), **_TRANSLATOR
    ),
    Architecture(
        "pegasus", _translator("PegasusConfig", "PegasusForConditionalGeneration"), **_TRANSLATOR
    ),
]  # fmt: skip


def _diffusion_transformer() -> nn.Module:
    # Its own import: every other test does without it.
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=WIDTH,
        pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


def _noisy_images() -> Batch:
    return {
        "hidden_states": torch.randn(BATCH, 4, 16, 16), "timestep": torch.arange(BATCH),
        "encoder_hidden_states": torch.randn(BATCH, 7, 24),
        "pooled_projections": torch.randn(BATCH, 16),
    }  # fmt: skip


DIFFUSION = [
    # Two streams attend together, and conditioning with more weights than either scales both.
    Architecture(
        "sd3", _diffusion_transformer, _noisy_images,
        qkv=(r"\.attn\.(to_[qkv]|add_[qkv]_proj)\.weight$",), sites=4,
        output=(r"\.attn\.to_(add_)?out(\.0)?\.weight$",),
        mlp=(r"\.ff(_context)?\.net\.\d.*\.weight$",), head=(r"^proj_out\.weight$",),
        library="diffusers",
    ),
]  # fmt: skip
ARCHITECTURES = [*DECODERS, *ENCODERS, *OTHERS, *DIFFUSION]
