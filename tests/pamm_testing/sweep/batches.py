"""Inputs made up for a model of Transformers, from what its forward() takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pamm_testing.sweep.shrink import FIRST_SPECIAL
from pamm_testing.sweep.steps import Inputs

BATCH, LENGTH = 2, 24
_PARTS = (
    "text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config",
    "thinker_config", "encoder_config", "image_config",
)  # fmt: skip


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first setting of these names, of a configuration or of its parts."""
    for part in (config, *(getattr(config, name, None) for name in _PARTS)):
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, dict):
                return value
    return default


def batches(model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    """Yield ways to make inputs, the fullest first."""
    signature = inspect.signature(model.forward).parameters
    config = model.config
    main = getattr(model, "main_input_name", "input_ids")
    required = [
        name
        for name, p in signature.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    plain = dict.fromkeys([main, *required])
    if "decoder_input_ids" in signature and main != "decoder_input_ids":
        plain["decoder_input_ids"] = None
    full = plain | dict.fromkeys(n for n in _ALWAYS if n in signature)
    common = {n: False for n in ("use_cache",) if n in signature}

    def made(names: Any, **forms: int) -> Inputs:
        found = {n: _MAKERS[n](config, **_only(forms, n)) for n in names if n in _MAKERS}
        return {**found, **common}

    if "pixel_values" in signature and "input_ids" in signature:
        yield lambda: _with_images(model, made([*plain, "input_ids"]))
        yield lambda: made([*plain, "input_ids", "pixel_values"])
    for extra in ("input_features", "input_values", "pixel_values_videos"):
        if extra in signature and extra not in plain:
            for form in range(4):
                yield lambda extra=extra, form=form: made([*plain, extra], form=form)
    for names in (full, plain) if full != plain else (plain,):
        for form in range(4):
            yield lambda names=names, form=form: made(names, form=form)
    yield lambda: made([*plain, "input_ids"])


def _only(forms: dict[str, int], name: str) -> dict[str, int]:
    return forms if name in _FORMS else {}


def _ids(length: int) -> Callable[[Any], Tensor]:
    def make(config: Any) -> Tensor:
        most = min(setting(config, "vocab_size", default=FIRST_SPECIAL), FIRST_SPECIAL)
        longest = setting(config, "max_position_embeddings", default=length)
        return torch.randint(5, most, (BATCH, min(length, longest if longest > 7 else length)))

    return make


def _images(config: Any, form: int = 0) -> Tensor:
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3)
    size = setting(config, "image_size", "crop_size", "input_size", default=64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if isinstance(size, dict):
        height, width = size["height"], size["width"]
    frames = setting(config, "num_frames", "frames_per_clip")
    shape = {0: (), 1: (1,), 2: (frames or 4,), 3: ()}[form if not (frames and form == 0) else 2]
    return torch.randn(BATCH, *shape, channels, min(height, 256), min(width, 256))


def _with_images(model: nn.Module, inputs: Inputs) -> Inputs:
    """Put as many image tokens into the text as the tower makes of an image."""
    config = model.config
    token = setting(config, "image_token_id", "image_token_index", "media_token_id")
    if token is None:
        raise ValueError("no image token")
    images: Inputs = {"pixel_values": _images(config)}
    signature = inspect.signature(model.get_image_features).parameters
    if "image_grid_thw" in signature:
        images = _patches(config)
    if "image_sizes" in signature:
        images["image_sizes"] = torch.tensor([images["pixel_values"].shape[-2:]] * BATCH)
    with torch.no_grad():
        found = model.get_image_features(**images)
    found = getattr(found, "pooler_output", found)
    found = torch.cat([t.flatten(0, -2) for t in found]) if not isinstance(found, Tensor) else found
    count = found.numel() // found.shape[-1] // BATCH
    ids = torch.randint(5, FIRST_SPECIAL, (BATCH, LENGTH + count))
    ids[:, 4 : 4 + count] = token
    more = {"input_ids": ids, **images}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        more["mm_token_type_ids"] = (ids == token).int()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        more["token_type_ids"] = (ids == token).long()
    return {**inputs, **more}


def _patches(config: Any) -> Inputs:
    vision = getattr(config, "vision_config", config)
    patch = setting(vision, "patch_size")
    columns = setting(vision, "in_channels", "in_chans", default=3) * patch**2
    columns *= setting(vision, "temporal_patch_size", default=1)
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    return {"pixel_values": torch.randn(16 * BATCH, columns), "image_grid_thw": grid}


def _videos(config: Any) -> Tensor:
    images = _images(config, 3)
    return images[:, None].repeat(1, setting(config, "frames_per_clip", default=4), 1, 1, 1)


def _waves(config: Any, form: int = 0) -> Tensor:
    bins = setting(config, "num_mel_bins", default=80)
    length = setting(config, "max_length", default=64)
    return torch.randn(
        *{0: (BATCH, 8000), 1: (BATCH, 1, 1920), 2: (BATCH, length, bins), 3: (BATCH, 20, 80)}[form]
    )


def _spectra(config: Any, form: int = 0) -> Tensor:
    bins = setting(
        config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim",
        "feature_size", "input_dim", default=80,
    )  # fmt: skip
    length = 2 * setting(config, "max_source_positions", default=32)
    spec = setting(config, "spec_size", default=64)
    return torch.randn(
        *{
            0: (BATCH, 64, bins), 1: (BATCH, bins, length), 2: (BATCH, bins, 64),
            3: (BATCH, 1, spec, bins),
        }[form]
    )  # fmt: skip


def _series(config: Any, form: int = 0) -> Tensor:
    length = setting(config, "context_length", "prediction_length", default=32)
    lags = max(setting(config, "lags_sequence", default=[0]))
    channels = setting(config, "num_input_channels", default=1)
    shape = {0: (length + lags,), 1: (length, channels), 2: (length + lags, channels), 3: (64,)}
    return torch.randn(BATCH, *shape[form]).abs()


def _time(config: Any, which: str) -> Tensor:
    length = setting(config, "prediction_length", default=8)
    if which == "past":
        lags = max(setting(config, "lags_sequence", default=[0]))
        length = setting(config, "context_length", default=length) + lags
    return torch.randn(BATCH, length, setting(config, "num_time_features", default=0))


def _boxes(config: Any) -> Tensor:
    corner = torch.randint(0, 60, (BATCH, LENGTH, 2))
    return torch.cat([corner, corner + 20], -1)


_MAKERS: dict[str, Callable[..., Any]] = {
    "input_ids": _ids(LENGTH), "decoder_input_ids": _ids(20), "inputs": _ids(LENGTH),
    "pixel_values": _images, "pixel_values_videos": _videos, "input_values": _waves,
    "input_features": _spectra, "bbox": _boxes, "past_values": _series,
    "past_time_features": lambda c: _time(c, "past"),
    "past_observed_mask": lambda c: torch.ones(_time(c, "past").shape[:2]),
    "future_time_features": lambda c: _time(c, "future"),
    "future_values": lambda c: torch.rand(BATCH, setting(c, "prediction_length", default=8)),
    "task_inputs": _ids(7), "attention_mask": lambda c: torch.ones(BATCH, LENGTH).long(),
    "visual_feats": lambda c: torch.randn(BATCH, 5, c.visual_feat_dim),
    "visual_pos": lambda c: torch.rand(BATCH, 5, c.visual_pos_dim),
    "states": lambda c: torch.randn(BATCH, 6, c.state_dim),
    "actions": lambda c: torch.randn(BATCH, 6, c.act_dim),
    "rewards": lambda c: torch.randn(BATCH, 6, 1),
    "returns_to_go": lambda c: torch.randn(BATCH, 6, 1),
    "timesteps": lambda c: torch.arange(6).repeat(BATCH, 1),
}  # fmt: skip
# Optional only by name.
_ALWAYS = (
    "visual_feats", "visual_pos", "states", "actions", "rewards", "returns_to_go", "timesteps",
    "past_time_features", "past_observed_mask", "future_time_features", "future_values",
)  # fmt: skip
_FORMS = {"pixel_values", "input_values", "input_features", "past_values"}
