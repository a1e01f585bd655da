"""What is found between attention and the residual stream, and what is said of the rest."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from pamm_testing.forms import HEAD, join_heads, split_heads
from pamm_testing.graphs import Look, look
from pamm_testing.zoo import BATCH, HEADS, LENGTH, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import pamm_compile

QKV = {"q.weight", "k.weight", "v.weight"}


def _x(width: int = WIDTH) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, LENGTH, width)}


def _linear(m: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, m, bias=False)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(HEAD), dim=-1) @ v


class Attention(nn.Module):
    """Self-attention with room for anything between its projections and its product."""

    def __init__(self, between: Callable[..., Any] | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (_linear() for _ in range(3))
        self.between = between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        projected = self.q(h), self.k(h), self.v(h)
        if self.between is not None:
            projected = self.between(self, h, *projected)
        return _attend(*map(split_heads, projected)).square().mean()


# Sums ----------------------------------------------------------------------------------------


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
        self.out = nn.ModuleList(_linear() for _ in range(2))
        self.gate = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            h = F.layer_norm(x, (WIDTH,)) * self.gate
            q, k, v = map(split_heads, qkv(h).chunk(3, -1))
            x = self.total(x, out(join_heads(_attend(q, k, v))), self.gate)
        return x.square().mean()


@pytest.mark.parametrize("how", _SUMS)
def test_a_sum_is_a_sum_however_written(how: str) -> None:
    found = look(_Stream(_SUMS[how]), _x(4 * WIDTH))
    assert found.compressed == {"qkv.0.weight", "qkv.1.weight"}
    assert found.held("attention") == found.compressed | {"out.0.weight", "out.1.weight"}


# Between projections and attention -------------------------------------------------------------


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
    found = look(Attention(between, **parts), _x())
    assert found.compressed == QKV
    assert len(found.decision.accepted) == 1
    if reason:
        assert found.reasons == {"mix.weight": reason}
    elif isinstance(part, nn.Conv1d):
        assert found.reasons == {"conv.weight": "NOT_A_PROJECTION"}
    else:
        assert not found.reasons


class _TalkingHeads(Attention):
    """A weight mixes heads between scores and softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(self.norm(x))) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT, self.mix.weight)
        return (scores.softmax(-1) @ v).square().mean()


def test_talking_heads() -> None:
    model = _TalkingHeads(mix=nn.Linear(HEADS, HEADS, bias=False))
    assert look(model, _x()).compressed == QKV


class _GroupedLoRA(Attention):
    """A frozen fused projection; three low-rank factors are one grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = _linear(3 * WIDTH).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(12, WIDTH))
        self.b = nn.Parameter(torch.randn(3 * WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        delta = F.conv1d(F.linear(h, self.a).mT, self.b[..., None], groups=3).mT
        q, k, v = map(split_heads, (self.qkv(h) + delta).chunk(3, -1))
        return _attend(q, k, v).square().mean()


def test_a_low_rank_factor_written_as_a_grouped_convolution() -> None:
    found = look(_GroupedLoRA(), _x())
    assert found.compressed == {"a"}
    assert found.reasons["b"] == "NOT_A_PROJECTION"


class _ValueResidual(nn.Module):
    """Each layer adds the values of the first to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.o = nn.ModuleList(_linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = None
        for layer, o in zip(self.layers, self.o, strict=True):
            h = layer.norm(x)
            q, k, v = map(split_heads, (layer.q(h), layer.k(h), layer.v(h)))
            first = v if first is None else first
            x = x + o(join_heads(_attend(q, k, 0.5 * v + 0.5 * first)))
        return x.square().mean()


def test_values_of_an_earlier_layer_begin_no_stream() -> None:
    assert look(_ValueResidual(), _x()).compressed == {
        f"layers.{i}.{name}" for i in range(2) for name in QKV
    }


# Operands without a gradient -------------------------------------------------------------------


class _Routed(Attention):
    """A router chooses tokens; it learns by a loss of its own."""

    def __init__(self, how: str) -> None:
        super().__init__(router=_linear(WIDTH if how == "index" else 1))
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
        out = _attend(*map(split_heads, (q, k, v))).square().mean()
        return out + score.sigmoid().square().mean()


@pytest.mark.parametrize("how", ["gather", "index", "mask", "detached"])
def test_operands_that_carry_no_gradient_are_not_followed(how: str) -> None:
    found = look(_Routed(how), _x())
    assert found.held("qkv") == QKV
    if how == "gather":
        # Elsewhere the router reads another X than the norm's.
        assert found.compressed == QKV


# Parameters alone ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("attend", [_attend, _by_hand], ids=["sdpa", "by_hand"])
@pytest.mark.parametrize("how", ["projected", "heads"])
def test_queries_made_of_parameters(attend: Callable[..., Tensor], how: str) -> None:
    found = look(_Pool(attend, how), _x())
    assert found.compressed == {"k.weight", "v.weight"}
    assert found.reasons == ({"q.weight": "LEARNED_INPUT"} if how == "projected" else {})


def test_queries_made_of_parameters_without_heads() -> None:
    assert look(_Pool(_attend, "flat"), _x()).compressed == {"k.weight", "v.weight"}


class _Memory(Attention):
    """Keys and values made of parameters, beside those of the tokens or alone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(len(x), -1, -1)
        q, k, v = map(split_heads, (self.q(self.norm(x)), self.k(memory), self.v(memory)))
        return _by_hand(q, k, v).square().mean()


def test_keys_and_values_made_of_parameters() -> None:
    found = look(_Memory(), _x())
    assert found.compressed == {"q.weight"}
    assert found.reasons == dict.fromkeys(("k.weight", "v.weight"), "LEARNED_INPUT")


# Weights made of more than a parameter ---------------------------------------------------------


def _pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


class _Masked(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (split_heads(F.linear(h, p.weight * mask)) for p in (self.q, self.k, self.v))
        return _attend(q, k, v).square().mean()


class _Scaled(Attention):
    """The weight of the queries depends on activations: their gradients must stay exact."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = F.linear(h, self.q.weight * h.mean((0, 1)))
        return _attend(*map(split_heads, (q, self.k(h), self.v(h)))).square().mean()


@pytest.mark.parametrize(
    "make", [_pruned, parametrizations.spectral_norm, parametrizations.weight_norm]
)
def test_weights_computed_from_parameters_and_buffers(make: Callable[..., Any]) -> None:
    model = Attention()
    for layer in (model.q, model.k, model.v):
        make(layer)
    found = look(model, _x())
    (plan,) = found.decision.accepted
    assert [len(plan.site.projections), len(plan.site.gradients)] == [3, 3]
    assert not found.reasons


def test_weights_masked_by_an_argument() -> None:
    mask = (torch.rand(WIDTH, WIDTH) > 0.3).float()
    assert look(_Masked(), {**_x(), "mask": mask}).compressed == QKV


def test_a_weight_computed_from_activations_stays_exact_and_says_so() -> None:
    found = look(_Scaled(), _x())
    assert found.reasons["q.weight"] == "COMPUTED_WEIGHT"
    # X is read for q's gradient all the same.
    assert found.reasons["k.weight"] == "SHARED_INPUT"


# With and without gradient ---------------------------------------------------------------------


class _Twice(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.cell, self.how = Attention(), how

    def _step(self, z: Tensor) -> Tensor:
        h = self.cell.norm(z)
        q, k, v = map(split_heads, (self.cell.q(h), self.cell.k(h), self.cell.v(h)))
        return z + join_heads(_attend(q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detached":
            x = self._step(x).detach()
        else:
            with torch.no_grad():
                x = self._step(x)
        return self._step(x).square().mean()


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_a_use_without_gradient_is_no_unsupported_layout(how: str) -> None:
    found = look(_Twice(how), _x())
    assert found.compressed == {f"cell.{name}" for name in QKV}
    assert found.reasons == {f"cell.{name}": "NO_WEIGHT_GRAD" for name in QKV}


# Nothing is silent -----------------------------------------------------------------------------


@torch.library.custom_op("pamm_testing::attention", mutates_args=())
def _unknown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v)


_unknown.register_fake(lambda q, k, v: torch.empty_like(q))
_unknown.register_autograd(
    lambda ctx, grad: (grad, grad, grad), setup_context=lambda ctx, inputs, output: None
)

_UNRECOGNISED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "linear": lambda q, k, v: F.elu(q) @ (F.elu(k).mT @ v),
    "operator": _unknown,
    "scan": lambda q, k, v: q * (k * v).cumsum(-2),
}


class _Two(nn.Module):
    """A layer of attention, and one of something like it."""

    def __init__(self, attend: Callable[..., Tensor], beside: bool) -> None:
        super().__init__()
        self.first, self.second, self.o = Attention(), Attention(), _linear()
        self.attend, self.beside = attend, beside

    def forward(self, x: Tensor) -> Tensor:
        if self.beside:
            x = x + self.first(x)
        h = self.second.norm(x)
        q, k, v = map(split_heads, (self.second.q(h), self.second.k(h), self.second.v(h)))
        return (x + self.o(join_heads(self.attend(q, k, v)))).square().mean()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("how", _UNRECOGNISED)
def test_attention_that_is_not_recognised_is_reported(how: str, beside: bool) -> None:
    found = look(_Two(_UNRECOGNISED[how], beside), _x())
    assert {found.reasons.get(f"second.{name}") for name in QKV} == {"UNCLEAR_TARGET"}
    assert ("attention" in found.reasons) != beside
    assert found.compressed == ({f"first.{name}" for name in QKV} if beside else set())


class _Away(Attention):
    """The queries leave the graph, for attention in another one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.o(x))
        return torch.cat([self.q(h), self.k(h), self.v(h)], -1)


def test_projections_whose_attention_is_in_another_graph_are_reported() -> None:
    found = look(_Away(o=_linear()), _x())
    assert {found.reasons.get(name) for name in QKV} == {"UNCLEAR_TARGET"}


@torch.library.custom_op("pamm_testing::linear", mutates_args=())
def _fast_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.mT


_fast_linear.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)))
_fast_linear.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[0], grad.flatten(0, 1).mT @ grad.flatten(0, 1)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


class _Fast(Attention):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (split_heads(_fast_linear(h, p.weight)) for p in (self.q, self.k, self.v))
        return _attend(q, k, v).square().mean()


def test_weights_of_operators_that_are_no_matmuls_are_reported() -> None:
    assert look(_Fast(), _x()).reasons == dict.fromkeys(QKV, "NOT_A_PROJECTION")


# Weight gradients that are more than a product -------------------------------------------------


class _Accumulated(torch.autograd.Function):
    """x·Wᵀ whose weight gradient is written as one of the forms in `_GRADIENTS`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return dz @ w, _GRADIENTS[ctx.how](dz.flatten(0, 1), x.flatten(0, 1), w), None


def _in_two(dz: Tensor, x: Tensor, w: Tensor) -> Tensor:
    first = torch.addmm(w, dz.mT, x, alpha=0.25)
    return torch.addmm(first, dz.mT, x, beta=2.0, alpha=0.5)


def _batched(dz: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(w[None], dz.mT[None], x[None], beta=0.5, alpha=3.0)[0]


_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda dz, x, w: dz.mT @ x,
    "alpha": lambda dz, x, w: torch.addmm(w, dz.mT, x, alpha=4.0, beta=0.0),
    "beta": lambda dz, x, w: torch.addmm(w, dz.mT, x, beta=0.1),
    "bias": lambda dz, x, w: torch.addmm(w[0], dz.mT, x),
    "in_place": lambda dz, x, w: w.clone().addmm_(dz.mT, x, alpha=2.0),
    "out": lambda dz, x, w: torch.mm(dz.mT, x, out=torch.empty_like(w)),
    "transposed": lambda dz, x, w: torch.addmm(w.mT, x.mT, dz, alpha=0.5).mT,
    "in_two": _in_two,
    "batched": _batched,
    "scaled_input": lambda dz, x, w: dz.mT @ (2 * x),
    "masked_input": lambda dz, x, w: dz.mT @ torch.where(x > 0, x, 0.0),
    "scaled_gradient": lambda dz, x, w: (0.5 * dz).mT @ x,
    "masked_result": lambda dz, x, w: (dz.mT @ x).tril() * 3,
    "scattered": lambda dz, x, w: torch.slice_scatter(w, (dz.mT @ x)[2:], 0, 2),
    "both": lambda dz, x, w: (dz.mT @ x) @ (x.mT @ x) / len(x),
}


class _Custom(nn.Module):
    """One layer for every way to write a weight gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict(
            {how: nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 8) for how in _GRADIENTS}
        )

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for number, (how, w) in enumerate(self.w.items()):
            # An input of its own for each.
            h = F.layer_norm(x, (WIDTH,)) * (1 + number)
            q, k, v = map(split_heads, _Accumulated.apply(h, w, how).chunk(3, -1))
            total = total + _attend(q, k, v).square().mean()
        return total


def test_a_weight_gradient_keeps_what_it_is_beside_the_product() -> None:
    """With every token a generator, all gradients are exact to rounding."""
    model, batch, found = _Custom(), _x(), []
    ours = pamm_compile.backend(ratio=1, min_tokens=1, base="aot_eager", goal="any")
    ours.report.clear()
    for backend in ("aot_eager", ours):
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend=backend)(**batch).backward()
        found.append({how: w.grad.clone() for how, w in model.w.items()})
    exact, compressed = found
    for how, grad in exact.items():
        error = (compressed[how] - grad).norm() / grad.norm()
        assert error < 1e-5, f"{how}: off by {error:.1e}"
    names = {name.rpartition(".")[2] for s in ours.report.compressed for name in s.parameters}
    assert names >= set(_GRADIENTS) - {"scaled_input", "masked_input", "both", "batched"}


# Cost ------------------------------------------------------------------------------------------


class _Parallel(nn.Module):
    """Attention and MLP read one input, so that every site is declined."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.up = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 16)
        self.o = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(h).chunk(3, -1))
        return x + self.o(torch.cat([_attend(q, k, v)[:, 0], F.gelu(self.up(h))], -1))


def _calls(layers: int) -> int:
    model = nn.Sequential(*(_Parallel() for _ in range(layers)))
    found: Look = look(model, {"input": torch.randn(2, 16, 8)})
    assert len(found.decision.declines) == layers
    from pamm_compile.graph.joint import JointGraph
    from pamm_compile.options import Options
    from pamm_compile.sites.compress import CompressInputs

    joint = JointGraph(found.joint.graph, found.joint.parameter_names)
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        CompressInputs(Options(min_tokens=1)).decide(joint)
    finally:
        sys.setprofile(None)
    return count


def test_the_search_takes_time_linear_in_the_layers() -> None:
    few, many = _calls(4), _calls(16)
    assert many < 4.4 * few
