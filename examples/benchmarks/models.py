"""The models that are measured, in full and cut to what a machine holds."""

from __future__ import annotations

import argparse
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from examples.benchmarks import corpus
from pamm_compile.options import Base

PAPER_TOKENS = 512 * 256
"""Tokens of one optimizer step in the paper's pre-training, over all devices."""
DEVICE_TOKENS = 64 * 256
"""Tokens that we take one device to get of them."""
WEIGHTS = "bfloat16-weights"
"""The dtype of a case whose weights are bfloat16 too."""
DTYPES = ("float32", "bfloat16", WEIGHTS)


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
    "llama-7b": Shape("llama", 4096, 32, 32, 11008, 32000, 256),
    "gpt2": Shape("gpt2", 768, 12, 12, 3072, 50257, 1024),
    "roberta": Shape("roberta", 768, 12, 12, 3072, 50265, 512),
}
"""LLaMA as pre-trained in the paper; GPT-2 small; RoBERTa-base."""
NAMES = {
    "llama-60m": "LLaMA-60M",
    "llama-350m": "LLaMA-350M",
    "llama-1b": "LLaMA-1B",
    "llama-7b": "LLaMA-7B",
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
    """One of DTYPES; "bfloat16" is autocast, with float32 weights."""
    ratio: float = 256.0
    min_tokens: int = 256
    threads: int = 1
    seed: int = 0
    base: Base = "inductor"
    """"aot_eager" generates no code: to see that something runs."""

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
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if case.dtype == WEIGHTS else torch.float32)
    try:
        with torch.device(case.device):
            model = build(case.shape)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def make_batch(case: Case) -> dict[str, Tensor]:
    """Draw a batch of real text for a case's model."""
    generator = torch.Generator().manual_seed(case.seed)
    text, shape = corpus.Text().train, case.shape
    batch = corpus.draw(text, shape.family, case.batch, shape.sequence, generator)
    return {name: each.to(case.device) for name, each in batch.items()}


def precision(case: Case) -> AbstractContextManager[Any]:
    """Return autocast for "bfloat16"."""
    return torch.autocast(
        torch.device(case.device).type, torch.bfloat16, enabled=case.dtype == "bfloat16"
    )


def study_inner(hidden: int) -> int:
    """Return the features between the projections of a study's MLP."""
    # Three matrices of 8/3 · hidden do the work of two of 4 · hidden, as in LLaMA.
    return math.ceil(hidden * 8 / 3 / 32) * 32


def study_model(args: argparse.Namespace) -> nn.Module:
    """Build the small LLaMA that the options of a study describe."""
    inner = study_inner(args.hidden)
    shape = Shape("llama", args.hidden, args.layers, args.heads, inner, 256, args.sequence)
    return build(shape)


def build(size: Shape) -> nn.Module:
    """Build one of Transformers' own classes, with random weights and without dropout."""
    shared = {"num_hidden_layers": size.layers, "num_attention_heads": size.heads}
    if size.family == "llama":
        config = LlamaConfig(
            **shared,
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.inner,
            max_position_embeddings=size.sequence,
            attention_dropout=0.0,
            use_cache=False,
        )
        return LlamaForCausalLM(config)
    if size.family == "gpt2":
        config = GPT2Config(
            vocab_size=size.vocabulary,
            n_embd=size.width,
            n_inner=size.inner,
            n_layer=size.layers,
            n_head=size.heads,
            n_positions=size.sequence,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        model = GPT2LMHeadModel(config)
        # Transformers would warn that it takes this for granted, and the warning breaks the graph.
        model.loss_type = "ForCausalLM"
        return model
    config = RobertaConfig(
        **shared,
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        # Positions begin behind the padding token's number.
        max_position_embeddings=size.sequence + 1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        type_vocab_size=1,
        use_cache=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForMaskedLM(config)
