"""Tell what a compiled model would save for backward, without compiling or, if fake, computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from pamm_compile.driver import (
    Compiled,
    Mode,
    compile_graph,
    found,
    make_pipeline,
    visit,
    with_names_told_apart,
)
from pamm_compile.errors import InvalidOptionError
from pamm_compile.inspect.arguments import refuse_options
from pamm_compile.inspect.measure import SavedStorage, saved_storages
from pamm_compile.names import Names
from pamm_compile.report import Report
from pamm_compile.torch_backend import Backend, backend


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
    model: torch.nn.Module,
    *args: Any,
    using: Backend | Literal["exact"] | None = None,
    **kwargs: Any,
) -> Prediction:
    """Tell what a compiled model would save for backward, without compiling it.

    Equivalent to the saved storages of `measure_memory(lambda: compiled(*args, **kwargs))` with

        compiled = torch.compile(model, backend=using)

    except that no code is generated: graphs are traced, rewritten and partitioned as for Inductor,
    and their operators run one by one. Nothing is computed or allocated if model and inputs are
    fake, so that a model may be larger than the machine:

        with torch._subclasses.FakeTensorMode():
            prediction = predict_saved(make_model(), *make_inputs())

    Like `torch._dynamo.explain` it resets Dynamo.

    Args:
        model: any module; its parameters and buffers do not count. A compiled one is unwrapped.
        args: what to call it with.
        using: a backend, for its options; None stands for `backend()`, as in `explain`; "exact"
            for torch.compile without us.
        kwargs: what to call it with.

    Returns:
        Bytes saved, block by block, and what was compressed.

    Raises:
        InvalidOptionError: `using` is something else, or an option would go to the model.
        MeasurementError: a tensor is saved whose layout is neither strided nor sparse COO.
    """
    if using is not None and using != "exact" and not isinstance(using, Backend):
        raise InvalidOptionError(
            f"using={using!r} is not allowed: using must be a backend of pamm_compile.backend(), "
            '"exact", or None for the defaults.'
        )
    refuse_options(model, kwargs, "Give options as using=pamm_compile.backend(…).")
    chosen = None if using == "exact" else using or backend()
    report = Report()

    def partition(gm: GraphModule, inputs: Sequence[Any], names: Names) -> Compiled:
        if chosen is None:
            return compile_graph(gm, inputs, None, mode=Mode.PARTITION)
        pipeline = make_pipeline(chosen.options, names.by_key, chosen.passes, gm=gm)
        compiled = compile_graph(gm, inputs, pipeline, mode=Mode.PARTITION)
        report.add(with_names_told_apart(found(pipeline), names, chosen.options))
        return compiled

    own = getattr(model, "_orig_mod", model)
    saved = visit(
        model,
        lambda compiled: saved_storages(lambda: compiled(*args, **kwargs), model=own),
        partition,
    )
    return Prediction(saved, report)
