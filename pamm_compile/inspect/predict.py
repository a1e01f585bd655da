"""Tell what a compiled model would save for backward, without compiling or, if fake, computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.inspect.measure import SavedStorage, saved_storages
from pamm_compile.private import aot
from pamm_compile.report import GraphReport, Report
from pamm_compile.sites.joint_pass import JointPass
from pamm_compile.torch_backend import Backend, compile_inductor, parameter_names


@dataclass(frozen=True)
class Prediction:
    """What `predict_saved` found."""

    saved: tuple[SavedStorage, ...]
    """Largest first."""
    report: Report
    """What was compressed; empty for exact torch.compile."""

    @property
    def saved_bytes(self) -> int:
        """Bytes held for backward when forward has ended."""
        return sum(storage.bytes for storage in self.saved)


def predict_saved(
    model: torch.nn.Module, *args: Any, using: Backend | None = None, **kwargs: Any
) -> Prediction:
    """Tell what a compiled model would save for backward, without compiling it.

    Equivalent to the saved storages of `measure_memory(lambda: compiled(*args, **kwargs))` with

        compiled = torch.compile(model, backend=using or "inductor")

    except that no code is generated: graphs are traced, rewritten and partitioned as for Inductor,
    and their operators run one by one. Nothing is computed or allocated if model and inputs are
    fake, so that a model may be larger than the machine:

        with torch._subclasses.FakeTensorMode():
            prediction = predict_saved(make_model(), *make_inputs())

    Like `torch._dynamo.explain` it resets Dynamo.

    Args:
        model: any module; its parameters and buffers do not count. A compiled one is unwrapped.
        args: what to call it with.
        using: a backend, for its options; None for exact torch.compile.
        kwargs: what to call it with.

    Returns:
        Bytes saved, block by block, and what was compressed.

    Raises:
        MeasurementError: a tensor is saved whose layout is neither strided nor sparse COO.
    """
    model = getattr(model, "_orig_mod", model)
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    report = Report()

    def partition(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if using is None:
            return compile_inductor(gm, example_inputs, None, {}, generate_code=False)
        joint_pass = JointPass(using.options, parameter_names(gm, known))
        compiled = compile_inductor(gm, example_inputs, joint_pass, {}, generate_code=False)
        report.add(joint_pass.report or GraphReport(training=False))
        return compiled

    torch.compiler.reset()
    try:
        with torch.enable_grad(), aot.without_autograd_cache():
            compiled = torch.compile(model, backend=partition)
            saved = saved_storages(lambda: compiled(*args, **kwargs), model=model)
    finally:
        torch.compiler.reset()
    return Prediction(saved, report)
