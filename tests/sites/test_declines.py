"""What stays exact, and the reason given for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pamm_testing.forms import HEAD, Attention, _sdpa, join_heads, split_heads
from pamm_testing.graphs import Both, Captured, capturing_backend, look, step
from pamm_testing.options import make_options
from pamm_testing.zoo import BATCH, HEADS, LENGTH, VOCAB, WIDTH, causal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pamm_compile
from pamm_compile.options import Options
from pamm_compile.sites.reasons import Reason
from pamm_compile.torch_backend import Backend

OPTIONS = make_options(ratio=4, min_tokens=1)


def _report(
    model: nn.Module, batch: dict[str, Any], options: Options = OPTIONS
) -> pamm_compile.Report:
    """Compile, run one step, and check that everything declined is exact."""

    def loss(out: Any) -> Tensor:
        return out.loss if hasattr(out, "loss") else out.square().mean()

    backend = Backend(replace(options, base="aot_eager"))
    both = Both(backend)
    compiled = torch.compile(model, backend=both)
    exact = step(model, compiled, batch, loss)
    both.exact = False
    ours = step(model, compiled, batch, loss)
    compressed = {n for site in backend.report.compressed for n in site.parameters}
    for name, grad in exact.grads.items():
        assert torch.equal(grad, ours.grads[name]) == (name not in compressed), name
    return backend.report


def _reasons(report: pamm_compile.Report) -> dict[str, str | None]:
    return {name: site.reason for site in report.sites for name in site.parameters}


def _block() -> Attention:
    return Attention(_sdpa(is_causal=True))


def _x() -> dict[str, Any]:
    return {"x": torch.randn(BATCH, LENGTH, WIDTH)}


def test_frozen_projections() -> None:
    model = _block()
    for layer in (model.q, model.k, model.v):
        layer.weight.requires_grad_(False)
    reasons = _reasons(_report(model, _x()))
    assert reasons == dict.fromkeys(("q.weight", "k.weight", "v.weight"), "NO_WEIGHT_GRAD")


def test_one_frozen_projection_does_not_stop_the_others() -> None:
    model = _block()
    model.k.weight.requires_grad_(False)
    report = _report(model, _x())
    assert [site.parameters for site in report.compressed] == [("q.weight", "v.weight")]


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = _block()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False).sin()


def test_torch_checkpointed_block() -> None:
    reasons = _reasons(_report(_Checkpointed(), _x()))
    assert set(reasons.values()) == {"RECOMPUTED"}
    assert len(reasons) == 3


def test_transformers_checkpointed_blocks() -> None:
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
        )
    ).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    reasons = _reasons(_report(model, causal()))
    assert set(reasons.values()) == {"RECOMPUTED"}
    assert len(reasons) == 6


def _parallel(config: type, model: type, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(vocab_size=VOCAB, **sizes)).train()


_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
_PARALLEL = {
    "gptj": _parallel(
        hf.GPTJConfig, hf.GPTJForCausalLM, n_embd=WIDTH, n_layer=1, n_head=HEADS, rotary_dim=4
    ),
    "phi": _parallel(hf.PhiConfig, hf.PhiForCausalLM, intermediate_size=48, **_SIZES),
    "cohere": _parallel(
        hf.CohereConfig,
        hf.CohereForCausalLM,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **_SIZES,
    ),
    "falcon": _parallel(hf.FalconConfig, hf.FalconForCausalLM, **_SIZES),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "phi" else pytest.param(n, marks=pytest.mark.everything) for n in _PARALLEL],
)
def test_parallel_blocks_share_their_input_with_the_mlp(name: str) -> None:
    report = _report(_PARALLEL[name](), causal())
    assert report.compressed == ()
    (site,) = report.declined
    assert site.reason == "SHARED_INPUT"
    assert "mlp" in site.detail


class _NormAgain(Attention):
    def __init__(self) -> None:
        super().__init__(_sdpa())
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.relu(self.mlp(self.norm(x)))


def test_a_norm_computed_again_is_the_same_input() -> None:
    # The partitioner merges the two, and then keeps X for the MLP.
    (site,) = _report(_NormAgain(), _x()).sites
    assert (site.reason, site.detail) == ("SHARED_INPUT", "mlp.weight")


def test_the_output_of_a_norm_without_weights_is_read_by_its_own_gradient() -> None:
    model = _block()
    model.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), model)
    using = pamm_compile.backend(256, min_tokens=1)
    # Decomposed, as Inductor has it: the normalized rows are X, and the backward pass needs them.
    (site,) = pamm_compile.explain(model, *_x().values(), using=using).sites
    assert site.reason == "SHARED_INPUT"


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        torch._dynamo.graph_break()
        return join_heads(F.scaled_dot_product_attention(q, k, v))


def test_graph_break_between_projection_and_attention() -> None:
    report = _report(_Broken(), _x())
    assert report.compressed == ()
    assert {note.reason for note in report.notes} == {
        "NO_ATTENTION",
        "PROJECTION_IN_ANOTHER_GRAPH",
    }


class _Convolutional(nn.Module):
    """Attention over pixels whose q, k and v come from one 1×1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, HEADS, HEAD)).unbind(1)
        q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def test_convolution_as_projection() -> None:
    report = _report(_Convolutional(), {"x": torch.randn(BATCH, WIDTH, 6, 6)})
    assert report.sites == ()
    (note,) = report.notes
    assert (note.reason, note.what, note.detail) == (
        "NOT_A_PROJECTION", "qkv.weight", "aten::convolution",
    )  # fmt: skip


def test_no_attention_at_all() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    report = _report(model, {"input": torch.randn(BATCH, LENGTH, WIDTH)})
    assert [note.reason for note in report.notes] == ["NO_ATTENTION"]


def test_too_few_tokens() -> None:
    report = _report(_block(), _x(), make_options(ratio=4, min_tokens=BATCH * LENGTH + 1))
    assert set(_reasons(report).values()) == {"TOO_FEW_TOKENS"}
    assert report.sites[0].detail == f"{BATCH * LENGTH} < {BATCH * LENGTH + 1}"


def test_no_grad_leaves_the_graph_alone() -> None:
    backend = pamm_compile.backend(ratio=4, min_tokens=1, base="aot_eager", seed=3)
    backend.report.clear()
    model = _block()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        out = compiled(**_x())
    assert not out.requires_grad
    assert [graph.training for graph in backend.report.graphs] == [False]


class _LoRA(nn.Module):
    """A frozen projection with a trained low-rank addition."""

    def __init__(self, rank: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.a = nn.Linear(WIDTH, rank, bias=False)
        self.b = nn.Linear(rank, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(self.dropout(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_compresses_a_and_keeps_b(dropout: float) -> None:
    model = _block()
    model.q, model.v = _LoRA(dropout=dropout), _LoRA(dropout=dropout)
    model.k.weight.requires_grad_(False)
    report = _report(model, _x())
    compressed = {name for site in report.compressed for name in site.parameters}
    assert compressed == {"q.a.weight", "v.a.weight"}
    reasons = _reasons(report)
    assert reasons["q.b.weight"] == reasons["v.b.weight"] == "NARROW_INPUT"


_NARROWING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "square": lambda x: x * x,
    "concatenation": lambda x: torch.cat([x, x.flip(0)], -1),
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("how", _NARROWING)
def test_a_layer_that_narrows_makes_no_low_rank_factor(how: str) -> None:
    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, 8)
            self.b = nn.Linear(16 if how == "concatenation" else 8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(1.5 * _NARROWING[how](self.a(x))).square().mean()

    assert "NARROW_INPUT" not in look(Narrowing(), _x(), "linear=pamm:4").reasons.values()


def test_what_scales_and_masks_a_low_rank_factor_leaves_it_one() -> None:
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x) * self.scale, 0.1) / 2).square().mean()

    assert look(Factors(), _x(), "linear=pamm:4").reasons == {"b.weight": "NARROW_INPUT"}


class _Normalized(nn.Module):
    """X is what the norm's own backward pass reads, so leaving it out saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x * self.scale)
        q, k, v = (split_heads(layer(h)) for layer in (self.q, self.k, self.v))
        return join_heads(F.scaled_dot_product_attention(q, k, v))


def test_an_input_that_another_gradient_reads() -> None:
    report = _report(_Normalized(), _x())
    (site,) = report.sites
    assert site.reason == "SHARED_INPUT"
    assert "aten::tanh_backward" in site.detail
    # Decomposed, what reads X does not depend on a tangent, and is no less in the way.
    report = pamm_compile.explain(
        _Normalized(), **_x(), using=pamm_compile.backend(256, min_tokens=1)
    )
    assert [site.reason for site in report.sites] == ["SHARED_INPUT"]


def test_strict_says_why_nothing_matched() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    backend = pamm_compile.backend(256, strict=True, base="aot_eager")
    with pytest.raises(Exception, match=r"(?s)strict=True.*NO_ATTENTION") as error:
        torch.compile(model, backend=backend)(torch.randn(BATCH, LENGTH, WIDTH))
    inner = getattr(error.value, "inner_exception", error.value)
    assert isinstance(inner, pamm_compile.NothingMatchedError)


def test_strict_is_content_with_one_site() -> None:
    backend = pamm_compile.backend(ratio=4, min_tokens=1, strict=True, base="aot_eager")
    torch.compile(_block(), backend=backend)(**_x())


def test_every_reason_is_readable_and_public() -> None:
    assert pamm_compile.Reason is Reason
    assert all(reason.sentence for reason in Reason)


def test_the_table_of_reasons_says_which_room_gives_each() -> None:
    package = Path(pamm_compile.__file__).parent
    texts = {p.relative_to(package).with_suffix(""): p.read_text() for p in package.rglob("*.py")}
    for reason in Reason:
        named = re.compile(rf"Reason\.{reason.name}\b")
        given = {str(path) for path, text in texts.items() if named.search(text)}
        assert given == set(reason.rooms), reason.name


def test_the_pass_does_not_mutate_a_declined_graph() -> None:
    captured = Captured()
    model = _Normalized()
    compiled = torch.compile(model, backend=capturing_backend(captured, OPTIONS, decompose=True))
    step(model, compiled, _x(), lambda out: out.square().mean())
    assert captured.before == captured.after
