"""Random small transformers: a printable description, and the plain nn.Module it stands for.

`Spec` says everything about a model, its inputs and the options it is compiled with; its repr is
all that is needed to build the same again. Every matmul with a parameter is a `Product`, however
it is written, so that a test can put another one in its place.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


# Matmuls with a parameter ------------------------------------------------------------------------


class Product(nn.Module):
    """x·Wᵀ + bias; `matrix()` is W as [m, n], whatever the parameters look like."""

    bias: nn.Parameter | None

    def matrix(self) -> Tensor:
        raise NotImplementedError


def _weight(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(fan_in))


def _bias(width: int, wanted: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(width) / 10) if wanted else None


class Dense(Product):
    def __init__(self, n: int, m: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = _weight(m, n, fan_in=n), _bias(m, bias)

    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv1D(Product):
    """GPT-2's: the weight is stored transposed."""

    def __init__(self, n: int, m: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = _weight(n, m, fan_in=n), _bias(m, bias)

    def matrix(self) -> Tensor:
        return self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Einsum(Product):
    """One weight [heads, n, head]."""

    def __init__(self, n: int, m: int, bias: bool, head: int) -> None:
        super().__init__()
        self.weight, self.bias = _weight(m // head, n, head, fan_in=n), _bias(m, bias)

    def matrix(self) -> Tensor:
        return self.weight.transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("bsn,hnd->bshd", x, self.weight).flatten(2)
        return out if self.bias is None else out + self.bias


class PerHead(nn.Module):
    """One small product for each head."""

    def __init__(self, n: int, m: int, bias: bool, head: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Dense(n, head, bias) for _ in range(m // head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class Rows(Product):
    """Some rows of a weight that several products share, as nn.MultiheadAttention has it."""

    def __init__(
        self, packed: nn.Parameter, packed_bias: nn.Parameter | None, start: int, end: int
    ) -> None:
        super().__init__()
        self.weight, self.packed_bias, self.rows = packed, packed_bias, slice(start, end)

    @property
    def bias(self) -> Any:
        return None if self.packed_bias is None else self.packed_bias[self.rows]

    def matrix(self) -> Tensor:
        return self.weight[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[self.rows], self.bias)


class Concatenated(Product):
    """Several weights, one matmul."""

    def __init__(self, n: int, widths: list[int]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(_weight(m, n, fan_in=n) for m in widths)
        self.bias = None

    def matrix(self) -> Tensor:
        return torch.cat(list(self.weights))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat(list(self.weights)))


class LoRA(nn.Module):
    """A frozen product with a trained low-rank addition."""

    def __init__(self, base: Dense, dropout: float) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        self.a, self.b = Dense(n, 2, False), Dense(2, m, False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(F.dropout(x, self.dropout)))


# Attention ---------------------------------------------------------------------------------------


class Projections(nn.Module):
    """q, k and v from one stream or from two, in the spec's form."""

    def __init__(self, spec: Spec, *, cross: bool) -> None:
        super().__init__()
        n, d, form = spec.width, spec.head_dim, spec.form
        self.widths = [spec.heads * d, spec.kv_heads * d, spec.kv_heads * d]
        if form == "packed":
            total = sum(self.widths)
            weight, bias = _weight(total, n, fan_in=n), _bias(total, spec.bias)
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


def _attend(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
        out = _attend(spec, q, k, v.to(q.dtype)).transpose(1, 2).flatten(2)
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
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))

    def forward(self, x: Tensor, memory: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        hidden = x
        order = [*self.blocks, *([self.blocks[0]] if self.spec.shared == "block_twice" else [])]
        for block in order:
            before = hidden
            if self.spec.checkpoint:
                hidden = checkpoint(block, hidden, memory, use_reentrant=False)
            else:
                hidden = block(hidden, memory)
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

    def stream(length: int, requires_grad: bool) -> Tensor:
        # Tokens share directions, as those of trained models do, and differ in length.
        base = torch.randn(3, spec.width, generator=generator)
        mix = torch.randn(batch, length, 3, generator=generator)
        noise = torch.randn(batch, length, spec.width, generator=generator)
        return (mix @ base + 0.3 * noise).to(spec.torch_dtype).requires_grad_(requires_grad)

    return {
        "x": stream(length, spec.input_grad),
        "memory": stream(grown(spec.memory_length), spec.memory_grad),
        "target": torch.randn(batch, length, spec.width, generator=generator),
    }
