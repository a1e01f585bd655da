"""Train a user's model exactly and compressed, side by side, and say what came of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pamm_compile import checks
from pamm_compile.driver import inductor_settings
from pamm_compile.errors import InvalidOptionError
from pamm_compile.inspect.measure import measure_memory
from pamm_compile.inspect.undisturbed import undisturbed
from pamm_compile.private import aot
from pamm_compile.remembering import early, period
from pamm_compile.torch_backend import Backend
from pamm_compile.torch_backend import backend as make_backend
from pamm_compile.trials.progress import Bar
from pamm_compile.trials.result import CONTROL, EXACT, Trial, TrialArm
from pamm_compile.trials.task import Loss, MakeOptimizer, Score, Task, check_model, make_task
from pamm_compile.trials.training import (
    Progress,
    Run,
    evaluating,
    final_loss,
    make_run,
    orders,
    train,
)
from pamm_compile.trials.verdict import Quartiles, Slope

_COMPILING = 2
"""Steps whose times are left out: the first compiles, the second may, for other sizes."""

_LEAST_STEPS = 4

_CASES = 8
"""Of one function that Dynamo may compile for an arm: its own limit."""


def trial(
    model: nn.Module,
    batches: Any,
    *,
    backend: Backend | Mapping[str, Backend] | None = None,
    steps: int = 100,
    loss: Loss | None = None,
    held_out: Any = None,
    score: Score | None = None,
    optimizer: MakeOptimizer | None = None,
    lr: float = 5e-4,
    clip: float | None = 1.0,
    dtype: str = "float32",
    seed: int = 0,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Trial:
    """Train copies of a model exactly and compressed, in turn, and say whether it is worth it.

    The arms are "exact", "exact, other order" (the control: what two exact runs differ by) and
    those of `backend`. All start from the same weights, and take the same batches. Equivalent, for
    each arm, to

        arm = torch.compile(copy.deepcopy(model), backend=…)
        for batch in batches:
            optimizer.zero_grad()
            loss(arm, batch).backward()
            torch.nn.utils.clip_grad_norm_(arm.parameters(), clip)
            optimizer.step()

    The model stays as it is, as do random-number generators. The copies and their optimizers are
    in memory at once, and so are all batches. All code that torch.compile made before in this
    process is forgotten.

    Args:
        model: before torch.compile; if it is in eval mode, its copies are put in training mode.
        batches: an iterable, also one that can be read only once, or a function that returns one;
            at least `steps`. A model is called with the items of a mapping by name, and with those
            of a tuple or list by place. Tensors are moved to the model's device.
        backend: what is compared with exact training, by the names of the arms if there are
            several; None is `pamm_compile.backend()`.
        steps: of every arm, at least 4.
        loss: called with a model and a batch, returns a scalar; None takes the `loss` of what the
            model returns, or the scalar that it returns.
        held_out: batches that the final loss is of, in eval mode; of those whose number is not
            known in advance the first 16. None takes the mean of the last tenth of training losses.
        score: called with a trained copy in eval mode, uncompiled and without gradients; returns a
            number, of which more is better. Return the negative of an error.
        optimizer: called with a copy, returns an optimizer, or a pair of it and a scheduler, which
            is stepped after every step; None is AdamW with a warm-up over a tenth of the steps and
            a cosine down to a tenth.
        lr: of AdamW, at its highest; without effect beside `optimizer`.
        clip: largest norm of all gradients together; None does not clip.
        dtype: "float32", or "bfloat16" for autocast.
        seed: of the control's order, and of what models draw at random.
        mode: as torch.compile's, for all arms.
        options: Inductor settings, as torch.compile's, for all arms.
        progress: whether to show it on the standard error stream.

    Returns:
        Every arm's loss, score, bytes and times; verdicts in words; printing gives a table.

    Raises:
        InvalidOptionError: an argument is not what it must be, the model is compiled already, or
            there are too few batches.
        NothingMatchedError: an arm compresses nothing; the message holds the table of reasons.
        MeasurementError: the exact loss is not finite, or nothing was compiled.
    """
    hint = f"The first {_COMPILING} are not timed, since they compile."
    steps = checks.integer("steps", steps, _LEAST_STEPS, hint)
    seed = checks.integer("seed", seed, 0, "It decides the control's order.", 2**31 - 1)
    backends = _by_name(backend)
    bar = Bar() if checks.flag("progress", progress, "It shows a bar.") else None
    show: Progress = bar or _silent
    inductor_settings(mode, options)
    check_model(model)
    torch.compiler.reset()
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(torch.compiler.reset)
        afterwards.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        afterwards.enter_context(undisturbed(model))
        # Dynamo keeps compiled code by function, and all arms share theirs.
        afterwards.enter_context(aot.recompile_limit(_CASES * (len(backends) + 1)))
        task = make_task(
            model,
            batches,
            steps=steps,
            loss=loss,
            held_out=held_out,
            score=score,
            optimizer=optimizer,
            lr=lr,
            clip=clip,
            dtype=dtype,
            seed=seed,
        )
        # A generator that yields within no_grad() leaves gradients off for whoever reads it.
        afterwards.enter_context(torch.enable_grad())
        runs = _runs(task, backends, {"mode": mode, "options": options})
        curve = train(runs, task, show)
        arms = tuple(_arm(run, runs[0], task, show) for run in runs)
        if task.held_out:
            curve[steps] = arms[0].loss
    if bar:
        bar.end()
    said = {
        "torch": torch.__version__,
        "device": str(task.device),
        "steps": steps,
        "dtype": dtype,
        "seed": seed,
        "lr": lr if optimizer is None else None,
        "clip": clip,
        "mode": mode,
        "backends": {name: str(each.options) for name, each in backends.items()},
    }
    return Trial(arms, Slope.of(list(curve), list(curve.values())), len(task.held_out), said)


def _by_name(given: Backend | Mapping[str, Backend] | None) -> dict[str, Backend]:
    """Return the backends to compare with exact training, by the names of their arms."""
    if given is None or isinstance(given, Backend):
        return {"compressed": given or make_backend()}
    hint = "Write for example backend=pamm_compile.backend(ratio=64)."
    allowed = "a backend of pamm_compile, or a mapping of names to such"
    if not isinstance(given, Mapping) or not given:
        raise checks.refusal("backend", given, allowed, hint)
    for name, each in given.items():
        if not isinstance(each, Backend):
            raise checks.refusal(f"backend[{name!r}]", each, "a backend of pamm_compile", hint)
        if not isinstance(name, str) or name in (EXACT, CONTROL):
            taken = f"{EXACT!r} and {CONTROL!r} are the names of exact arms."
            raise checks.refusal("a name of backend", name, "a text of its own", taken)
    if len({each.options.base for each in given.values()}) > 1:
        raise InvalidOptionError(
            "the backends have different bases, so their times cannot be compared. Give all the "
            "same base=."
        )
    return dict(given)


def _runs(task: Task, backends: Mapping[str, Backend], how: dict[str, Any]) -> list[Run]:
    """Return all arms, the exact one first."""
    given, other = orders(len(task.batches), task.seed)
    base = next(iter(backends.values())).options.base
    if base == "aot_eager":
        # It generates no code, and takes no settings for that.
        how = {}
    runs = [make_run(EXACT, base, task, given, how), make_run(CONTROL, base, task, other, how)]
    return runs + [make_run(name, each, task, given, how) for name, each in backends.items()]


def _arm(run: Run, exact: Run, task: Task, show: Progress) -> TrialArm:
    """Evaluate an arm that has been trained."""
    show(len(task.batches), len(task.batches), f"measuring {run.name}")
    loss = final_loss(run, task)
    with evaluating(run.model), torch.no_grad():
        score = task.score_of(run.model)
    run.optimizer.zero_grad()
    batch = task.there(task.batches[0])
    memory = measure_memory(lambda: task.loss_of(run.compiled, batch), model=run.model, warmup=0)
    turns = period(run.backend.options) if run.backend else 1
    later = _COMPILING + early(run.backend.options) - 1 if run.backend else 0
    mine, theirs = (_timed(each.seconds, later) for each in (run, exact))
    ratios = _ratios(mine, theirs, turns)
    return TrialArm(
        name=run.name,
        loss=loss,
        score=score,
        memory=memory,
        time=Quartiles.of(ratios),
        losses=tuple(run.losses),
        seconds=tuple(run.seconds),
        report=run.report,
    )


def _timed(seconds: Sequence[float], later: int) -> list[float]:
    """Return the times of steps that compile nothing.

    Args:
        seconds: of all steps.
        later: the step that compiles a second graph; one of the first if there is none.
    """
    behind = range(_COMPILING, len(seconds))
    kept = [step for step in behind if step != later]
    # Of one alone there are no quartiles.
    return [seconds[step] for step in (kept if len(kept) > 1 else behind)]


def _ratios(mine: Sequence[float], exact: Sequence[float], period: int) -> list[float]:
    """Return times by exact ones, of so many steps together where those differ by turns."""
    # Two at least: one alone says nothing of how much they scatter.
    count = min(period, len(mine) - 1)
    starts = range(len(mine) - count + 1)
    return [sum(mine[s : s + count]) / sum(exact[s : s + count]) for s in starts]


def _silent(done: int, steps: int, doing: str) -> None:
    """Show nothing."""
