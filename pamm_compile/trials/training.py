"""Training several copies of a model in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pamm_compile.errors import InvalidOptionError, MeasurementError, NothingMatchedError
from pamm_compile.inspect.compare import synchronize
from pamm_compile.report import Report, State
from pamm_compile.torch_backend import Backend
from pamm_compile.trials.task import Task, refuse_not_finite

CHECKS = 4
"""How often held-out data show how fast the exact loss falls, from half of the steps to the end."""


class Progress(Protocol):
    """What is told how far a trial is."""

    def __call__(self, done: int, steps: int, doing: str) -> None:
        """Show it: steps that are done, of how many, and what goes on."""


@dataclass
class Run:
    """One arm in training."""

    name: str
    model: nn.Module
    compiled: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    order: list[int]
    """Of the batches."""
    backend: Backend | None
    graphs_before: int
    """In the backend's report."""
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def report(self) -> Report | None:
        """What was compiled for this arm; None if it is exact."""
        if self.backend is None:
            return None
        return Report(self.backend.report.graphs[self.graphs_before :])


def make_run(name: str, backend: Any, task: Task, order: list[int], how: dict[str, Any]) -> Run:
    """Copy a task's model, and compile the copy.

    Args:
        name: of the arm.
        backend: as torch.compile's.
        task: what is trained.
        order: indices of the batches.
        how: `mode` and `options`, as torch.compile's.

    Returns:
        An arm that is yet untrained.
    """
    model = task.copied()
    # compile() is annotated as returning a function; of a module it returns a module.
    compiled = cast(nn.Module, torch.compile(model, backend=backend, **how))
    ours = backend if isinstance(backend, Backend) else None
    before = len(ours.report.graphs) if ours else 0
    return Run(name, model, compiled, *task.optimizer_of(model), order, ours, before)


def orders(steps: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the order of batches of all arms, and that of the control.

    The last batches are the same in both, so that losses on them can be compared.

    Args:
        steps: how many batches there are.
        seed: another one shuffles otherwise.
    """
    given = list(range(steps))
    shuffled = torch.randperm(steps - tail(steps), generator=torch.Generator().manual_seed(seed))
    other = [*shuffled.tolist(), *given[len(shuffled) :]]
    if other == given:
        other[:2] = given[1::-1]
    return given, other


def tail(steps: int) -> int:
    """Return how many last steps' losses stand for an arm where no data are held out."""
    return max(1, steps // 10)


def train(runs: Sequence[Run], task: Task, progress: Progress) -> dict[int, float]:
    """Train all arms, one step of each in turn.

    Whoever goes first finds other caches than the rest, so that each does in turn. What a model
    draws at random is the same for all arms in each step, but for those of another order.

    Args:
        runs: the arms, the exact one first.
        task: what they train.
        progress: told after every step.

    Returns:
        The exact arm's loss by the number of steps done, over the last half; on held-out data
        without the loss at the end, which `final_loss` gives.

    Raises:
        MeasurementError: the exact loss is not finite, or an arm compiled nothing.
        NothingMatchedError: an arm compresses nothing.
    """
    exact, steps = runs[0], len(task.batches)
    when = {round(steps * (1 + part / (CHECKS - 1)) / 2) for part in range(CHECKS - 1)}
    curve = {}
    progress(0, steps, f"compiling {len(runs)} arms")
    for step in range(steps):
        first = step % len(runs)
        for run in (*runs[first:], *runs[:first]):
            index = run.order[step]
            batch = task.there(task.batches[index])
            torch.manual_seed(2 * (task.seed * steps + index) + (run.order is not exact.order))
            _step(run, batch, task)
            if run is exact:
                refuse_not_finite(step, run.losses[-1])
        if step == 0:
            _refuse_nothing(runs)
        if task.held_out and step + 1 in when:
            curve[step + 1] = held_out_loss(exact.model, task)
        progress(step + 1, steps, f"loss {exact.losses[-1]:.4g}")
    if not task.held_out:
        curve = {step + 1: exact.losses[step] for step in range(steps // 2, steps)}
    return curve


def _step(run: Run, batch: Any, task: Task) -> None:
    synchronize()
    start = time.perf_counter()
    run.optimizer.zero_grad()
    loss = task.loss_of(run.compiled, batch)
    if not loss.requires_grad:
        raise InvalidOptionError(
            "the loss depends on no trainable parameter of the model that loss() is handed. "
            "Does it call that model, and leave gradients on?"
        )
    loss.backward()
    if task.clip is not None:
        nn.utils.clip_grad_norm_(run.model.parameters(), task.clip)
    run.optimizer.step()
    synchronize()
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(loss.item())
    if run.scheduler is not None:
        run.scheduler.step()


def _refuse_nothing(runs: Sequence[Run]) -> None:
    for run in runs:
        report = run.report
        if report is None:
            continue
        if not report.graphs:
            raise MeasurementError(
                f"the arm {run.name!r} compiled no graph, so there is nothing to compare. Does "
                "loss() call the model that it is handed, and is torch.compile enabled?"
            )
        # What a cache answered for without its report may well be compressed.
        is_known = all(graph.state is not State.UNKNOWN for graph in report.graphs)
        if is_known and not report.compressed:
            raise NothingMatchedError(
                f"the arm {run.name!r} compresses nothing, so that a trial would compare exact "
                f"training with itself. What was found, and why it stays exact:\n{report}\n"
                "Choose other rules, or larger batches."
            )


def final_loss(run: Run, task: Task) -> float:
    """Return an arm's loss on held-out data, or that of its last steps."""
    if task.held_out:
        return held_out_loss(run.model, task)
    return statistics.fmean(run.losses[-tail(len(run.losses)) :])


@torch.no_grad()
def held_out_loss(model: nn.Module, task: Task) -> float:
    """Return the mean loss over the batches held out, without torch.compile.

    Args:
        model: of an arm; no method changes the forward pass.
        task: what it trains.
    """
    torch.manual_seed(task.seed)
    with evaluating(model):
        losses: list[Tensor] = [task.loss_of(model, task.there(each)) for each in task.held_out]
        return statistics.fmean(loss.item() for loss in losses)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back in its own afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, before in training:
            module.training = before
