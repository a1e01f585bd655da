"""The model classes of Transformers, of random weights and a few thousand parameters a matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pamm_testing.sweep.batches import batches
from pamm_testing.sweep.shrink import shrink
from pamm_testing.sweep.steps import Architecture, Inputs, loss_of

_MOST_PARAMETERS = 40_000_000

# The first list that has a family gives its class.
_TASKS = (
    "MASKED_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM",
    "CTC", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "MASK_GENERATION", "DEPTH_ESTIMATION", "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "MULTIMODAL_LM", "VISUAL_QUESTION_ANSWERING",
    "TEXT_TO_WAVEFORM", "TIME_SERIES_PREDICTION", "DOCUMENT_QUESTION_ANSWERING", "PRETRAINING",
)  # fmt: skip

# What issues were once found in, or expected in, comes first.
_FIRST = """
    llama gemma3 gpt_oss deepseek_v2 detr mask2former clap encodec hubert wav2vec2 sam funnel
    convbert zamba2 llava qwen2_5_vl wav2vec2-bert wav2vec2-conformer seamless_m4t vitdet xlnet
    t5 bart whisper vit clip bert deberta-v2 roformer mamba mamba2 rwkv jamba mixtral
    deepseek_v3 qwen3_next bamba falcon_h1 recurrent_gemma longformer big_bird reformer led
    longt5 nystromformer yoso mra fnet canine perceiver blip-2 instructblip idefics2 mllama
    paligemma pix2struct deformable_detr rt_detr grounding-dino owlvit oneformer maskformer
    segformer swinv2 maxvit cvt levit mobilevit pvt_v2 hiera dinov3_vit siglip2 flava
    bridgetower lxmert visual_bert vilt tapas luke layoutlmv3 speecht5 vits musicgen moshi mimi
    dac autoformer informer patchtst patchtsmixer timesfm decision_transformer esm vjepa2
    videomae timesformer vivit
"""

_OWN: dict[str, dict[str, Any]] = {
    "reformer": {
        "axial_pos_shape": [4, 6], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
    },
    "deformable_detr": {"decoder_layers": 2},
    "hiera": {"image_size": [64, 64]},
    "rwkv": {"num_hidden_layers": 2},
    "perceiver": {"num_self_attends_per_block": 1, "max_position_embeddings": 24},
}  # fmt: skip
"""Settings that no rule makes small."""

_VARIANTS = {
    "llama-eager": ("llama", "eager"),
    "bert-eager": ("bert", "eager"),
}
"""Names, with the family and the attention that it is to use; flex_attention trains on no CPU."""


@dataclass
class _Family:
    kind: str
    model: str
    layers: int
    attention: str | None = None
    _choice: tuple[int, int] | None = field(default=None, repr=False)

    def __call__(self) -> tuple[nn.Module, Inputs]:
        """Return the model and its inputs, the same at every call."""
        if self._choice is None:
            self._choice = self._search()
        factor, number = self._choice
        torch.manual_seed(0)
        model = self._build(factor)
        return model, _nth(batches(model), number)()

    def _search(self) -> tuple[int, int]:
        """Return the factor and the inputs with which a forward pass works."""
        errors: list[tuple[int, str]] = []
        for factor in (8, 4, 16, 2):
            try:
                model = self._build(factor).train()
            except Exception as error:  # noqa: BLE001 - another size may do
                errors.append((factor, f"build: {type(error).__name__}: {error}"))
                continue
            for number, make in enumerate(batches(model)):
                try:
                    torch.manual_seed(0)
                    inputs = make()
                    loss_of(model(**inputs))
                except Exception as error:  # noqa: BLE001 - other inputs may do
                    errors.append((factor, f"{number}: {type(error).__name__}: {error}"))
                    continue
                return factor, number
        # What the first factor said of the last inputs tells most.
        told = [text for factor, text in errors if factor == errors[0][0]]
        raise RuntimeError(f"no size and inputs do: {' | '.join(t[:160] for t in told[:4])}")

    def _build(self, factor: int) -> nn.Module:
        import transformers

        config = transformers.CONFIG_MAPPING[self.kind]()
        settings = shrink(config.to_dict(), factor, self.layers) | _OWN.get(self.kind, {})
        small = type(config).from_dict(settings)
        if self.attention is not None:
            small._attn_implementation = self.attention
        model_class = getattr(transformers, self.model)
        with torch.device("meta"):
            try:
                count = sum(p.numel() for p in model_class(small).parameters())
            except Exception:  # noqa: BLE001 - some cannot be built there
                count = 0
        if count > _MOST_PARAMETERS:
            raise ValueError(f"{count} parameters are too many")
        model: nn.Module = model_class(small)
        return model


def _nth(makers: Iterator[Callable[[], Inputs]], number: int) -> Callable[[], Inputs]:
    return next(make for i, make in enumerate(makers) if i == number)


def families(layers: int) -> list[Architecture]:
    """Return one architecture a family, those of `_FIRST` first, then in an order like chance.

    Args:
        layers: how many there are at least; one of every kind is there in any case.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    def model_of(kind: str) -> Any:
        for task in _TASKS:
            names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
            if kind in names:
                return names[kind]
        return modeling_auto.MODEL_MAPPING_NAMES.get(kind)

    kinds, first = list(CONFIG_MAPPING.keys()), _FIRST.split()
    rest = sorted(set(kinds) - set(first), key=lambda k: hashlib.md5(k.encode()).digest())
    found = []
    for kind in [*(k for k in first if k in kinds), *rest]:
        model = model_of(kind)
        # A tower is trained with the model that it is of.
        part = kind.endswith(("_model", "_text", "_vision", "_encoder", "_decoder", "_audio"))
        if model is not None and not part:
            model = model if isinstance(model, str) else model[0]
            family = _Family(kind, model, layers)
            found.append(Architecture(f"transformers/{kind}", family))
    for name, (kind, attention) in _VARIANTS.items():
        family = _Family(kind, model_of(kind), layers, attention)
        found.insert(20, Architecture(f"transformers/{name}", family))
    return found
