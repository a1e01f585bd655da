"""Random small transformers: the plain nn.Module that a `Spec` stands for, and its inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pamm_testing.fuzz.products import (
    Concatenated,
    Conv1D,
    Dense,
    Einsum,
    LoRA,
    PerHead,
    Rows,
    bias_of,
    weight_of,
)
from pamm_testing.fuzz.spec import Spec
from pamm_testing.fuzz.tails import Tail

# Attention ---------------------------------------------------------------------------------------


class Projections(nn.Module):
    """q, k and v from one stream or from two, in the spec's form."""

    def __init__(self, spec: Spec, *, cross: bool) -> None:
        super().__init__()
        n, d, form = spec.width, spec.head_dim, spec.form
        self.widths = [spec.heads * d, spec.kv_heads * d, spec.kv_heads * d]
        if form == "packed":
            total = sum(self.widths)
            weight, bias = weight_of(total, n, fan_in=n), bias_of(total, spec.bias)
            ends = list(itertools.accumulate(self.widths, initial=0))
            self.q, self.k, self.v = (Rows(weight, bias, *e) for e in itertools.pairwise(ends))
        elif form in ("fused", "fused_conv1d", "concatenated") and not cross:
            self.qkv = self._fused(spec, self.widths)
        elif form in ("fused", "fused_conv1d", "fused_kv", "concatenated"):
            self.q = Dense(n, self.widths[0], spec.bias)
            self.kv = self._fused(spec, self.widths[1:])
        else:
            self.q, self.k, self.v = (self._one(spec, m) for m in self.widths)
            if spec.shared == "tied_qk":
                self.k = self.q
            if spec.lora:
                p = 0.2 if spec.lora_dropout else 0.0
                self.q, self.v = LoRA(self.q, p), LoRA(self.v, p)

    @staticmethod
    def _one(spec: Spec, m: int) -> nn.Module:
        if spec.form == "einsum":
            return Einsum(spec.width, m, spec.bias, spec.head_dim)
        if spec.form == "per_head":
            return PerHead(spec.width, m, spec.bias, spec.head_dim)
        return (Conv1D if spec.form == "conv1d" else Dense)(spec.width, m, spec.bias)

    @staticmethod
    def _fused(spec: Spec, widths: list[int]) -> nn.Module:
        if spec.form == "concatenated":
            return Concatenated(spec.width, widths)
        kind = Conv1D if spec.form == "fused_conv1d" else Dense
        return kind(spec.width, sum(widths), spec.bias)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        if hasattr(self, "qkv"):
            return self.qkv(x).split(self.widths, dim=-1)
        if hasattr(self, "kv"):
            return (self.q(x), *self.kv(other).split(self.widths[1:], dim=-1))
        return self.q(x), self.k(other), self.v(other)


def _rotate(x: Tensor) -> Tensor:
    """Rotary embedding by half-rotation, of [batch, heads, length, head]."""
    length, half = x.shape[-2], x.shape[-1] // 2
    angle = torch.arange(length)[:, None] / 10.0 ** (torch.arange(half) / half)
    cos, sin = (f(torch.cat([angle, angle], dim=-1)).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _attend(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, positions: nn.Module | None = None
) -> Tensor:
    rows, columns = q.shape[-2], k.shape[-2]
    keep = torch.arange(columns) <= torch.arange(rows)[:, None]
    additive = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -1e4)
    if spec.attention.startswith("sdpa"):
        place = torch.arange(columns)
        padding = ((place + torch.arange(q.shape[0])[:, None]) % 3 != 0) | (place == 0)
        more: dict[str, Any] = {
            "sdpa": {},
            "sdpa_causal": {"is_causal": True},
            "sdpa_bool": {"attn_mask": keep},
            "sdpa_float": {"attn_mask": additive},
            "sdpa_padding": {"attn_mask": padding[:, None, None, :]},
            "sdpa_scale": {"scale": 0.3},
        }[spec.attention]
        return F.scaled_dot_product_attention(q, k, v, dropout_p=spec.dropout, **more)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if positions is not None:
        far = torch.arange(rows)[:, None] - torch.arange(columns)
        found = positions(q)
        if spec.relative == "buckets":
            index = (far.clamp(-3, 3) + 3).expand(*q.shape[:2], rows, columns)
            found = found.gather(-1, index)
        scores = scores + (found if spec.relative == "buckets" else found * far.abs()) / 8
    if spec.attention == "math_exp":
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
    elif spec.attention == "math_fp32":
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
    else:
        if spec.attention == "math_causal":
            scores = scores.masked_fill(~keep, float("-inf"))
        if spec.attention == "math_additive":
            scores = scores + additive
        weights = torch.softmax(scores, dim=-1)
    return F.dropout(weights, spec.dropout) @ v


class Attention(nn.Module):
    def __init__(self, spec: Spec, *, cross: bool) -> None:
        super().__init__()
        self.spec = spec
        self.project = Projections(spec, cross=cross)
        self.o = Dense(spec.heads * spec.head_dim, spec.width, spec.bias)
        self.positions = None
        if spec.relative != "none" and spec.attention.startswith("math"):
            self.positions = Dense(spec.head_dim, 7 if spec.relative == "buckets" else 1, False)
        if spec.qk_norm:
            self.q_scale, self.k_scale = (
                nn.Parameter(torch.rand(spec.head_dim) + 0.5) for _ in range(2)
            )

    def _normed(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        spec = self.spec
        if spec.sequence_first:
            x, other = x.transpose(0, 1), other.transpose(0, 1)
        q, k, v = (
            t.unflatten(-1, (-1, spec.head_dim)).permute(
                *((1, 2, 0, 3) if spec.sequence_first else (0, 2, 1, 3))
            )
            for t in self.project(x, other)
        )
        if spec.qk_norm:
            q, k = self._normed(q, self.q_scale), self._normed(k, self.k_scale)
        if spec.rope:
            q, k = _rotate(q), _rotate(k)
        if spec.kv_heads != spec.heads:
            k, v = (t.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for t in (k, v))
        out = _attend(spec, q, k, v.to(q.dtype), self.positions).transpose(1, 2).flatten(2)
        return F.dropout(self.o(out.to(x.dtype)), spec.dropout)


# Blocks ------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind = spec.norm
        if self.kind not in ("none", "layer_plain"):
            self.scale = nn.Parameter(torch.rand(spec.width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "layer_plain":
            return F.layer_norm(x, x.shape[-1:])
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.scale)
        if self.kind in ("tanh", "relu"):
            return getattr(torch, self.kind)(x * self.scale)
        y = x.float() if self.kind == "rms_fp32" else x
        return self.scale * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, hidden = spec.mlp, 2 * spec.width + 1
        self.up, self.down = Dense(spec.width, hidden, True), Dense(hidden, spec.width, True)
        if self.kind == "swiglu":
            self.gate = Dense(spec.width, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(getattr(F, self.kind)(self.up(x)))


class Block(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.order = spec.order
        self.norm, self.norm2, self.norm3 = (Norm(spec) for _ in range(3))
        if spec.shared == "norm":
            self.norm2 = self.norm
        self.attention = Attention(spec, cross=spec.cross == "only")
        self.crosses = spec.cross == "only"
        self.cross = Attention(spec, cross=True) if spec.cross == "after_self" else None
        self.mlp = None if spec.mlp == "none" else MLP(spec)

    def _step(self, part: nn.Module, norm: nn.Module, x: Tensor, *other: Tensor) -> Tensor:
        """One sub-layer; `other` replaces its own input as the source of keys and values."""

        def run(h: Tensor) -> Tensor:
            return part(h, *(other or (h,))) if isinstance(part, Attention) else part(h)

        if self.order == "post":
            return norm(x + run(x))
        if self.order == "bare":
            return run(norm(x))
        if self.order == "sandwich":
            return x + self.norm3(run(norm(x)))
        return x + run(norm(x))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.order in ("parallel", "parallel_norms"):
            h = self.norm(x)
            out = x + self.attention(h, memory if self.crosses else h)
            if self.cross is not None:
                out = out + self.cross(h, memory)
            if self.mlp is None:
                return out
            return out + self.mlp(h if self.order == "parallel" else self.norm2(x))
        x = self._step(self.attention, self.norm, x, *([memory] if self.crosses else []))
        if self.cross is not None:
            x = self._step(self.cross, self.norm3, x, memory)
        return x if self.mlp is None else self._step(self.mlp, self.norm2, x)


class Model(nn.Module):
    """Blocks, and a loss that every token matters to."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = Dense(3 * spec.width, spec.width, True) if spec.projected else None
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.tail = None if spec.tail == "none" else Tail(spec.tail, spec.width)

    def forward(self, x: Tensor, memory: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        hidden = x if self.embed is None else self.embed(x)
        order = [*self.blocks, *([self.blocks[0]] if self.spec.shared == "block_twice" else [])]
        for block in order:
            before = hidden
            if self.spec.checkpoint:
                hidden = checkpoint(block, hidden, memory, use_reentrant=False)
            else:
                hidden = block(hidden, memory)
        if self.tail is not None:
            hidden = self.tail(hidden)
        loss = (hidden.float() - target).square().mean()
        if self.spec.returned == "loss":
            return (loss,)
        return loss, before * 1.0 if self.spec.returned == "input_used" else hidden


def build(spec: Spec) -> Model:
    """Build the model of a spec, the same weights every time."""
    torch.manual_seed(spec.seed)
    model = Model(spec).to(spec.torch_dtype).train()
    for name, parameter in model.named_parameters():
        if _is_frozen(name, spec):
            parameter.requires_grad_(False)
    return model


def _is_frozen(name: str, spec: Spec) -> bool:
    parts = name.split(".")
    if "project" in parts:
        role = parts[parts.index("project") + 1]
        if parts[-1].endswith("bias"):
            return "bias" in spec.frozen
        # "weights" of a concatenated projection are frozen with the stream they belong to.
        roles = {"qkv": "qkv", "kv": "kv"}.get(role, role)
        if spec.form == "packed":
            roles = "qkv"
        elif spec.shared == "tied_qk" and role in "qk" and not spec.lora:
            roles = "qk"
        if spec.lora and spec.form == "linear" and role in "qv":
            return "base" in parts or role in spec.frozen
        return set(roles) <= spec.frozen
    return (any(part.startswith("norm") for part in parts) and "norm" in spec.frozen) or (
        "mlp" in parts and "mlp" in spec.frozen
    )


def inputs(spec: Spec, *, longer: int = 0) -> dict[str, Tensor]:
    """Return the arguments of a model, larger by `longer` in every size but ones."""
    generator = torch.Generator().manual_seed(spec.seed + 1)

    def grown(size: int) -> int:
        # Dynamo takes sizes of one for constants.
        return size + longer if size > 1 else size

    batch, length = grown(spec.batch), grown(spec.length)

    def stream(length: int, width: int, requires_grad: bool) -> Tensor:
        # Tokens share directions, as those of trained models do, and differ in length.
        base = torch.randn(3, width, generator=generator)
        mix = torch.randn(batch, length, 3, generator=generator)
        noise = torch.randn(batch, length, width, generator=generator)
        return (mix @ base + 0.3 * noise).to(spec.torch_dtype).requires_grad_(requires_grad)

    return {
        "x": stream(length, (3 if spec.projected else 1) * spec.width, spec.input_grad),
        "memory": stream(grown(spec.memory_length), spec.width, spec.memory_grad),
        "target": torch.randn(batch, length, spec.width, generator=generator),
    }
