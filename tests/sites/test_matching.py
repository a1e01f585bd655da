"""What is found between attention and the residual stream."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pamm_testing.attention import QKV, Attention, attend, by_hand, example, linear
from pamm_testing.forms import HEAD, join_heads, split_heads
from pamm_testing.graphs import Look, look
from pamm_testing.zoo import BATCH, HEADS, LENGTH, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F

from pamm_compile.graph.joint import JointGraph
from pamm_compile.options import Options
from pamm_compile.sites.compress import CompressInputs

# Sums ---------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


_SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda x, y, gate: x + gate * y,
    "addcmul": lambda x, y, gate: torch.addcmul(x, gate, y),
    "addcdiv": lambda x, y, gate: torch.addcdiv(x, y, gate + 2),
    "lerp": lambda x, y, gate: torch.lerp(x, y, 0.3),
    "stack": lambda x, y, gate: torch.stack([x, gate * y]).sum(0),
    "cat": lambda x, y, gate: torch.cat([x[None], y[None]]).mean(0),
    "foreach": lambda x, y, gate: torch._foreach_add([x], [gate * y])[0],
    "index_add": lambda x, y, gate: x.index_add(1, _rows(x), y),
    "scatter_add": lambda x, y, gate: x.scatter_add(
        1, _rows(x)[None, :, None].expand_as(x), y
    ),
    "index_put": lambda x, y, gate: x.index_put((torch.arange(len(x)),), y, accumulate=True),
    "slice": lambda x, y, gate: torch.cat([x[:, :1], x[:, 1:] + y[:, 1:]], 1),
}  # fmt: skip


class _Stream(nn.Module):
    """Two layers of attention on a stream that a narrowing projection begins."""

    def __init__(self, total: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.total = total
        self.embed = nn.Linear(4 * WIDTH, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(linear() for _ in range(2))
        self.gate = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            h = F.layer_norm(x, (WIDTH,)) * self.gate
            q, k, v = map(split_heads, qkv(h).chunk(3, -1))
            x = self.total(x, out(join_heads(attend(q, k, v))), self.gate)
        return x.square().mean()


@pytest.mark.parametrize("how", _SUMS)
def test_a_sum_is_a_sum_however_written(how: str) -> None:
    found = look(_Stream(_SUMS[how]), example(4 * WIDTH))
    assert found.compressed == {"qkv.0.weight", "qkv.1.weight"}
    assert found.held("attention") == found.compressed | {"out.0.weight", "out.1.weight"}


# Between projections and attention ----------------------------------------------------------------


def _convolved(self: Any, h: Tensor, *projected: Tensor) -> list[Tensor]:
    return [self.conv(t.mT)[..., : t.shape[1]].mT for t in projected]


def _convolved_and_added(self: Any, h: Tensor, *projected: Tensor) -> list[Tensor]:
    return [t + c for t, c in zip(projected, _convolved(self, h, *projected), strict=True)]


def _rotated(self: Any, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    table = torch.eye(WIDTH).roll(1, 0) + 0.1
    return q @ table, k @ table, 2 * v


def _heads_mixed(self: Any, h: Tensor, *projected: Tensor) -> list[Tensor]:
    return [self.mix(t.unflatten(-1, (HEADS, HEAD)).mT).mT.flatten(2) for t in projected]


def _within_heads(self: Any, h: Tensor, *projected: Tensor) -> list[Tensor]:
    return [self.mix(t.unflatten(-1, (HEADS, HEAD))).flatten(2) for t in projected]


def _fewer_keys(self: Any, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, self.mix(k.mT).mT, self.mix(v.mT).mT


def _first_values(self: Any, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q * 0.5, F.normalize(k, dim=-1), v + 0.3 * torch.roll(v, 1, 1)


def _depthwise() -> nn.Conv1d:
    return nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)


_BETWEEN: dict[str, tuple[Callable[..., Any], nn.Module | None, str]] = {
    "convolution": (_convolved, _depthwise(), ""),
    "grouped": (_convolved, nn.Conv1d(WIDTH, WIDTH, 3, groups=4, padding=2), ""),
    "residual_convolution": (_convolved_and_added, _depthwise(), ""),
    "constant": (_rotated, None, ""),
    "arithmetic": (_first_values, None, ""),
    "heads": (_heads_mixed, nn.Linear(HEADS, HEADS, bias=False), "NOT_OVER_TOKENS"),
    "within_heads": (_within_heads, nn.Linear(HEAD, HEAD, bias=False), "NOT_OVER_TOKENS"),
    "tokens": (_fewer_keys, nn.Linear(LENGTH, 6, bias=False), "NOT_OVER_TOKENS"),
}


@pytest.mark.parametrize("how", _BETWEEN)
def test_what_may_stand_between_a_projection_and_attention(how: str) -> None:
    between, part, reason = _BETWEEN[how]
    parts = {} if part is None else {"conv" if isinstance(part, nn.Conv1d) else "mix": part}
    found = look(Attention(between, **parts), example())
    assert found.compressed == QKV
    assert len(found.decision.accepted) == 1
    if reason:
        assert found.reasons == {"mix.weight": reason}
    elif isinstance(part, nn.Conv1d):
        assert found.reasons == {"conv.weight": "NOT_A_PROJECTION"}
    else:
        assert not found.reasons


class _Conditioned(nn.Module):
    """Two streams that attend together, each scaled by more weights than it has itself."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.condition = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, inner), nn.SiLU(), nn.Linear(inner, 2 * WIDTH))
            for _ in range(2)
        )
        self.qkv = nn.ModuleList(linear(3 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        projected = []
        for stream, condition, qkv in zip((x, text), self.condition, self.qkv, strict=True):
            scale, shift = condition(time)[:, None].chunk(2, -1)
            h = F.layer_norm(stream, (WIDTH,)) * (1 + scale) + shift
            projected.append(qkv(h))
        q, k, v = map(split_heads, torch.cat(projected, 1).chunk(3, -1))
        return attend(q, k, v).square().mean()


@pytest.mark.parametrize("inner", [8, 8 * WIDTH])
def test_conditioning_is_not_what_feeds_attention(inner: int) -> None:
    """Whatever scales an input, it is neither narrow nor a mixture of what made the scale."""
    batch = {"x": torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)}
    batch |= {"text": torch.randn(BATCH, 5, WIDTH, requires_grad=True)}
    found = look(_Conditioned(inner), batch | {"time": torch.randn(BATCH, WIDTH)})
    assert found.compressed == {"qkv.0.weight", "qkv.1.weight"}
    assert found.held("qkv") == found.compressed


def test_a_product_with_something_wide_is_not_narrow() -> None:
    class Scaled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x) * torch.cat([self.narrow(x)] * 2, -1)
            return attend(*(split_heads(layer(h)) for layer in (self.q, self.k, self.v))).sum()

    batch = {"x": torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)}
    assert look(Scaled(narrow=linear(WIDTH // 2)), batch).compressed == QKV


class _TalkingHeads(Attention):
    """A weight mixes heads between scores and softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(self.norm(x))) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT, self.mix.weight)
        return (scores.softmax(-1) @ v).square().mean()


def test_talking_heads() -> None:
    model = _TalkingHeads(mix=nn.Linear(HEADS, HEADS, bias=False))
    assert look(model, example()).compressed == QKV


class _GroupedLoRA(Attention):
    """A frozen fused projection; three low-rank factors are one grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = linear(3 * WIDTH).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(12, WIDTH))
        self.b = nn.Parameter(torch.randn(3 * WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        delta = F.conv1d(F.linear(h, self.a).mT, self.b[..., None], groups=3).mT
        q, k, v = map(split_heads, (self.qkv(h) + delta).chunk(3, -1))
        return attend(q, k, v).square().mean()


def test_a_low_rank_factor_written_as_a_grouped_convolution() -> None:
    found = look(_GroupedLoRA(), example())
    assert found.compressed == {"a"}
    assert found.reasons["b"] == "NOT_A_PROJECTION"


class _ValueResidual(nn.Module):
    """Each layer adds the values of the first to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.o = nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = None
        for layer, o in zip(self.layers, self.o, strict=True):
            h = layer.norm(x)
            q, k, v = map(split_heads, (layer.q(h), layer.k(h), layer.v(h)))
            first = v if first is None else first
            x = x + o(join_heads(attend(q, k, 0.5 * v + 0.5 * first)))
        return x.square().mean()


def test_values_of_an_earlier_layer_begin_no_stream() -> None:
    assert look(_ValueResidual(), example()).compressed == {
        f"layers.{i}.{name}" for i in range(2) for name in QKV
    }


# Beside the scores of queries and keys ----------------------------------------------------------


class _Routed(Attention):
    """A router chooses tokens; it learns by a loss of its own."""

    def __init__(self, how: str) -> None:
        super().__init__(router=linear(WIDTH if how == "index" else 1))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        score = self.router(x).mean(-1)
        top = score.topk(8, -1).indices.sort(-1).values
        rows = top[..., None].expand(-1, -1, WIDTH)
        h = self.norm(x.gather(1, rows) if self.how == "gather" else x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.how == "index":
            k, v = (t[torch.arange(len(t))[:, None], top] for t in (k, v))
        if self.how == "mask":
            k = k.masked_fill((score < 0)[..., None], 0)
        if self.how == "detached":
            v = v * score.detach().sigmoid()[..., None]
        out = attend(*map(split_heads, (q, k, v))).square().mean()
        return out + score.sigmoid().square().mean()


@pytest.mark.parametrize("how", ["gather", "index", "mask", "detached"])
def test_operands_that_carry_no_gradient_are_not_followed(how: str) -> None:
    found = look(_Routed(how), example())
    assert found.held("qkv") == QKV
    if how == "gather":
        # Elsewhere the router reads another X than the norm's.
        assert found.compressed == QKV


# Parameters alone ---------------------------------------------------------------------------------


class _Pool(Attention):
    """Queries are parameters, with a projection or as they are."""

    def __init__(self, attend: Callable[..., Tensor], how: str) -> None:
        super().__init__()
        self.attend, self.how = attend, how
        shape = (1, HEADS, 5, HEAD) if how == "heads" else (5, WIDTH)
        self.query = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        k, v = split_heads(self.k(h)), split_heads(self.v(h))
        if self.how == "heads":
            q = self.query
        elif self.how == "flat":
            # No heads: tokens are what the softmax runs over, and no weight's columns.
            weights = (self.k(h) @ self.query.mT).softmax(1)
            return (weights.mT @ self.v(h)).square().mean()
        else:
            q = split_heads(self.q(self.query.expand(len(x), -1, -1)))
        return self.attend(q.expand(len(x), -1, -1, -1), k, v).square().mean()


@pytest.mark.parametrize("attend", [attend, by_hand], ids=["sdpa", "by_hand"])
@pytest.mark.parametrize("how", ["projected", "heads"])
def test_queries_made_of_parameters(attend: Callable[..., Tensor], how: str) -> None:
    found = look(_Pool(attend, how), example())
    assert found.compressed == {"k.weight", "v.weight"}
    assert found.reasons == ({"q.weight": "LEARNED_INPUT"} if how == "projected" else {})


def test_queries_made_of_parameters_without_heads() -> None:
    assert look(_Pool(attend, "flat"), example()).compressed == {"k.weight", "v.weight"}


class _Memory(Attention):
    """Keys and values made of parameters, beside those of the tokens or alone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(len(x), -1, -1)
        q, k, v = map(split_heads, (self.q(self.norm(x)), self.k(memory), self.v(memory)))
        return by_hand(q, k, v).square().mean()


def test_keys_and_values_made_of_parameters() -> None:
    found = look(_Memory(), example())
    assert found.compressed == {"q.weight"}
    assert found.reasons == dict.fromkeys(("k.weight", "v.weight"), "LEARNED_INPUT")


# Cost ---------------------------------------------------------------------------------------------


class _Parallel(nn.Module):
    """Attention and MLP read one input, so that every site is declined."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.up = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 16)
        self.o = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(h).chunk(3, -1))
        return x + self.o(torch.cat([attend(q, k, v)[:, 0], F.gelu(self.up(h))], -1))


def _calls(layers: int) -> int:
    model = nn.Sequential(*(_Parallel() for _ in range(layers)))
    found: Look = look(model, {"input": torch.randn(2, 16, 8)})
    assert len(found.decision.declines) == layers
    joint = JointGraph(found.joint.graph, found.joint.parameter_names)
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        CompressInputs(Options(rules="qkv=pamm", min_tokens=1)).decide(joint)
    finally:
        sys.setprofile(None)
    return count


def test_the_search_takes_time_linear_in_the_layers() -> None:
    few, many = _calls(2), _calls(8)
    assert many < 4.4 * few
