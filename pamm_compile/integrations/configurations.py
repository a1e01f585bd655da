"""Make a model and a batch from a configuration file of Transformers, for the command line."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from pamm_compile import checks
from pamm_compile.errors import InvalidOptionError

_OTHERWISE = "Give MODULE:FUNCTION in its place, a function that returns a model and a batch."
_USUAL, _LONGEST = 2048, 2**24
"""Tokens of a sequence where none are asked for, and of a batch at most."""


class _Kind(enum.Enum):
    """Of a batch."""

    TEXT = enum.auto()
    TOKENS = enum.auto()
    """Text, and a label a token."""
    SEQUENCES = enum.auto()
    """Text, and a label a sequence."""
    IMAGES = enum.auto()


_HEADS = {
    "ForCausalLM": _Kind.TEXT,
    "LMHeadModel": _Kind.TEXT,
    "ForMaskedLM": _Kind.TEXT,
    "ForConditionalGeneration": _Kind.TEXT,
    "ForTokenClassification": _Kind.TOKENS,
    "ForSequenceClassification": _Kind.SEQUENCES,
    "ForImageClassification": _Kind.IMAGES,
}
"""What the end of a class's name says."""

_INPUTS = {kind: "pixel_values" if kind is _Kind.IMAGES else "input_ids" for kind in _Kind}


@dataclass(frozen=True)
class Asked:
    """What a model is to be made for.

    Args:
        batch: sequences or images, at least 1.
        sequence: tokens of each, at least 1; None: 2,048, or as many as the model has positions.
        dtype: of the weights.
        device: name of one, for weights and batch.

    Raises:
        InvalidOptionError: a value is not allowed.
    """

    batch: int
    sequence: int | None
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        hint = "It is a number of sequences."
        checks.integer("--batch", self.batch, 1, hint, _LONGEST)
        if self.sequence is not None:
            hint = f"All sequences together may have {_LONGEST} tokens."
            checks.integer("--sequence", self.sequence, 1, hint, _LONGEST // self.batch)
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise checks.refusal("--device", self.device, "cpu, cuda or the like", "") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            hint = "explain --times-on shows the times of a GPU that is not there."
            raise checks.refusal("--device", self.device, "a device of this machine", hint)


def from_config(path: Path, asked: Asked, *, random: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model with random weights, and a batch for which it returns a loss.

    Args:
        path: a config.json, or the folder that holds it.
        asked: sizes, dtype and device.
        random: whether tokens are drawn; zeros otherwise, as fake tensors hold no values.

    Returns:
        The model in training mode, and its keyword arguments: token ids [batch, sequence] or
        images, and labels.

    Raises:
        InvalidOptionError: Transformers cannot build a model of the file, or the model takes other
            inputs than ids or images.
    """
    try:
        import transformers
        from transformers import initialization
    except ImportError as error:
        raise InvalidOptionError(
            "--config needs Transformers: pip install transformers."
        ) from error
    path = path / "config.json" if path.is_dir() else path
    _check_file(path)
    # Drawing from a truncated normal distribution reads what was drawn, and there may be none.
    undrawn = {} if random else {"trunc_normal_": lambda tensor, *_, **__: tensor}
    patched = mock.patch.dict(initialization.TORCH_INIT_FUNCTIONS, undrawn)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(path)
        config.use_cache = False
        if getattr(config, "pad_token_id", None) is None:
            # Classifiers of decoders look for the last token that is none.
            config.pad_token_id = 0
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id
        names = config.architectures or []
        classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        make = classes[0]._from_config if classes else transformers.AutoModelForCausalLM.from_config
        with torch.device(asked.device), patched:
            model = make(config, dtype=asked.dtype).train()
    except Exception as error:
        # What a class of the configuration's choice raises is of any type.
        raise InvalidOptionError(
            f"--config {path}: Transformers makes no model of it: {_first_line(error)}. "
            f"{_OTHERWISE}"
        ) from error
    return model, _batch(model, asked, random=random)


def _check_file(path: Path) -> None:
    """Raise if a file is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidOptionError(f"--config {path}: there is no such file.") from None
    except OSError as error:
        raise InvalidOptionError(f"--config {path}: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidOptionError(f"--config {path} is no JSON: {_first_line(error)}.") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise InvalidOptionError(
            f"--config {path} is no configuration of Transformers: it has no model_type."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _batch(model: nn.Module, asked: Asked, *, random: bool) -> dict[str, Tensor]:
    name, config = type(model).__name__, cast("Any", model.config)
    kind = next((kind for suffix, kind in _HEADS.items() if name.endswith(suffix)), None)
    if kind is None or model.main_input_name != _INPUTS[kind]:
        heads = ", ".join(f"…{suffix}" for suffix in _HEADS)
        raise InvalidOptionError(
            f"no batch can be made for {name} from its configuration alone; it can for classes of "
            f"text or images ({heads}). {_OTHERWISE}"
        )
    labels = torch.float32 if getattr(config, "num_labels", 0) == 1 else torch.int64
    with torch.device(asked.device):
        if kind is _Kind.IMAGES:
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            shape = (asked.batch, config.num_channels, height, width)
            images = torch.randn(shape) if random else torch.zeros(shape)
            return {
                "pixel_values": images.to(asked.dtype),
                "labels": torch.zeros(asked.batch, dtype=labels),
            }
        ids = torch.zeros(asked.batch, _length(config, asked), dtype=torch.int64)
        if random:
            ids = torch.randint_like(ids, config.get_text_config().vocab_size)
        if kind is _Kind.TEXT:
            return {"input_ids": ids, "labels": ids}
        answers = torch.zeros_like(ids if kind is _Kind.TOKENS else ids[:, 0], dtype=labels)
        return {"input_ids": ids, "labels": answers}


def _length(config: Any, asked: Asked) -> int:
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    if asked.sequence is None:
        # Some have room for fewer tokens than positions: 514 for 512.
        return int(min(_USUAL, 2 ** (most.bit_length() - 1)))
    if asked.sequence > most:
        hint = "The configuration has no more positions."
        raise checks.refusal("--sequence", asked.sequence, f"at most {most}", hint)
    return asked.sequence
