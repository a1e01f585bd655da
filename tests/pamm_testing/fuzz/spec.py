"""A printable description of a random small transformer: its repr is all that builds it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMS = (
    "linear", "conv1d", "einsum", "per_head", "fused", "fused_conv1d", "fused_kv", "packed",
    "concatenated",
)  # fmt: skip
ATTENTIONS = (
    "sdpa", "sdpa_causal", "sdpa_bool", "sdpa_float", "sdpa_padding", "sdpa_scale", "math",
    "math_fp32", "math_causal", "math_additive", "math_exp",
)  # fmt: skip
NORMS = ("layer", "layer_plain", "rms", "rms_fp32", "none", "tanh", "relu")
ORDERS = ("pre", "post", "sandwich", "parallel", "parallel_norms", "bare")
MLPS = ("gelu", "swiglu", "relu", "none")
SHARED = ("none", "tied_qk", "block_twice", "norm")
CROSS = ("none", "only", "after_self")
TAILS = (
    "pool", "latents", "slots", "kernel", "modulated", "bank", "codes", "picked", "columns",
    "narrow",
)  # fmt: skip
RELATIVE = ("none", "buckets", "slope")
DTYPES = ("float32", "bfloat16", "float16", "float64", "autocast")
RETURNED = ("loss", "hidden", "hidden_used", "input_used")


@dataclass(frozen=True)
class Spec:
    """A model, its inputs, and the options it is compiled with."""

    form: str = "linear"
    attention: str = "sdpa"
    norm: str = "layer"
    order: str = "pre"
    mlp: str = "gelu"
    shared: str = "none"
    cross: str = "none"
    relative: str = "none"
    """What is read off the queries and added to the scores of attention by hand."""
    tail: str = "none"
    """What stands behind the blocks."""
    dtype: str = "float32"
    returned: str = "loss"
    batch: int = 2
    length: int = 12
    memory_length: int = 9
    width: int = 16
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    layers: int = 1
    bias: bool = False
    rope: bool = False
    qk_norm: bool = False
    sequence_first: bool = False
    input_grad: bool = True
    memory_grad: bool = False
    frozen: frozenset[str] = frozenset()
    """Of "q", "k", "v" (all three freeze a fused weight), "norm", "mlp", "bias"."""
    lora: bool = False
    lora_dropout: bool = False
    dropout: float = 0.0
    projected: bool = False
    """Whether a linear layer narrows the input to the width, as one of patches does."""
    checkpoint: bool = False
    ratio: float = 4
    min_generators: int = 1
    epsilon: float | None = None
    sampling: str = "stratified"
    min_tokens: int = 1
    targets: str = "qkv"
    """"qkv", "linear", or a regular expression."""
    seed: int = 0
    budget: float = 1.0
    decompose: bool = False
    dynamic: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def has_products_of_elements(self) -> bool:
        """Whether Inductor may make matmuls over one token, or one key, products of elements."""
        per_sample = self.batch if self.tail in ("modulated", "bank") else 2
        return self.decompose and 1 in (self.length, self.memory_length, per_sample)
