"""Configurations of Transformers made small, whatever the family calls its sizes.

Widths are divided by one factor, so that what depends on them (heads × their width, parts of rotary
embeddings, what one tower hands to another) still fits; layers are a few of every kind.
"""

from __future__ import annotations

import re
from typing import Any

VOCAB = 128
FIRST_SPECIAL = 100
"""Token ids of a configuration that lie beyond the vocabulary are numbered from here on."""

Settings = dict[str, Any]

_WIDTH = re.compile(
    r"hidden|embed|width|channel|dim|rank|d_model|d_ff|d_kv|d_inner|d_head|d_latents|ffn|inner|"
    r"n_embd|feature_size|coordinate_size|shape_size|"
    r"intermediate|bottleneck|mlp_size|proj|fpn|feedforward|num_filters|num_pos_feats"
)
_NO_WIDTH = re.compile(
    r"^num_(?!filters|pos_feats)|layers?$|vocab|image|patch_size|window|kernel|stride|max_|position_emb|"
    r"length|token|_id$|dropout|prob|mel_bins|num_channels|ratio|block_size|frames|state|^time|"
    r"temporal|act|bias|^use_|type|interval|_eps|init|scale|groups|per_tok|_labels|input_size|"
    r"audio_channels|in_channels|n_channels|input_channels|input_dim$"
)
_INNER = re.compile(r"intermediate_size$|^d_ff$|^ffn_dim$|^n_inner$|ffn_hidden_size$|_ffn_dim$")
_LAYERS = re.compile(
    r"^(num|n)_((?!feat_extract|adapter|conv|residual).*_)?layers?$|_layers$|^depth$|^num_blocks$|"
    r"^n_layers?$|_num_layers$|^iou_head_depth$"
)
_NO_LAYERS = re.compile(r"feat_extract|adapter|^num_residual|nextn|cross_attention_layers|lstm")
_EXPERTS = re.compile(r"^(n|num)_(routed_|local_|moe_)?experts$|^moe_num_experts$|_num_experts$")
_CHOSEN = re.compile(r"experts_per_tok|^top_?k|moe_topk|_top_k$|experts_top_k|num_selected_experts")
_QUERIES = re.compile(r"^num_(object_)?queries$|^num_query_tokens$|^num_latents$|_num_queries$")
_VOCABULARY = re.compile(r"vocab_size|^n_vocab$|codebook_size")
_TOKEN = re.compile(r"token_(id|index)$|_token$|_id$|_idx$")
_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
_BACKBONES = {"resnet50": "resnet18", "resnet101": "resnet18"}


def shrink(settings: Settings, factor: int, layers: int) -> Settings:
    """Return the settings of a small model of the same family.

    Args:
        settings: of a configuration, as `to_dict` gives them.
        factor: divides every width that is at least four times as large.
        layers: how many stay, at least, and more where there are several kinds.
    """
    return _shrink(settings, factor, layers, {}, "")


def _shrink(
    settings: Settings, factor: int, least: int, tokens: dict[int, int], inside: str
) -> Settings:
    layers, chosen = _chosen_layers(settings, least)
    small: Settings = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            small[key] = _shrink(value, factor, least, tokens, key)
        elif isinstance(value, list) and _PLACES.search(key):
            small[key] = [chosen.index(i) for i in value if i in chosen]
        elif key in ("out_features", "out_indices") and "depths" not in settings and layers:
            small[key] = None
        elif value is None and key in _NEEDED:
            small[key] = _NEEDED[key]
        elif isinstance(value, list) and layers and len(value) == layers and key not in _PLAIN:
            small[key] = [value[i] for i in chosen]
        elif isinstance(value, bool) or value is None or isinstance(value, str | float):
            small[key] = False if key == "use_pretrained_backbone" else value
            if key == "backbone":
                small[key] = _BACKBONES.get(value, value)
        else:
            small[key] = _small(key, value, factor, tokens, len(chosen), settings, inside)
    _join(small)
    return small


def _join(small: Settings) -> None:
    """Let a tower make what the language model reads; not all defaults do."""
    text, vision = small.get("text_config"), small.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        return
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = text["hidden_size"]
    rope = text.get("rope_parameters")
    if "spatial_merge_size" in vision and isinstance(rope, dict) and "mrope_section" not in rope:
        half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
        rope["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]


_PLACES = re.compile(r"layer_ids$|layer_indices$|^cross_attention_layers$|layer_idxs?$")
_NEEDED = {
    "vocab_size": VOCAB,
    "num_experts_per_tok": 2,
    "image_token_index": VOCAB - 8,
    "prediction_length": 8,
}
_PLAIN = ("conv_dim", "conv_stride", "conv_kernel", "mrope_section")


def _chosen_layers(settings: Settings, least: int) -> tuple[int, list[int]]:
    """Return how many layers there are, and which stay: the first, and one of every kind."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
    if "depths" in settings:
        return 0, []
    layers = next((settings[n] for n in names if isinstance(settings.get(n), int)), 0)
    kinds = next((settings[k] for k in _KINDS if isinstance(settings.get(k), list)), [])
    # Layers that are left out at random behave otherwise from the third on.
    if any(
        settings.get(key) for key in ("layerdrop", "encoder_layerdrop", "speech_encoder_layerdrop")
    ):
        least = 3
    chosen: set[int] = set()
    if len(kinds) == layers:
        chosen = set({str(kind): i for i, kind in reversed(list(enumerate(kinds)))}.values())
    for key, value in settings.items():
        if isinstance(value, list) and value and _PLACES.search(key):
            chosen.add(value[0])
    for i in range(layers):
        if len(chosen) < least:
            chosen.add(i)
    return layers, sorted(chosen)[:5]


def _small(
    key: str,
    value: Any,
    factor: int,
    tokens: dict[int, int],
    layers: int,
    settings: Settings,
    inside: str,
) -> Any:
    one = value[0] if isinstance(value, list | tuple) and value else value
    if not isinstance(one, int) or isinstance(one, bool):
        return value
    if _VOCABULARY.search(key):
        return _each(value, lambda v: min(v, VOCAB))
    if _TOKEN.search(key):
        return _each(value, lambda v: _token(v, tokens))
    if _LAYERS.search(key) and not _NO_LAYERS.search(key):
        return value if "depths" in settings else _each(value, lambda v: min(v, layers or 1))
    if key in ("depths", "block_sizes", "stage_depths"):
        return [min(v, 2) if i == 0 else 1 for i, v in enumerate(value)]
    if _EXPERTS.search(key):
        return _each(value, lambda v: min(v, 4))
    if _CHOSEN.search(key):
        return _each(value, lambda v: min(v, 2))
    if key in ("n_group", "topk_group", "first_k_dense_replace"):
        return min(value, 1)
    if _QUERIES.search(key):
        return min(value, 16)
    if key in ("image_size", "crop_size"):
        return _each(value, lambda v: _image(v, settings))
    if key == "image_embedding_size":
        return _image(settings.get("image_size", 0), settings) // settings.get("patch_size", 1)
    if key == "global_attn_indexes":
        return [1]
    if key == "mrope_section":
        return [v // factor for v in value]
    if _INNER.search(key) and isinstance(value, int) and value > 32:
        # Nothing else depends on it, and experts are multiplied in rows of 16 bytes.
        return max(16, value // factor // 8 * 8)
    if _WIDTH.search(key) and not _NO_WIDTH.search(key) and "rope" not in inside:
        flat = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(v, int) and v % factor == 0 for v in flat) and max(flat) >= 4 * factor:
            return _each(value, lambda v: v // factor)
    return value


def _each(value: Any, function: Any) -> Any:
    if isinstance(value, list | tuple):
        return [function(v) if isinstance(v, int) else v for v in value]
    return function(value)


def _token(value: int, tokens: dict[int, int]) -> int:
    if value < FIRST_SPECIAL:
        return value
    return tokens.setdefault(value, FIRST_SPECIAL + len(tokens) % (VOCAB - FIRST_SPECIAL))


def _image(value: int, settings: Settings) -> int:
    patch = settings.get("patch_size", 8)
    patch = patch[0] if isinstance(patch, list | tuple) else patch or 8
    return min(value, max(64 // patch, 4) * patch) if isinstance(patch, int) else value
