"""Show what would be compressed in a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.private import aot
from pamm_compile.report import GraphReport, Report
from pamm_compile.sites.joint_pass import JointPass
from pamm_compile.torch_backend import Backend, backend, compile_eager, parameter_names


def explain(
    model: torch.nn.Module, *args: Any, using: Backend | None = None, **kwargs: Any
) -> Report:
    """Show what would be compressed in a model, without changing or compiling it.

    Equivalent to compiling the model, calling it once and printing the backend's `report`, except
    that nothing is rewritten, operators run eagerly, and buffers and random-number generators are
    put back. Like `torch._dynamo.explain` it resets Dynamo, so what is compiled already compiles
    again at its next call.

    Args:
        model: any module; a compiled one is unwrapped.
        args: what to call it with.
        using: a backend, for its options; by default `backend()`.
        kwargs: what to call it with.

    Returns:
        The report: print it, or use its `sites`, `to_dict()` and `to_json()`.
    """
    model = getattr(model, "_orig_mod", model)
    options = (using or backend()).options
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    report = Report()

    def look(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        joint_pass = JointPass(options, parameter_names(gm, known), apply=False)
        compiled = compile_eager(gm, example_inputs, joint_pass, decompose=True)
        report.add(joint_pass.report or GraphReport(training=False))
        return compiled

    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    torch.compiler.reset()
    try:
        with (
            torch.random.fork_rng(sorted(d for d in devices if d is not None)),
            torch.enable_grad(),
            aot.without_autograd_cache(),
        ):
            torch.compile(model, backend=look)(*args, **kwargs)
    finally:
        torch.compiler.reset()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return report
