"""Attention written in the ways people write it: PyTorch's own modules and hand-made blocks.

Like `zoo`, every case says by hand what is to be compressed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pamm_testing.zoo import BATCH, HEADS, LENGTH, WIDTH, Case

HEAD = WIDTH // HEADS


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, LENGTH, WIDTH)))


def _mean_square(out: Tensor) -> Tensor:
    return out.square().mean()


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Pre-norm self-attention with separate projections, the attention itself given."""

    def __init__(self, attend: Attend, kv_heads: int = HEADS, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD, bias=bias)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD, bias=bias)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.kv_heads = kv_heads
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = split_heads(self.q(h))
        k, v = split_heads(self.k(h), self.kv_heads), split_heads(self.v(h), self.kv_heads)
        return x + self.o(join_heads(self.attend(q, k, v)))


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD), dim=-1) @ v


def _math_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(HEAD)).float()
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = scores.masked_fill(~keep, float("-inf"))
    return F.dropout(torch.softmax(scores, dim=-1).to(v.dtype), 0.1) @ v


def _math_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def _sdpa_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa(**options: object) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    return attend


_BOOL_MASK = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
_FLOAT_MASK = torch.zeros(LENGTH, LENGTH).masked_fill(~_BOOL_MASK, -1e4)


def _form(name: str, attend: Attend, **more: int) -> Case:
    return Case(
        name,
        lambda: Attention(attend, **more),
        lambda: {"x": _x()},
        (r"^[qkv]\.weight$",),
        1,
        _mean_square,
    )


ATTENTION_FORMS = [
    _form("sdpa", _sdpa()),
    _form("sdpa_causal", _sdpa(is_causal=True)),
    _form("sdpa_bool_mask", _sdpa(attn_mask=_BOOL_MASK)),
    _form("sdpa_float_mask", _sdpa(attn_mask=_FLOAT_MASK)),
    _form("sdpa_gqa", _sdpa(is_causal=True, enable_gqa=True), kv_heads=2),
    _form("sdpa_dropout", _sdpa(dropout_p=0.1)),
    _form("sdpa_math_backend", _sdpa_math),
    _form("matmul_softmax_matmul", _math),
    _form("matmul_softmax_dropout_matmul", _math_dropout),
    _form("einsum_softmax_einsum", _math_einsum),
    _form("projection_bias", _sdpa(), bias=True),
]


class FusedQKV(nn.Module):
    """nanoGPT's way: one projection, split in three."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split_heads, self.c_attn(self.norm(x)).split(WIDTH, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.c_proj(join_heads(y))


class TiedQueryKey(Attention):
    """q and k by one weight: its gradient is a sum of two matmuls with the same X."""

    def __init__(self) -> None:
        super().__init__(_sdpa(is_causal=True))
        self.k = self.q


class DropoutOfZero(Attention):
    """One projection reads a copy of what the others read: X is still compressed only once."""

    def __init__(self) -> None:
        super().__init__(_sdpa(is_causal=True))
        self.k = nn.Sequential(nn.Dropout(0.0), nn.Linear(WIDTH, WIDTH))


class NormForEach(Attention):
    """Each projection normalizes for itself: the partitioner makes one norm of the three."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(self.norm(x))) for layer in (self.q, self.k, self.v))
        return x + self.o(join_heads(self.attend(q, k, v)))


class ProjectedPatches(nn.Module):
    """A linear layer makes the residual stream of patches; no low-rank factor of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * WIDTH, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.block = Attention(_sdpa())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x) + self.positions)


class EinsumHeads(nn.Module):
    """One weight tensor [heads, width, head] for each of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Parameter(torch.randn(HEADS, WIDTH, HEAD) / WIDTH**0.5) for _ in range(3)
        )
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (WIDTH,)) * 1.5
        q, k, v = (torch.einsum("bsd,hde->bhse", h, w) for w in (self.q, self.k, self.v))
        return x + self.o(join_heads(F.scaled_dot_product_attention(q, k, v)))


class PerHead(nn.Module):
    """A list of small projections, one for each head, and attention head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (
            nn.ModuleList(nn.Linear(WIDTH, HEAD, bias=False) for _ in range(HEADS))
            for _ in range(3)
        )
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        heads = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            weights = torch.softmax(q(h) @ k(h).transpose(-1, -2), dim=-1)
            heads.append(weights @ v(h))
        return x + self.o(torch.cat(heads, dim=-1))


class ConcatenatedWeights(nn.Module):
    """Three weights, one matmul: F.linear with torch.cat."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        q, k, v = map(split_heads, F.linear(self.norm(x), weight).chunk(3, dim=-1))
        return x + self.o(join_heads(F.scaled_dot_product_attention(q, k, v)))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention behind a norm, as self-attention or over a second sequence."""

    def __init__(self, *, cross: bool = False, batch_first: bool = True, **more: object) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **more)  # type: ignore[arg-type]
        self.cross = cross

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        other = h if memory is None else memory
        return x + self.attn(h, other, other, need_weights=False)[0]


_LAYER = {
    "d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 48, "batch_first": True,
    "norm_first": True,
}  # fmt: skip
_PACKED = r"in_proj_weight$"
_MEMORY = (BATCH, 20, WIDTH)

MODULE_FORMS = [
    Case("fused_qkv", FusedQKV, lambda: {"x": _x()}, (r"^c_attn\.weight$",), 1, _mean_square),
    Case("tied_qk", TiedQueryKey, lambda: {"x": _x()}, (r"^[qv]\.weight$",), 1, _mean_square),
    Case(
        "dropout_of_zero", DropoutOfZero, lambda: {"x": _x()}, (r"^([qv]|k\.1)\.weight$",), 1,
        _mean_square,
    ),
    Case(
        "norm_for_each", lambda: NormForEach(_sdpa()), lambda: {"x": _x()},
        (r"^[qkv]\.weight$",), 1, _mean_square,
    ),
    Case(
        "projected_patches", ProjectedPatches, lambda: {"x": _x(BATCH, LENGTH, 4 * WIDTH)},
        (r"^block\.[qkv]\.weight$",), 1, _mean_square,
    ),
    Case("einsum_heads", EinsumHeads, lambda: {"x": _x()}, (r"^[qkv]$",), 1, _mean_square),
    Case("per_head", PerHead, lambda: {"x": _x()}, (r"^[qkv]\.\d\.weight$",), 1, _mean_square),
    Case(
        "concatenated_weights", ConcatenatedWeights, lambda: {"x": _x()}, (r"^[qkv]\.weight$",), 1,
        _mean_square,
    ),
    Case("mha_self", TorchAttention, lambda: {"x": _x()}, (_PACKED,), 1, _mean_square),
    Case(
        "mha_sequence_first", lambda: TorchAttention(batch_first=False), lambda: {"x": _x()},
        (_PACKED,), 1, _mean_square,
    ),
    Case(
        "mha_cross", lambda: TorchAttention(cross=True),
        lambda: {"x": _x(), "memory": _x(*_MEMORY)}, (_PACKED,), 2, _mean_square,
    ),
    Case(
        "mha_kdim", lambda: TorchAttention(cross=True, kdim=20, vdim=20),
        lambda: {"x": _x(), "memory": _x(BATCH, 20, 20)}, (r"[qkv]_proj_weight$",), 2, _mean_square,
    ),
    Case(
        "mha_dropout", lambda: TorchAttention(dropout=0.1), lambda: {"x": _x()}, (_PACKED,), 1,
        _mean_square,
    ),
    Case(
        "encoder_layer", lambda: nn.TransformerEncoderLayer(**_LAYER), lambda: {"src": _x()},
        (_PACKED,), 1, _mean_square,
    ),
    Case(
        "decoder_layer", lambda: nn.TransformerDecoderLayer(**_LAYER),
        lambda: {"tgt": _x(), "memory": _x(*_MEMORY)}, (_PACKED,), 3, _mean_square,
    ),
]  # fmt: skip

FORMS = [*ATTENTION_FORMS, *MODULE_FORMS]
