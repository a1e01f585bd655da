"""Show what would be compressed in a model, without compiling it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.devices import device_named
from pamm_compile.driver import (
    Compiled,
    Mode,
    compile_graph,
    found,
    make_pipeline,
    visit,
    with_names_told_apart,
)
from pamm_compile.inspect.arguments import refuse_options
from pamm_compile.inspect.undisturbed import undisturbed
from pamm_compile.names import Names
from pamm_compile.report import Report
from pamm_compile.torch_backend import Backend, backend


def explain(
    model: torch.nn.Module,
    *args: Any,
    using: Backend | None = None,
    device: str | None = None,
    **kwargs: Any,
) -> Report:
    """Show what would be compressed in a model, without changing or compiling it.

    Equivalent to compiling the model, calling it once and printing the backend's `report`, except
    that nothing is rewritten, operators run eagerly, and everything that the call changes is
    restored. Hooks of modules run once. Like `torch._dynamo.explain` it resets Dynamo, so compiled
    models compile again at their next call.

    Args:
        model: any module; a compiled one is unwrapped.
        args: what to call it with.
        using: a backend, for its options; None stands for `backend()`.
        device: a GPU by its name in `devices.DEVICES`, such as "h100": a model of it gives the
            times that are shown, and that the goal "speed" decides by; none is measured. None for
            the device that the model is on.
        kwargs: what to call it with.

    Returns:
        The report: print it, or use its `sites`, `to_dict()` and `to_json()`.

    Raises:
        InvalidOptionError: no figures of the device are known, or an option would go to the model.
    """
    refuse_options(model, kwargs, "Give options as using=pamm_compile.backend(…).")
    if device is not None:
        device_named(device)
    chosen = using or backend()
    report = Report()

    def look(gm: GraphModule, inputs: Sequence[Any], names: Names) -> Compiled:
        pipeline = make_pipeline(
            chosen.options, names.by_key, chosen.passes, gm=gm, device=device, apply=False
        )
        compiled = compile_graph(gm, inputs, pipeline, mode=Mode.LOOK)
        report.add(with_names_told_apart(found(pipeline), names, chosen.options))
        return compiled

    with undisturbed(model, (args, kwargs)):
        visit(model, lambda compiled: compiled(*args, **kwargs), look)
    return report
