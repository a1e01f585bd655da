"""Predict what a compiled model would save for backward, without compiling it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
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
from pamm_compile.inspect.undisturbed import undisturbed
from pamm_compile.names import Names
from pamm_compile.private import memory
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
    fake or on the meta device, so that a model may be larger than the machine:

        with torch._subclasses.FakeTensorMode():
            prediction = predict_saved(make_model(), *make_inputs())

    Everything that the call changes is restored. Hooks of modules run once. Like
    `torch._dynamo.explain` it resets Dynamo.

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
    with undisturbed(own, (args, kwargs)), _fake_if_meta(own, (args, kwargs)) as (given, named):
        saved = visit(
            own,
            lambda compiled: saved_storages(lambda: compiled(*given, **named), model=own),
            partition,
        )
    return Prediction(saved, report)


@contextlib.contextmanager
def _fake_if_meta(
    model: torch.nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Let fake tensors stand in for all if some are on the meta device.

    Of what is on the meta device Inductor computes nothing, and saves nothing. The model is to be
    put back by the caller.
    """
    given = [*model.parameters(), *model.buffers(), *memory.tensors_in(inputs)]
    if all(tensor.device.type != "meta" for tensor in given):
        yield inputs
        return
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            plain = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
            # Tied ones stay tied.
            made[id(tensor)] = (
                nn.Parameter(plain, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else plain.requires_grad_(tensor.requires_grad)
            )
        return made[id(tensor)]

    with memory.fake_mode():
        for module in model.modules():
            for held in memory.attributes(module):
                held.update({n: fake(t) for n, t in held.items() if isinstance(t, Tensor)})
        yield memory.with_tensors(inputs, fake)
