"""The models that are measured, in full and cut to what a machine holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import common
import corpus
import torch
from torch import Tensor, nn

PAPER_TOKENS = 512 * 256
"""Tokens of one optimizer step in the paper's pre-training, over all devices."""
DEVICE_TOKENS = 64 * 256
"""Tokens that we take one device to get of them."""


class Shape(NamedTuple):
    """What decides the sizes in a transformer."""

    family: str
    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    sequence: int


SHAPES = {
    "llama-60m": Shape("llama", 512, 8, 8, 1376, 32000, 256),
    "llama-350m": Shape("llama", 1024, 24, 16, 2736, 32000, 256),
    "llama-1b": Shape("llama", 2048, 24, 32, 5461, 32000, 256),
    "gpt2": Shape("gpt2", 768, 12, 12, 3072, 50257, 1024),
    "roberta": Shape("roberta", 768, 12, 12, 3072, 50265, 512),
}
"""LLaMA as pre-trained in the paper; GPT-2 small; RoBERTa-base."""
NAMES = {
    "llama-60m": "LLaMA-60M",
    "llama-350m": "LLaMA-350M",
    "llama-1b": "LLaMA-1B",
    "gpt2": "GPT-2 small",
    "roberta": "RoBERTa-base",
}


@dataclass(frozen=True)
class Case:
    """One model on one machine."""

    model: str
    shape: Shape
    batch: int
    device: str = "cpu"
    dtype: str = "float32"
    """"bfloat16" is autocast, with float32 weights."""
    ratio: float = 256.0
    min_tokens: int = 256
    threads: int = 1
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens a step, b."""
        return self.batch * self.shape.sequence

    @property
    def generators(self) -> int:
        """Rows that PAMM keeps of each input, k."""
        return math.ceil(self.tokens / self.ratio)

    def cuts(self) -> str:
        """Say how this differs from the model that it is named after."""
        full, here = SHAPES[self.model], self.shape
        words = {"layers": "layers", "width": "features", "heads": "heads", "inner": "inner"}
        words |= {"vocabulary": "tokens in the vocabulary", "sequence": "tokens a sequence"}
        parts = [
            f"{getattr(here, field):,} of {getattr(full, field):,} {word}"
            for field, word in words.items()
            if getattr(here, field) != getattr(full, field)
        ]
        cut = f" with {', '.join(parts)}" if parts else ", not cut"
        whole = f" (the paper's step: {PAPER_TOKENS:,})" if here.family == "llama" else ""
        return (
            f"{NAMES[self.model]} shape{cut}; {self.tokens:,} tokens a step{whole}, dropout off, "
            f"{self.dtype}"
        )


def make_model(case: Case) -> nn.Module:
    """Build a case's model on its device, in training mode, the same weights for the same seed."""
    torch.manual_seed(case.seed)
    shape = case.shape
    with torch.device(case.device):
        model = common.make_model(
            shape.family,
            hidden=shape.width,
            layers=shape.layers,
            heads=shape.heads,
            inner=shape.inner,
            vocabulary=shape.vocabulary,
            positions=shape.sequence,
        )
    return model.train()


def make_batch(case: Case) -> dict[str, Tensor]:
    """Draw a batch of real text for a case's model."""
    generator = torch.Generator().manual_seed(case.seed)
    text, shape = corpus.Text().train, case.shape
    batch = corpus.draw(text, shape.family, case.batch, shape.sequence, generator)
    return {name: each.to(case.device) for name, each in batch.items()}
