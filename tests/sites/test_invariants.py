"""The invariants of the rewrite, over every model class and every way to write attention."""

from __future__ import annotations

import re

import pytest
import torch
from pamm_testing.forms import FORMS
from pamm_testing.graphs import Both, Captured, capturing_backend, check_saved, memory_budget, step
from pamm_testing.options import make_options
from pamm_testing.zoo import TRANSFORMERS, Case, without_dropout

import pamm_compile

DIFFERENT = ("llama", "gemma2", "deepseek_v3", "gpt2", "bert", "t5", "vit")
"""The rest of the zoo is much like one of these, in what a partition saves and autocast casts."""


def _like_others(case: Case, different: tuple[str, ...] = DIFFERENT) -> list[pytest.MarkDecorator]:
    return [] if case.name in different or case in FORMS else [pytest.mark.everything]


ALL = [*TRANSFORMERS, *FORMS]
SAVING = ("llama", "gpt2", "bert", "vit")
"""Of the large models, whose three partitions take seconds each."""
# What autocast does to a projection does not depend on how attention is written.
PRECISIONS = [
    *(pytest.param(case, False, id=f"{case.name}-fp32", marks=_like_others(case)) for case in ALL),
    *(
        pytest.param(
            case,
            True,
            id=f"{case.name}-bf16_autocast",
            marks=[] if case.name == "llama" else [pytest.mark.everything],
        )
        for case in TRANSFORMERS
    ),
]
OPTIONS = make_options(ratio=4, min_tokens=1)


def _expected(case: Case, names: list[str]) -> set[str]:
    matched = {n for n in names if any(re.search(p, n) for p in case.compressed)}
    assert matched, "the case's patterns match no parameter"
    return matched


@pytest.mark.parametrize(("case", "autocast"), PRECISIONS)
def test_only_matched_weight_gradients_change(case: Case, autocast: bool) -> None:
    """Operator by operator, all but the matched weights' gradients are bitwise the exact ones.

    In fp32 with the class's own dropout, so that this also shows that our sampling leaves torch's
    random numbers alone; in bf16 without.
    """
    model = case.build().train()
    if autocast:
        without_dropout(model)
    batch = case.batch()
    backend = pamm_compile.backend(ratio=4, min_tokens=1, base="aot_eager")
    backend.report.clear()
    both = Both(backend)
    compiled = torch.compile(model, backend=both)
    exact = step(model, compiled, batch, case.loss, autocast=autocast)
    first = len(backend.report.graphs)
    both.exact = False
    ours = step(model, compiled, batch, case.loss, autocast=autocast)

    assert torch.equal(exact.loss, ours.loss)
    assert exact.grads.keys() == ours.grads.keys()
    changed = {n for n, g in exact.grads.items() if not torch.equal(g, ours.grads[n])}
    assert changed == _expected(case, list(exact.grads))
    # Dynamo may compile once more for the second call: what ran is what was compiled last.
    graphs = backend.report.graphs[first:] or backend.report.graphs
    compressed = [site for graph in graphs for site in graph.sites if site.compressed]
    assert len(compressed) == case.sites
    assert {n for s in compressed for n in s.parameters} == changed
    for name in changed:
        assert ours.grads[name].isfinite().all(), name


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=_like_others(case, SAVING)) for case in ALL],
)
def test_saves_the_compressed_form_and_not_the_input(case: Case) -> None:
    model = without_dropout(case.build().train())
    captured, budgets = Captured(), (0.99, 0.5)
    backend = capturing_backend(captured, OPTIONS, decompose=True, budgets=budgets)
    with memory_budget(1.0):
        ours = step(model, torch.compile(model, backend=backend), case.batch(), case.loss)
    assert ours.loss.isfinite()
    check_saved(captured, case.sites, 1.0)
    for budget in budgets:
        check_saved(captured.at_budget[budget], case.sites, budget)


@pytest.mark.parametrize("decompose", [False, True], ids=["aten", "decomposed"])
@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gpt2", marks=pytest.mark.everything), "einsum_heads"]
)
def test_running_the_pass_twice_changes_nothing(name: str, decompose: bool) -> None:
    case = next(case for case in ALL if case.name == name)
    assert isinstance(case, Case)
    model = case.build()
    captured = Captured()
    compiled = torch.compile(
        model, backend=capturing_backend(captured, OPTIONS, decompose=decompose)
    )
    step(model, compiled, case.batch(), case.loss)
    assert captured.joint is not None
    once = str(captured.joint)
    from pamm_compile.driver import make_pipeline

    make_pipeline(OPTIONS, {})(captured.joint)
    assert str(captured.joint) == once


def test_a_graph_with_nothing_to_match_is_unchanged() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    captured = Captured()
    compiled = torch.compile(model, backend=capturing_backend(captured, OPTIONS, decompose=True))
    step(model, compiled, {"input": torch.randn(16, 8)}, lambda out: out.square().mean())
    assert captured.before == captured.after
    assert [note.reason for note in captured.report.notes] == ["NO_ATTENTION"]
