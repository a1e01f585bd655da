"""Random modules that multiply by weights in every way we know, each a chain of random parts.

A part says by hand which of its parameters it multiplies with activations, and what may be said of
each: a set of reasons, "" for compressed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Said = dict[str, set[str]]
"""What may be said of a weight, by its name."""

_PLAIN = {"", "SHARED_INPUT"}
_BATCHED = {"", "SHARED_INPUT", "UNSUPPORTED_LAYOUT"}
_COMPUTED = {"COMPUTED_WEIGHT", "UNSUPPORTED_LAYOUT", "SHARED_INPUT"}


class Part(nn.Module):
    """Takes x [batch, length, n], and returns the same shape."""

    said: Said

    def __init__(self, n: int, length: int, draw: random.Random) -> None:
        super().__init__()
        self.n, self.length, self.draw = n, length, draw
        self.said = {}
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def weight(self, name: str, *shape: int, said: set[str]) -> None:
        """Add a parameter that is multiplied with activations."""
        fan_in = shape[-1]
        setattr(self, name, nn.Parameter(torch.randn(shape) / math.sqrt(fan_in)))
        self.said[name] = said

    def linear(self, name: str, n: int, m: int, said: set[str] | None = None) -> None:
        setattr(self, name, nn.Linear(n, m, bias=self.draw.random() < 0.3))
        self.said[f"{name}.weight"] = _PLAIN if said is None else said


PARTS: dict[str, type[Part]] = {}


def _part(kind: type[Part]) -> type[Part]:
    PARTS[kind.__name__.lstrip("_")] = kind
    return kind


def _act(draw: random.Random) -> Callable[[Tensor], Tensor]:
    functions: list[Callable[[Tensor], Tensor]] = [
        torch.tanh, torch.relu, F.gelu, F.silu, torch.sigmoid, lambda x: x * 1.5,
    ]  # fmt: skip
    return draw.choice(functions)


@_part
class _Plain(Part):
    """A layer, narrowing or not, and one back, with anything between."""

    def make(self) -> None:
        hidden = self.draw.choice([self.n // 4, self.n // 2, self.n, 2 * self.n])
        self.act, self.norm = _act(self.draw), self.draw.random() < 0.5
        self.linear("a", self.n, hidden)
        self.linear("b", hidden, self.n, _PLAIN | {"NARROW_INPUT"})

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        return self.b(F.layer_norm(h, h.shape[-1:]) if self.norm else h)


@_part
class _Attention(Part):
    """Attention by hand or by an operator, with relative positions read off q or x."""

    def make(self) -> None:
        n, self.heads = self.n, self.draw.choice([1, 2, 4])
        d = n // self.heads
        for name in "qkvo":
            self.linear(name, n, n, _PLAIN | {"NARROW_INPUT"})
        self.relative = self.draw.choice(
            ["none", "operator", "table", "buckets", "shaw", "segment", "slope", "gate", "bias"]
        )
        said = _BATCHED | {"NOT_OVER_TOKENS"}
        rows = {"table": self.length, "buckets": 7, "shaw": 2 * self.length, "segment": 2}
        if self.relative in rows:
            self.weight("e", rows[self.relative], d, said=said)
        elif self.relative == "slope":
            self.weight("e", 1, d, said=said)
        elif self.relative == "gate":
            self.linear("e", n, self.heads, said)
        elif self.relative == "bias":
            # Added to scores, and multiplied with nothing.
            self.table = nn.Parameter(torch.randn(self.heads, self.length, self.length))

    def _position(self, x: Tensor, q: Tensor) -> Tensor:
        place = torch.arange(self.length)
        far = place[:, None] - place
        if self.relative == "table":
            return q @ self.e.mT
        if self.relative == "buckets":
            index = far.clamp(-3, 3) + 3
            return (q @ self.e.mT).gather(-1, index.expand(*q.shape[:2], *far.shape))
        if self.relative == "shaw":
            return torch.einsum("bhtd,tsd->bhts", q, self.e[far + self.length])
        if self.relative == "segment":
            kinds = (far.abs() > 2).long().expand(*q.shape[:2], *far.shape)
            return (q @ self.e.mT).gather(-1, kinds)
        if self.relative == "slope":
            return (q @ self.e.mT) * far.abs()
        if self.relative == "gate":
            return self.e(x).mT[..., None] * far.abs()
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        if self.relative == "operator":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.mT
            if self.relative != "none":
                scores = scores + self._position(x, q)
            out = (scores / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


@_part
class _Pooling(Part):
    """Tokens weighed by a weight, plain or gated, by one query or several."""

    def make(self) -> None:
        n, self.heads = self.n, self.draw.choice([1, 2, 3])
        self.gated, self.own = self.draw.random() < 0.5, self.draw.random() < 0.5
        if self.gated:
            self.linear("a", n, n + 1)
            self.linear("b", n, n + 1)
        self.linear("score", n + self.gated, self.heads, _PLAIN | {"NARROW_INPUT"})
        if self.own:
            self.linear("v", n, n, _PLAIN | {"NARROW_INPUT"})
        self.linear("out", n, n)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * torch.sigmoid(self.b(x)) if self.gated else x
        pooled = self.score(h).softmax(1).mT @ (self.v(x) if self.own else x)
        return x + self.out(pooled.mean(1, keepdim=True))


@_part
class _Latents(Part):
    """Queries that are parameters, as they stand or projected, by hand or in an operator."""

    def make(self) -> None:
        n, self.heads = self.n, self.draw.choice([1, 2])
        self.operator, self.projected = self.draw.random() < 0.5, self.draw.random() < 0.5
        said = {"LEARNED_INPUT", "NOT_A_PROJECTION", "UNSUPPORTED_LAYOUT", "SHARED_INPUT"}
        self.weight("query", 5, n, said=said)
        if self.projected:
            self.linear("q", n, n, {"LEARNED_INPUT"})
        self.linear("k", n, n, _PLAIN | {"NARROW_INPUT"})
        self.linear("v", n, n, _PLAIN | {"NARROW_INPUT"})

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        query = self.q(query) if self.projected else query
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, self.k(x), self.v(x))
        )
        if self.operator:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.mT).softmax(-1) @ v
        return x + out.transpose(1, 2).flatten(2).mean(1, keepdim=True)


@_part
class _SoftMoE(Part):
    """Slots that mix tokens, an expert for each, and tokens that mix slots."""

    def make(self) -> None:
        self.experts, self.slots = 2, self.draw.choice([1, 3])
        self.weight("phi", self.n, self.experts * self.slots, said=_BATCHED)
        self.weight("w", self.experts, self.n, self.n, said=_BATCHED)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.phi
        slots = (scores.softmax(1).mT @ x).unflatten(1, (self.experts, self.slots))
        made = torch.einsum("besn,enm->besm", slots, self.w).flatten(1, 2)
        return x + scores.softmax(-1) @ made


@_part
class _DynamicConvolution(Part):
    """Kernels made for every token, or kernels that are parameters, over unfolded values."""

    def make(self) -> None:
        self.heads, self.size = self.draw.choice([1, 2, 4]), self.draw.choice([3, 5])
        self.linear("v", self.n, self.n, _PLAIN | {"NARROW_INPUT"})
        self.dynamic = self.draw.random() < 0.7
        if self.dynamic:
            self.linear("kernel", self.n, self.heads * self.size)
        else:
            said = _BATCHED | {"NARROW_INPUT", "NOT_OVER_TOKENS"}
            self.weight("light", self.heads, self.size, said=said)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, n = x.shape
        padded = F.pad(self.v(x), (0, 0, self.size // 2, self.size // 2))
        windows = padded.unfold(1, self.size, 1).unflatten(2, (self.heads, -1))
        if self.dynamic:
            kernel = self.kernel(x).reshape(-1, self.size, 1).softmax(1)
            out = windows.reshape(-1, n // self.heads, self.size) @ kernel
            return out.reshape(batch, length, n)
        return torch.einsum("blhds,hs->blhd", windows, self.light.softmax(-1)).flatten(2)


@_part
class _Picked(Part):
    """Rows of a weight that are picked by numbers, from wherever these come."""

    def make(self) -> None:
        self.how = self.draw.choice(
            ["made", "buffer", "select", "embedding", "mask", "tokens", "argument", "scaled"]
        )
        by_sample = self.how in ("tokens", "argument", "scaled")
        said = _BATCHED | _COMPUTED if by_sample else _PLAIN | {"NARROW_INPUT"}
        self.weight("w", 3 * self.n, self.n, said=said)
        order = random.Random(0).sample(range(3 * self.n), self.n)
        self.register_buffer("numbers", torch.tensor(order))
        self.register_buffer("kept", torch.rand(3 * self.n, self.n) > 0.4)

    def forward(self, x: Tensor, numbers: Tensor | None = None) -> Tensor:
        how, w = self.how, self.w
        if how == "made":
            return x @ w[torch.arange(0, 3 * self.n, 3)].mT
        if how == "buffer":
            return x @ w[self.numbers].mT
        if how == "select":
            return x @ w.index_select(0, self.numbers).mT
        if how == "embedding":
            return x @ F.embedding(self.numbers, w).mT
        if how == "mask":
            return (x @ torch.where(self.kept, w, 0.0).mT)[..., : self.n]
        assert numbers is not None
        picked = w[numbers]
        if how == "argument":
            return x @ picked[0, : self.n].mT[..., : self.n] + x[..., :1]
        if how == "scaled":
            picked = picked * x.mean(1)[:, None]
        return x + torch.einsum("bln,bkn->blk", x, picked).mean(-1, keepdim=True)


@_part
class _Modulated(Part):
    """A weight made for every sample: scaled, shifted, or mixed of a bank of experts."""

    def make(self) -> None:
        self.how = self.draw.choice(["scaled", "demodulated", "shifted", "bank", "factors", "gate"])
        n, experts = self.n, 3
        # What makes the weight is a layer of its own.
        if self.how == "bank":
            self.weight("w", experts, n, n, said=_COMPUTED | {""})
            self.linear("make_", n, experts)
        elif self.how == "factors":
            self.weight("w", n, 3, said=_COMPUTED | {"LEARNED_INPUT"})
            self.weight("w2", 3, n, said=_COMPUTED | {"LEARNED_INPUT"})
            self.linear("make_", n, n)
        else:
            self.weight("w", n, n, said=_COMPUTED)
            self.linear("make_", n, n * n if self.how == "gate" else n)

    def forward(self, x: Tensor) -> Tensor:
        style = self.make_(x.mean(1))
        if self.how == "bank":
            w = (style.softmax(-1)[..., None, None] * self.w).sum(1)
        elif self.how == "factors":
            w = (self.w @ self.w2) * style[:, None]
        elif self.how == "shifted":
            w = self.w + style[:, None]
        elif self.how == "gate":
            w = self.w * (1 + style.view(-1, self.n, self.n).tanh())
        else:
            w = self.w * style[:, None]
        if self.how == "demodulated":
            w = w * torch.rsqrt(w.square().sum(-1, keepdim=True) + 1e-6)
        return torch.bmm(x, w.mT)


@_part
class _Tied(Part):
    """Rows of an embedding as a matrix: every one, or those that are asked for."""

    def make(self) -> None:
        self.table = nn.Embedding(11, self.n)
        self.said["table.weight"] = _BATCHED
        self.all = self.draw.random() < 0.5

    def forward(self, x: Tensor, numbers: Tensor | None = None) -> Tensor:
        assert numbers is not None
        h = x + self.table(numbers % 11)[:, :1]
        rows = self.table.weight if self.all else self.table(numbers % 11)
        return h + (h @ rows.mT).logsumexp(-1, keepdim=True)


@_part
class _Quantiser(Part):
    """The nearest rows of a codebook, with or without the gradient going straight through."""

    def make(self) -> None:
        self.weight("code", 9, self.n, said={"NO_WEIGHT_GRAD"})
        self.straight = self.draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        far = x.square().sum(-1, keepdim=True) - 2 * x @ self.code.mT + self.code.square().sum(-1)
        found = self.code[far.argmin(-1)]
        return x + (found - x).detach() + 0.1 * found if self.straight else found + 0.1 * x


@_part
class _Columns(Part):
    """Tokens in columns, and tokens that are mixed by a weight."""

    def make(self) -> None:
        self.mixes = self.draw.random() < 0.5
        size = self.length if self.mixes else self.n
        self.weight("w", size, size, said=_BATCHED)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixes:
            return self.w @ x
        flat = x.flatten(0, 1).mT
        return (self.w @ flat).mT.view_as(x)


@_part
class _Memory(Part):
    """Keys and values that are parameters, beside those of the tokens or alone."""

    def make(self) -> None:
        self.alone = self.draw.random() < 0.5
        said = _BATCHED | {"NOT_A_PROJECTION"}
        self.weight("keys", 6, self.n, said=said)
        self.weight("values", 6, self.n, said=said)
        self.linear("q", self.n, self.n)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.keys, self.values
        if not self.alone:
            keys, values = (torch.cat([t.expand(len(x), -1, -1), x], 1) for t in (keys, values))
        return (self.q(x) @ keys.mT).softmax(-1) @ values
