"""What a method may change in a model, and what is saved for the backward pass."""

from __future__ import annotations

import torch

from pamm_compile.methods.base import Method
from pamm_testing.graphs import Captured, Run, capturing_backend, step
from pamm_testing.options import make_options
from pamm_testing.zoo import DECODERS


def trained_with(method: Method) -> tuple[Captured, Run, Run]:
    """Train a step with and without a method at Q, K and V, and check that all else is bitwise.

    Args:
        method: for the projections of a small LLaMA.

    Returns:
        The graphs, of budgets 1 and 0.5; the exact step; the one with the method. At either budget
        X itself is not saved.
    """
    case = next(case for case in DECODERS if case.name == "llama")
    model, batch = case.build(), case.batch()
    exact = step(model, torch.compile(model, backend="aot_eager"), batch, case.loss)
    torch._dynamo.reset()
    captured = Captured()
    options = make_options(rules={"qkv": method}, min_tokens=1)
    backend = capturing_backend(captured, options, decompose=False, budgets=(0.5,))
    ours = step(model, torch.compile(model, backend=backend), batch, case.loss)

    assert torch.equal(exact.loss, ours.loss)
    changed = {n for n, g in exact.grads.items() if not torch.equal(g, ours.grads[n])}
    compressed = captured.report.sites
    assert changed == {name for site in compressed for name in site.parameters}
    assert len(compressed) == case.sites
    for graphs in (captured, captured.at_budget[0.5]):
        assert not {node.name for node in graphs.saved()} & set().union(*captured.inputs)
    return captured, exact, ours
