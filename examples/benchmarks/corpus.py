"""The text that benchmarks train on, as bytes, from what every Python has installed."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

_MASK = 256
_MASKED_SHARE = 0.15
_VALIDATION_EVERY = 20
_LEAST_TEXT = 1_000_000


class Text:
    """The Python standard library's own sources, as bytes.

    Files are taken in the order of their paths; every 20th is for validation. Packages installed
    beside the library, and tests, are left out.

    Args:
        without: names of further folders to leave out.
    """

    def __init__(self, without: Sequence[str] = ()) -> None:
        self.train, self.validation = _standard_library(tuple(without))


@functools.cache
def _standard_library(without: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and to validate on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", *without}
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not left_out.intersection(path.relative_to(root).parts)
    )
    # RoBERTa's padding is byte 0, which no source needs.
    texts = [(root / file).read_bytes().replace(b"\0", b"") for file in files]
    validation = b"".join(texts[::_VALIDATION_EVERY])
    del texts[::_VALIDATION_EVERY]
    train = b"".join(texts)
    if len(train) < _LEAST_TEXT:
        raise SystemExit(
            f"{root} holds {len(train):,} bytes of Python sources, too few to train on; "
            "run this with a Python whose standard library is installed as .py files."
        )
    return (
        torch.frombuffer(bytearray(train), dtype=torch.uint8),
        torch.frombuffer(bytearray(validation), dtype=torch.uint8),
    )


class Prose:
    """The texts of Python's own reference documentation; the last 20th is for validation."""

    def __init__(self) -> None:
        text = bytearray("\n".join(topics.topics.values()).encode())
        end = len(text) - len(text) // _VALIDATION_EVERY
        self.train = torch.frombuffer(text[:end], dtype=torch.uint8)
        self.validation = torch.frombuffer(text[end:], dtype=torch.uint8)


def draw(
    text: Tensor, model: str, batch: int, sequence: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw a batch of random windows of a text.

    Args:
        text: uint8 [bytes].
        model: one of the families of `models.SHAPES`; "roberta" gets 15 % of its bytes masked.
        batch: windows.
        sequence: bytes a window.
        generator: decides which.

    Returns:
        "input_ids" and "labels", int64 [batch, sequence], as the models of Transformers take them.
    """
    starts = torch.randint(len(text) - sequence, (batch, 1), generator=generator)
    ids = text[starts + torch.arange(sequence)].long()
    if model != "roberta":
        return {"input_ids": ids, "labels": ids.clone()}
    masked = torch.rand(ids.shape, generator=generator) < _MASKED_SHARE
    return {"input_ids": ids.masked_fill(masked, _MASK), "labels": ids.masked_fill(~masked, -100)}
