"""Compare PAMM with eager and with torch.compile on one model, in five arms."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pamm_compile import checks
from pamm_compile.driver import inductor_settings
from pamm_compile.errors import MeasurementError
from pamm_compile.inspect.measure import MemoryUse, differentiate, measure_memory
from pamm_compile.inspect.undisturbed import refuse_without_values, undisturbed
from pamm_compile.private import inductor, memory
from pamm_compile.torch_backend import Backend
from pamm_compile.torch_backend import backend as make_backend

REFERENCE = "compile"
"""Name of the arm that step times are divided by."""


@dataclass(frozen=True)
class Arm:
    """One way to run a training step, measured."""

    name: str
    loss: float
    memory: MemoryUse
    time_ratio: float | None
    """Median, over steps run in turn, of this arm's time by that of "compile"; None if untimed."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON; the saved storages are summed up."""
        return {
            "name": self.name,
            "loss": self.loss,
            "saved_bytes": self.memory.saved_bytes,
            "peak_bytes": self.memory.peak_bytes,
            "peak_source": self.memory.peak_source,
            "time_ratio": self.time_ratio,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare_memory` found; printing it gives the table of `text()`."""

    arms: tuple[Arm, ...]
    steps: int
    """Timed steps per arm."""

    def __getitem__(self, name: str) -> Arm:
        """Return the arm of a name."""
        return {arm.name: arm for arm in self.arms}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the arms, and how many steps of each were timed."""
        return {"steps": self.steps, "arms": [arm.to_dict() for arm in self.arms]}

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def text(self) -> str:
        """Return an aligned table, one line an arm, and what the columns mean."""
        header = ("arm", "saved MiB", "peak MiB", "step time", "loss")
        rows = [
            (
                arm.name,
                f"{arm.memory.saved_bytes / 2**20:.1f}",
                f"{arm.memory.peak_bytes / 2**20:.1f}",
                "-" if arm.time_ratio is None else f"{arm.time_ratio:.2f} ×",
                f"{arm.loss:.6f}",
            )
            for arm in self.arms
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in (header, tuple("─" * width for width in widths), *rows)
        ]
        lines += [
            "saved: held for backward when forward has ended, parameters and buffers aside",
            "peak: of forward and backward, above what was there; "
            + self.arms[0].memory.peak_source,
        ]
        if self.steps:
            lines.append(
                f"step time: of forward and backward, by that of {REFERENCE!r}; median of "
                f"{self.steps} paired ratios"
            )
        return "\n".join(lines)

    __str__ = text


def compare_memory(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    backend: Backend | None = None,
    budget: float = 0.99,
    steps: int = 10,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Measure one training step of a model five ways: eager, compiled, and with PAMM.

    The arms are "eager", "compile", "compile + budget 0.99", "PAMM" and "PAMM + budget 0.99".
    Equivalent, for each arm, to `measure_memory(lambda: loss(compiled), model=model)` with

        compiled = torch.compile(model, backend=…)

    under `torch._functorch.config.activation_memory_budget`, with which torch.compile itself
    recomputes what is cheap. Everything that this changes in the model is restored. Hooks of
    modules and of the batch run at every step, hooks on gradients of parameters do not. All code
    that torch.compile made before in this process is dropped.

    Args:
        model: in the mode it is to be measured in.
        loss: runs forward on the model handed to it, such as
            `lambda model: model(**batch).loss`; returns a scalar.
        backend: for the PAMM arms; None is `pamm_compile.backend()`.
        budget: fraction of activation memory, from 0 to 1.
        steps: how often to time forward and backward of every arm, in turn; 0 times nothing.
        mode: as torch.compile's, for all compiled arms.
        options: Inductor settings, as torch.compile's, for all compiled arms.
        progress: called with the name of each arm before it is compiled.

    Returns:
        One entry per arm.

    Raises:
        MeasurementError: an arm ran nothing compiled, or the model has no values.
        InvalidOptionError: the budget is not from 0 to 1, steps are below 0, or an Inductor setting
            is unknown.
    """
    checks.integer("steps", steps, 0, "0 times nothing.")
    allowed, hint = "a number from 0 to 1", "It is the fraction of activation memory to keep."
    if not 0 <= checks.number("budget", budget, allowed, hint) <= 1:
        raise checks.refusal("budget", budget, allowed, hint)
    refuse_without_values("compare_memory()", model, ())
    settings = inductor_settings(mode, options)
    chosen = backend or make_backend()

    def exact(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = inductor.compile_fx(gm, inputs, config_patches=settings)
        return compiled

    def pamm(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return chosen(gm, inputs, mode=mode, options=options)

    suffix = f" + budget {budget:g}"
    arms = {
        REFERENCE: _ArmBackend(exact, None),
        REFERENCE + suffix: _ArmBackend(exact, budget),
        "PAMM": _ArmBackend(pamm, None),
        "PAMM" + suffix: _ArmBackend(pamm, budget),
    }
    torch.compiler.reset()
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(torch.compiler.reset)
        afterwards.enter_context(undisturbed(model))
        runs: dict[str, Callable[[], Tensor]] = {"eager": lambda: loss(model)}
        for name, arm in arms.items():
            # compile() is annotated as returning a function; of a module it returns a module.
            compiled = cast(nn.Module, torch.compile(model, backend=arm))
            runs[name] = functools.partial(loss, compiled)
        memory = {}
        for name, run in runs.items():
            progress(name)
            memory[name] = measure_memory(run, model=model)
            if name in arms and not arms[name].graphs:
                raise MeasurementError(
                    f"the arm {name!r} compiled no graph, so there is nothing to compare. Does "
                    "loss() call the model that it is handed, and is torch.compile enabled?"
                )
        times = _times(runs, steps)
        return Comparison(
            tuple(
                Arm(name, float(run().detach()), memory[name], _ratio(times, name))
                for name, run in runs.items()
            ),
            steps,
        )


class _ArmBackend:
    """A backend of its own for each arm, since Dynamo shares compiled code by backend."""

    def __init__(
        self,
        compile_graph: Callable[[GraphModule, list[Any]], Callable[..., Any]],
        budget: float | None,
    ) -> None:
        self.graphs = 0
        self._compile = compile_graph
        self._budget = budget

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        # None keeps what the user has set.
        with nullcontext() if self._budget is None else memory.memory_budget(self._budget):
            return self._compile(gm, inputs)


def _times(runs: Mapping[str, Callable[[], Tensor]], steps: int) -> dict[str, list[float]]:
    """Time forward and backward of every run, in turn, so that all meet the same disturbances."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for step in range(steps):
        # Whoever comes after eager finds other caches than whoever comes before it.
        first = step % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            start = time.perf_counter()
            differentiate(runs[name]())
            synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    """Wait for what was launched on an accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _ratio(times: Mapping[str, list[float]], name: str) -> float | None:
    pairs = zip(times[name], times[REFERENCE], strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    return statistics.median(ratios) if ratios else None
