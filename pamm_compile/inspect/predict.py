"""Tell what a compiled model would save for backward, without compiling or, if fake, computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.driver import Compiled, Mode, compile_graph, found, make_pipeline, visit
from pamm_compile.inspect.measure import SavedStorage, saved_storages
from pamm_compile.report import Report
from pamm_compile.torch_backend import Backend


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
    report = Report()

    def partition(gm: GraphModule, inputs: Sequence[Any], names: dict[str, str]) -> Compiled:
        if using is None:
            return compile_graph(gm, inputs, None, mode=Mode.PARTITION)
        pipeline = make_pipeline(using.options, names, using.passes, gm=gm)
        compiled = compile_graph(gm, inputs, pipeline, mode=Mode.PARTITION)
        report.add(found(pipeline))
        return compiled

    own = getattr(model, "_orig_mod", model)
    saved = visit(
        model,
        lambda compiled: saved_storages(lambda: compiled(*args, **kwargs), model=own),
        partition,
    )
    return Prediction(saved, report)
