"""Architectures of timm, x-transformers, diffusers, PEFT and torch itself, made small."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pamm_testing.sweep.shrink import FIRST_SPECIAL
from pamm_testing.sweep.steps import Architecture, Inputs

Built = tuple[nn.Module, Inputs]

_VIT = {"embed_dim": 48, "depth": 1, "num_heads": 3}
_STAGES = {"depths": (1, 1, 2, 1)}
_TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _VIT | {"img_size": 64},
    "vit_base_patch16_siglip_224": _VIT | {"img_size": 64},
    "vit_relpos_small_patch16_224": _VIT | {"img_size": 64},
    "vit_srelpos_small_patch16_224": _VIT | {"img_size": 64},
    "vit_small_r26_s32_224": {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 64},
    "vit_base_patch16_rope_reg1_gap_256": _VIT | {"img_size": 64},
    "beit_base_patch16_224": _VIT | {"img_size": 64},
    "eva02_tiny_patch14_224": _VIT | {"img_size": 56},
    "deit3_small_patch16_224": _VIT | {"img_size": 64},
    "cait_xxs24_224": _VIT | {"img_size": 64},
    "xcit_nano_12_p16_224": _VIT | {"img_size": 64},
    "volo_d1_224": {},
    "mixer_s16_224": {"num_blocks": 1, "img_size": 64},
    "gmlp_s16_224": {"num_blocks": 1, "img_size": 64},
    "resmlp_12_224": {"num_blocks": 1, "img_size": 64},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    "swinv2_cr_tiny_224": {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    "maxvit_rmlp_pico_rw_256": {},
    "coatnet_nano_rw_224": {},
    "coat_lite_tiny": {"depths": (1, 1, 1, 1)} | {"serial_depths": (1, 1, 1, 1)},
    "crossvit_9_240": {},
    "twins_svt_small": {"embed_dims": (16, 32, 64, 128)},
    "pvt_v2_b0": _STAGES,
    "levit_128s": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "efficientformer_l1": {},
    "efficientformerv2_s0": {},
    "efficientvit_b0": {},
    "poolformer_s12": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)},
    "focalnet_tiny_srf": {"depths": (1, 1), "embed_dim": 24},
    "gcvit_xxtiny": {},
    "tiny_vit_5m_224": {},
    "nest_tiny": {},
    "sequencer2d_s": {},
    "hiera_tiny_224": {},
    "fastvit_t8": {},
    "resnet18": {},
    "seresnet18": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_hybrid_medium": {},
    "botnet26t_256": {},
    "halonet26t": {},
    "lambda_resnet26t": {},
    "naflexvit_base_patch16_gap": _VIT,
}


def _timm(name: str, settings: dict[str, Any]) -> Built:
    import timm

    model = timm.create_model(name, num_classes=7, **settings)
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    side = settings.get("img_size", height)
    images = torch.randn(2, channels, side, side if "img_size" in settings else width)
    names = {"naflexvit_base_patch16_gap": "x"}
    return model, {names.get(name, _first_argument(model)): images}


def _first_argument(model: nn.Module) -> str:
    code = type(model).forward.__code__
    return code.co_varnames[1]


# x-transformers -------------------------------------------------------------------------------

_X: dict[str, dict[str, Any]] = {
    "decoder": {},
    "rotary": {"rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "relative": {"rel_pos_bias": True},
    "dynamic-positions": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": False},
    "talking-heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "sparse-topk": {"attn_sparse_topk": 4},
    "gated": {"attn_gate_values": True},
    "one-kv-head": {"attn_one_kv_head": True},
    "grouped": {"attn_kv_heads": 2},
    "qk-norm": {"attn_qk_norm": True},
    "memory-kv": {"attn_num_mem_kv": 4},
    "glu": {"ff_glu": True, "ff_swish": True},
    "relu-squared": {"ff_relu_squared": True},
    "gated-residual": {"gate_residual": True},
    "sandwich": {"sandwich_norm": True},
    "macaron": {"macaron": True},
    "shift-tokens": {"shift_tokens": 1},
    "residual-attention": {"residual_attn": True},
    "scale-residual": {"scale_residual": True},
    "hyper-connections": {"num_residual_streams": 2},
    "sigmoid": {"attn_sigmoid": True},
    "laser": {"attn_laser": True},
    "latent-kv": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8},
    "latent-q": {"attn_use_latent_q": True, "attn_dim_latent_q": 8},
    "cope": {"attn_use_cope": True, "attn_cope_max_pos": 16},
    "differential-values": {"attn_learned_value_residual_mix": True, "add_value_residual": True},
    "post-norm": {"pre_norm": False},
    "weight-tied": {"weight_tie_layers": True},
    "dynamic-tanh": {"use_dynamic_tanh": True},
    "flash": {"attn_flash": True},
}


def _x_transformers(settings: dict[str, Any], layers: int) -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=layers, heads=4, attn_dim_head=8, **settings)
    model = TransformerWrapper(num_tokens=FIRST_SPECIAL, max_seq_len=32, attn_layers=layers)
    return model, {"x": torch.randint(0, FIRST_SPECIAL, (2, 24))}


def _x_vision(layers: int) -> Built:
    from x_transformers import Encoder, ViTransformerWrapper

    encoder = Encoder(dim=32, depth=layers, heads=4, attn_dim_head=8)
    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=encoder)
    return model, {"img": torch.randn(2, 3, 32, 32)}


def _x_translator(layers: int) -> Built:
    from x_transformers import XTransformer

    sizes = {"num_tokens": 99, "depth": layers, "heads": 4, "max_seq_len": 32}
    given = {f"{side}_{k}": v for side in ("enc", "dec") for k, v in sizes.items()}
    model = XTransformer(dim=32, **given)
    return model, {"src": torch.randint(0, 99, (2, 24)), "tgt": torch.randint(0, 99, (2, 20))}


# diffusers ------------------------------------------------------------------------------------


def _diffusers(name: str, settings: dict[str, Any], inputs: Callable[[], Inputs]) -> Built:
    import diffusers

    return getattr(diffusers, name)(**settings), inputs()


def _noisy(*shape: int, context: int = 0, **more: Callable[[], Tensor]) -> Callable[[], Inputs]:
    def make() -> Inputs:
        found: Inputs = {"sample" if not more else "hidden_states": torch.randn(2, *shape)}
        found["timestep"] = torch.tensor([3, 7])
        if context:
            found["encoder_hidden_states"] = torch.randn(2, 7, context)
        return {**found, **{key: maker() for key, maker in more.items()}}

    return make


_UNET = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 4,
}  # fmt: skip
_DIFFUSERS: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "UNet2DModel": (
        _UNET | {
            "in_channels": 3, "out_channels": 3, "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        _noisy(3, 16, 16),
    ),
    "UNet2DConditionModel": (
        _UNET | {
            "cross_attention_dim": 24, "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        _noisy(4, 16, 16, context=24),
    ),
    "DiTTransformer2DModel": (
        {
            "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16,
            "in_channels": 4, "out_channels": 4, "num_embeds_ada_norm": 50, "norm_num_groups": 4,
        },
        _noisy(4, 16, 16, class_labels=lambda: torch.tensor([1, 2])),
    ),
    "SD3Transformer2DModel": (
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24,
            "caption_projection_dim": 32, "pooled_projection_dim": 16, "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        _noisy(4, 16, 16, context=24, pooled_projections=lambda: torch.randn(2, 16)),
    ),
    "FluxTransformer2DModel": (
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
            "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
        },
        _noisy(
            16, 4, context=32, pooled_projections=lambda: torch.randn(2, 32),
            img_ids=lambda: torch.zeros(16, 3), txt_ids=lambda: torch.zeros(7, 3),
        ),
    ),
    "PixArtTransformer2DModel": (
        {
            "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16,
            "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24,
        },
        _noisy(4, 16, 16, context=24, attention_mask=lambda: torch.ones(2, 64)),
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
            "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
            "joint_attention_dim": 24, "caption_projection_dim": 32, "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        _noisy(4, 16, 16, context=24, _=lambda: torch.zeros(())),
    ),
    "SanaTransformer2DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 4,
            "attention_head_dim": 8, "num_cross_attention_heads": 4, "cross_attention_dim": 32,
            "cross_attention_head_dim": 8, "caption_channels": 24, "sample_size": 8,
        },
        _noisy(4, 8, 8, context=24, _=lambda: torch.zeros(())),
    ),
    "CogVideoXTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2,
            "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24, "sample_width": 8,
            "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 7,
        },
        _noisy(2, 4, 8, 8, context=24, _=lambda: torch.zeros(())),
    ),
    "WanTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2,
            "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 48,
        },
        _noisy(4, 2, 8, 8, context=24, _=lambda: torch.zeros(())),
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": (16, 32), "norm_num_groups": 4, "sample_size": 16,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
    "VQModel": (
        {
            "block_out_channels": (16, 32), "norm_num_groups": 4, "num_vq_embeddings": 32,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
}  # fmt: skip


def _without_placeholder(made: Callable[[], Inputs]) -> Callable[[], Inputs]:
    return lambda: {key: value for key, value in made().items() if key != "_"}


# PEFT -----------------------------------------------------------------------------------------

_PEFT: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4},
    "LoraConfig-dora": {"r": 4, "use_dora": True},
    "LoraConfig-rslora-dropout": {"r": 4, "use_rslora": True, "lora_dropout": 0.1},
    "LoraConfig-head": {"r": 4, "modules_to_save": ["lm_head"]},
    "AdaLoraConfig": {"total_step": 10},
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 8, "r": 0},
    "BOFTConfig": {"boft_block_size": 4},
    "VeraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 20},
    "HRAConfig": {"r": 4},
    "VBLoRAConfig": {"r": 4, "num_vectors": 8, "vector_length": 8},
    "MissConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "PromptTuningConfig": {"num_virtual_tokens": 5},
    "PrefixTuningConfig": {"num_virtual_tokens": 5},
    "PromptEncoderConfig": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "LNTuningConfig": {},
    "AdaptionPromptConfig": {"adapter_layers": 1, "adapter_len": 4},
}
_OF_PROMPTS = ("PromptTuning", "PrefixTuning", "PromptEncoder", "AdaptionPrompt")


def _peft(name: str, settings: dict[str, Any], layers: int) -> Built:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        )
    )  # fmt: skip
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if name.startswith("LNTuning"):
        targets = {"target_modules": ["input_layernorm"]}
    given = settings if name.startswith(_OF_PROMPTS) else {**targets, **settings}
    config = getattr(peft, name.split("-")[0])(task_type="CAUSAL_LM", **given)
    inputs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    return peft.get_peft_model(model, config), inputs


# torch ----------------------------------------------------------------------------------------


def _translator(**settings: Any) -> Built:
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True, **settings)
    return model, {"src": torch.randn(2, 24, 32), "tgt": torch.randn(2, 20, 32)}


def _encoder(**settings: Any) -> Built:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2), {"src": torch.randn(2, 24, 32)}


class _LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 32)
        layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(32))
        self.head = nn.Linear(32, 99)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids.T)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.head(self.decoder(x, x, tgt_mask=mask, tgt_is_causal=True))


def _causal() -> Built:
    return _LanguageModel(), {"ids": torch.randint(0, 99, (2, 24))}


def _recurrent(kind: str) -> Built:
    return getattr(nn, kind)(32, 48, 2, batch_first=True), {"input": torch.randn(2, 24, 32)}


# All ------------------------------------------------------------------------------------------


def architectures(layers: int) -> list[Architecture]:
    """Return those of every library that is installed, of so many layers where that is open."""
    found: dict[str, Callable[[], Built]] = {
        "torch/Transformer": _translator,
        "torch/Transformer-norm-first": lambda: _translator(norm_first=True, activation="gelu"),
        "torch/TransformerEncoder": _encoder,
        "torch/TransformerEncoder-no-bias": lambda: _encoder(bias=False, dropout=0.0),
        "torch/TransformerDecoder": _causal,
        **{f"torch/{kind}": lambda kind=kind: _recurrent(kind) for kind in ("LSTM", "GRU")},
    }
    if _has("x_transformers"):
        for name, given in _X.items():
            found[f"x-transformers/{name}"] = lambda given=given: _x_transformers(given, layers)
        found["x-transformers/vision"] = lambda: _x_vision(layers)
        found["x-transformers/translator"] = lambda: _x_translator(layers)
    if _has("peft"):
        for name, given in _PEFT.items():
            found[f"peft/{name}"] = lambda name=name, given=given: _peft(name, given, layers)
    if _has("diffusers"):
        for name, (given, make) in _DIFFUSERS.items():
            found[f"diffusers/{name}"] = lambda name=name, given=given, make=make: _diffusers(
                name, given, _without_placeholder(make)
            )
    if _has("timm"):
        for name, given in _TIMM.items():
            found[f"timm/{name}"] = lambda name=name, given=given: _timm(name, given)
    # One library after the other, as with the families of Transformers.
    place = {
        name: sum(n.split("/")[0] == name.split("/")[0] for n in list(found)[:i])
        for i, name in enumerate(found)
    }
    return [Architecture(name, found[name]) for name in sorted(found, key=place.__getitem__)]


def _has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
