"""The backend object: identity, options passed on, names, logging, targets."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
import transformers as hf
from pamm_testing.forms import Attention, FusedQKV, _sdpa
from pamm_testing.zoo import BATCH, HEADS, LAYERS, LENGTH, VOCAB, WIDTH, causal
from torch import nn
from torch._dynamo.utils import counters

import pamm_compile
from pamm_compile.driver import make_pipeline
from pamm_compile.private import inductor


def _llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def _eager(**options: Any) -> pamm_compile.Backend:
    backend = pamm_compile.backend(**{"ratio": 4, "min_tokens": 1, "base": "aot_eager", **options})
    backend.report.clear()
    return backend


@pytest.mark.quick
def test_the_same_options_give_equal_objects() -> None:
    one, other = pamm_compile.backend(ratio=32), pamm_compile.backend(ratio=32.0)
    assert one == other
    assert hash(one) == hash(other)
    assert one.report is not other.report
    assert one != pamm_compile.backend(ratio=33)
    assert pamm_compile.backend(mode="max-autotune") != pamm_compile.backend()
    assert one != "pamm"


_SDPA = _sdpa()


def _equal() -> pamm_compile.Backend:
    return pamm_compile.backend(ratio=4, min_tokens=1, base="aot_eager", seed=11)


def _compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_blocks_compiled_one_by_one_share_code_and_its_report() -> None:
    blocks, backends = [Attention(_SDPA) for _ in range(12)], [_equal() for _ in range(12)]
    # As the inputs of later blocks do, the first requires a gradient.
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    before = _compiled_graphs()
    with dynamo_config.patch(fail_on_recompile_limit_hit=True, error_on_recompile=True):
        for _ in range(2):
            y = x
            for block, backend in zip(blocks, backends, strict=True):
                block.compile(backend=backend)
                y = block(y)
    assert _compiled_graphs() - before == 1
    (graph,) = backends[0].report.graphs
    assert len(graph.sites) == 1
    assert all(backend.report.graphs == (graph,) for backend in backends)


class Wide(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.first, self.second, self.breaks = Attention(_SDPA), FusedQKV(), breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("breaks", [False, True])
def test_two_models_with_equal_options_have_two_reports(breaks: bool) -> None:
    models = [Wide(breaks), FusedQKV()]
    backends = [_equal() for _ in models]
    compiled = [torch.compile(m, backend=b) for m, b in zip(models, backends, strict=True)]
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    expected = [
        [("first.q.weight", "first.k.weight", "first.v.weight"), ("second.c_attn.weight",)],
        [("c_attn.weight",)],
    ]
    for _ in range(3):
        for run in compiled:
            run(x)
        found = [[s.parameters for s in b.report.compressed] for b in backends]
        assert found == expected


def test_a_second_model_that_runs_the_code_of_the_first_has_its_report() -> None:
    first, second, idle = _equal(), _equal(), _equal()
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    before = _compiled_graphs()
    for backend in (first, second):
        torch.compile(Wide(breaks=True), backend=backend)(x)
    assert _compiled_graphs() - before == 2
    assert first.report.graphs == second.report.graphs
    assert idle.report.graphs == ()


def test_two_backends_with_different_ratios_in_one_process() -> None:
    model, batch = _llama(), causal()
    for ratio in (4, 8):
        backend = _eager(ratio=ratio)
        torch.compile(model, backend=backend)(**batch)
        assert {s.generators for s in backend.report.compressed} == {BATCH * LENGTH // ratio}


def test_by_name_with_prefixed_options() -> None:
    options = {"pamm.ratio": 4, "pamm.min_tokens": 1, "pamm.base": "aot_eager", "pamm.seed": 5}
    model = FusedQKV()
    torch.compile(model, backend="pamm", options=options)(torch.randn(BATCH, LENGTH, WIDTH))
    report = pamm_compile.by_name(options).report
    assert [site.parameters for site in report.compressed] == [("c_attn.weight",)]


def test_by_name_with_an_unknown_option() -> None:
    compiled = torch.compile(FusedQKV(), backend="pamm", options={"pamm.ratoi": 4})
    with pytest.raises(Exception, match=r"'ratoi' is not an option\. Did you mean 'ratio'"):
        compiled(torch.randn(BATCH, LENGTH, WIDTH))


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    earlier = make_pipeline(pamm_compile.backend().options, {})
    backend = pamm_compile.backend(options={"epilogue_fusion": False})
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with inductor_config.patch(joint_custom_pre_pass=earlier):
        torch.compile(FusedQKV(), backend=backend, mode="max-autotune-no-cudagraphs")(x)
    (patches,) = seen
    assert patches["max_autotune"] is True
    assert patches["epilogue_fusion"] is False
    # Somebody else's pass runs first and is not lost.
    assert patches["joint_custom_pre_pass"].passes[0] is earlier
    assert len(patches["joint_custom_pre_pass"].passes) == 2


def test_uuid_changes_with_every_option() -> None:
    base = {"ratio": 256}
    others = [
        {"ratio": 64}, {"epsilon": 0.5}, {"sampling": "uniform"}, {"min_generators": 2},
        {"min_tokens": 1}, {"targets": "linear"}, {"seed": 1},
    ]  # fmt: skip
    uuids = {
        make_pipeline(pamm_compile.backend(**{**base, **other}).options, {}).uuid()
        for other in [{}, *others]
    }
    assert len(uuids) == len(others) + 1


def test_uuid_depends_on_names_only_if_they_select() -> None:
    def uuid(name: str, **options: Any) -> str:
        return make_pipeline(pamm_compile.backend(**options).options, {"input:0": name}).uuid()

    assert uuid("a") == uuid("b")
    assert uuid("a", targets=re.compile("a")) != uuid("b", targets=re.compile("a"))


def test_targets_linear_compresses_every_projection_it_can() -> None:
    backend = _eager(targets="linear")
    torch.compile(_llama(), backend=backend)(**causal())
    names = [site.parameters for site in backend.report.compressed]
    prefix = "model.layers.0"
    assert (f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight") in names
    assert (f"{prefix}.mlp.down_proj.weight",) in names
    assert ("lm_head.weight",) in names
    # The attention's backward pass keeps its own output, which is what o_proj reads.
    declined = {s.parameters: s.reason for s in backend.report.declined}
    assert declined == {
        (f"model.layers.{i}.self_attn.o_proj.weight",): "SHARED_INPUT" for i in range(LAYERS)
    }


def test_targets_pattern_compresses_what_it_names() -> None:
    backend = _eager(targets=re.compile(r"mlp\.(gate|up)_proj"))
    torch.compile(_llama(), backend=backend)(**causal())
    assert [site.parameters for site in backend.report.compressed] == [
        (f"model.layers.{i}.mlp.gate_proj.weight", f"model.layers.{i}.mlp.up_proj.weight")
        for i in range(LAYERS)
    ]


def test_parallel_blocks_are_compressed_once_the_mlp_joins() -> None:
    config = hf.GPTJConfig(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=HEADS, rotary_dim=4)
    backend = _eager(targets=re.compile(r"[qkv]_proj|fc_in"))
    torch.compile(hf.GPTJForCausalLM(config), backend=backend)(**causal())
    (site,) = backend.report.compressed
    assert {name.split(".")[-2] for name in site.parameters} == {
        "q_proj", "k_proj", "v_proj", "fc_in",
    }  # fmt: skip


def test_one_line_is_logged_per_compilation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pamm_compile"):
        torch.compile(_llama(), backend=_eager())(**causal())
    lines = [r.getMessage() for r in caplog.records if r.name == "pamm_compile"]
    assert len(lines) == 1
    assert re.fullmatch(rf"{LAYERS} of {LAYERS} sites, .* → .*", lines[0])


def test_registered_attention_is_an_anchor() -> None:
    before = make_pipeline(pamm_compile.backend().options, {}).uuid()
    pamm_compile.register_attention("pamm_test::attention")
    assert make_pipeline(pamm_compile.backend().options, {}).uuid() != before

    with torch.library._scoped_library("pamm_test", "FRAGMENT") as library:
        library.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.impl("attention", lambda q, k, v: q + k + v, "CompositeExplicitAutograd")
        operator = torch.ops.pamm_test.attention.default

        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return grad, grad, grad

        torch.library.register_autograd("pamm_test::attention", backward, lib=library)
        backend = _eager(seed=7)
        torch.compile(Attention(operator), backend=backend)(
            torch.randn(BATCH, LENGTH, WIDTH)
        ).sum().backward()
    assert [s.parameters for s in backend.report.compressed] == [
        ("q.weight", "k.weight", "v.weight")
    ]


def test_report_as_objects_text_and_json() -> None:
    backend = _eager()
    torch.compile(_llama(), backend=backend)(**causal())
    report = backend.report
    rows, k = BATCH * LENGTH, BATCH * LENGTH // 4
    site = report.sites[0]
    assert site.shape == (rows, WIDTH)
    assert site.dtype == "float32"
    assert site.generators == k
    assert site.bytes_before == rows * WIDTH * 4
    # Generators, then an index of one byte and a scale of four per token.
    assert site.bytes_after == k * WIDTH * 4 + rows * (1 + 4)
    assert report.bytes_before == LAYERS * site.bytes_before
    assert report.bytes_after == LAYERS * site.bytes_after

    data = json.loads(report.to_json())
    assert data["compressed"] == LAYERS
    assert data["graphs"][0]["sites"][0]["parameters"] == list(site.parameters)
    again = pamm_compile.GraphReport.from_dict(data["graphs"][0])
    assert again == report.graphs[0]

    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["weights", "tokens", "×"]
    assert "model.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight" in lines[2]
    assert f"{LAYERS} of {LAYERS} sites compressed" in lines[-1]
