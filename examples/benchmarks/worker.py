"""What runs in processes of its own: memory of one arm, times of all, losses of one seed."""

from __future__ import annotations

import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import pamm_compile
from examples.benchmarks import arms, compressed, corpus, full_size, models, peak, training
from examples.benchmarks.arms import Arm
from examples.benchmarks.models import Case
from examples.benchmarks.timing import in_turn, seconds
from pamm_compile.private import inductor
from pamm_compile.remembering import early

PEAKS = 3
WARMUP = 2
COMPILE_SHARE = 0.7
"""Of the time that is left; the rest is for the rounds."""
LEAST_ROUNDS = 3
_TRIAL_STEPS = 4
_VALIDATION_SHARE = 0.9


def set_up(case: Case) -> None:
    """Set threads, and let Dynamo keep the code of all arms of one function."""
    torch.set_num_threads(case.threads)
    torch._dynamo.config.recompile_limit = 8 * len(arms.EVERY_ARM)


def memory(case: Case, arm: Arm) -> dict[str, Any]:
    """Measure the bytes of one arm's step."""
    set_up(case)
    model, batch = models.make_model(case), models.make_batch(case)
    started = time.perf_counter()
    compiled, report = arms.compile_arm(arm, model, case)
    loss = arms.loss_function(compiled, batch, case)
    arms.train_step(loss, model)
    first_step = time.perf_counter() - started
    if wrong := compressed.wrong(arm, case, report):
        return {"error": wrong}
    used = pamm_compile.measure_memory(loss, model=model, warmup=0)
    # The first may still fill caches of the libraries.
    peaks = [peak.measure(lambda: arms.train_step(loss, model), case.device) for _ in range(PEAKS)]
    result = {
        "loss": loss().item(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "saved_bytes": used.saved_bytes,
        "allocator_peak_bytes": used.peak_bytes,
        "allocator_peak_source": used.peak_source,
        "peak_bytes": statistics.median(bytes_ for bytes_, _ in peaks),
        "peaks_bytes": [bytes_ for bytes_, _ in peaks],
        "peak_source": peaks[0][1],
        "first_step_s": first_step,
    }
    if arm.approximates:
        result["compressed_sites"] = len(report.compressed)
        result["inputs_bytes_before"] = report.bytes_before
        result["inputs_bytes_after"] = report.bytes_after
    return result


def device_bytes(measured: dict[str, Any]) -> int:
    """Return what a job that measures another arm of the same model may need of a device.

    Twice what this arm took, since eager and others take more, and what CUDA itself does.
    """
    return 2**30 + 2 * int(measured["peak_bytes"] + 4 * measured["parameters"])


def cold_compile(case: Case, arm: Arm) -> dict[str, Any]:
    """Time the first step of one arm with an empty cache; the process is to be a fresh one.

    Where a second graph comes with a later step, what it takes longer than the step behind it is
    added.
    """
    set_up(case)
    model, batch = models.make_model(case), models.make_batch(case)
    with tempfile.TemporaryDirectory() as cache, _timed_pass() as spent:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        loss = arms.loss_function(arms.compile_arm(arm, model, case)[0], batch, case)
        # The last but one compiles what the first did not; of an exact arm it is as the last.
        first, *_, second, last = [_clocks(loss, model) for _ in range(3 + _early(arm, case))]
        wall, cpu_seconds = (f + s - t for f, s, t in zip(first, second, last, strict=True))
        kernels = sum(1 for path in Path(cache).rglob("*") if path.suffix in (".cpp", ".cubin"))
    return {
        "seconds": wall,
        "cpu_seconds": cpu_seconds,
        "pass_seconds": sum(spent),
        "kernel_files": kernels,
    }


def _early(arm: Arm, case: Case) -> int:
    """Return how many steps an arm takes with its first graph beside the first step."""
    return early(arms.backend_of(arm, case).options) if arm.rules else 0


def _clocks(loss: Callable[[], Tensor], model: nn.Module) -> tuple[float, float]:
    """Return the seconds of a step by the wall clock, and of all cores together."""
    before, started = sum(os.times()[:4]), time.perf_counter()
    arms.train_step(loss, model)
    return time.perf_counter() - started, sum(os.times()[:4]) - before


def partition_time(case: Case, arm: Arm) -> dict[str, Any]:
    """Time tracing, our pass and partitioning of one arm, on fake tensors, nothing generated."""
    set_up(case)
    with full_size.fake_model(case) as (model, batch), _timed_pass() as spent:
        started = time.perf_counter()
        found = full_size.predict(arm, case, model, batch)
        wall = time.perf_counter() - started
    return {
        "seconds": wall,
        "pass_seconds": sum(spent),
        "compressed_sites": len(found.report.compressed),
    }


@contextmanager
def _timed_pass() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of every run of what we insert into Inductor."""
    spent: list[float] = []
    compile_fx = inductor.compile_fx

    def timed(*args: Any, **kwargs: Any) -> Any:
        settings = kwargs.get("config_patches") or {}
        ours = settings.get("joint_custom_pre_pass")
        if ours is None:
            return compile_fx(*args, **kwargs)
        call = type(ours).__call__

        def run(self: Any, graph: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(self, graph)
            finally:
                if self is ours:
                    spent.append(time.perf_counter() - start)

        with mock.patch.object(type(ours), "__call__", run):
            return compile_fx(*args, **kwargs)

    with mock.patch.object(inductor, "compile_fx", timed):
        yield spent


def step_times(
    case: Case, chosen: Sequence[Arm], rounds: int, deadline: float | None = None
) -> dict[str, Any]:
    """Time forward and backward of all arms in turn.

    Args:
        case: the model.
        chosen: the arms.
        rounds: how often each is timed.
        deadline: of `time.time`; rounds that would begin after it are left out, beyond the first
            few, and so are arms that are not compiled well before.
    """
    now = time.time()
    compiled_by = math.inf if deadline is None else now + COMPILE_SHARE * (deadline - now)
    set_up(case)
    model, batch = models.make_model(case), models.make_batch(case)
    device = torch.device(case.device)
    losses: dict[str, Callable[[], Tensor]] = {}
    skipped: dict[str, str] = {}
    for arm in chosen:
        if time.time() > compiled_by and losses:
            skipped[arm.name] = "no time left to compile it"
            continue
        compiled, report = arms.compile_arm(arm, model, case)
        loss = arms.loss_function(compiled, batch, case)
        try:
            for _ in range(WARMUP + _early(arm, case)):
                arms.train_step(loss, model)
        except torch.OutOfMemoryError as error:
            model.zero_grad(set_to_none=True)
            skipped[arm.name] = str(error).splitlines()[0]
            continue
        if wrong := compressed.wrong(arm, case, report):
            skipped[arm.name] = wrong
            continue
        losses[arm.name] = loss
    times: dict[str, list[float]] = {name: [] for name in losses}
    for round_ in range(rounds if losses else 0):
        if deadline is not None and time.time() > deadline and round_ >= LEAST_ROUNDS:
            break
        for name in in_turn(list(losses), round_):
            step = functools.partial(arms.train_step, losses[name], model)
            times[name].append(seconds(step, device))
    return {"seconds": times, "skipped": skipped}


def quality(
    case: Case, chosen: Sequence[Arm], steps: int, rate: float, seconds_left: float | None = None
) -> dict[str, Any]:
    """Train arms side by side, on the same data from the same weights, the exact one first.

    Args:
        case: the model.
        chosen: the arms.
        steps: how many; with `seconds_left`, at most.
        rate: peak learning rate.
        seconds_left: take as many steps as fit into so much time.

    Returns:
        By arm, losses and times.
    """
    set_up(case)
    started, text = time.perf_counter(), corpus.Text()

    def data(of: Tensor, seed: int) -> Any:
        sizes = (case.shape.family, case.batch, case.shape.sequence)
        return training.batches(of, *sizes, seed, case.device)

    runs, reports = [], []
    for arm in chosen:
        model = models.make_model(case)
        compiled, report = arms.compile_arm(arm, model, case)
        loss = functools.partial(_loss, compiled, case)
        runs.append(training.Run(arm.name, model, loss, training.optimizer_of(model, rate)))
        reports.append(report)
    if seconds_left is not None:
        took = _trial(runs, data(text.train, case.seed))
        _require(chosen, case, reports)
        left = _VALIDATION_SHARE * (seconds_left - (time.perf_counter() - started))
        steps = max(1, min(steps, int(left / took)))
    training.train_side_by_side(runs, data(text.train, case.seed), steps, rate)
    _require(chosen, case, reports)
    last = max(1, math.ceil(steps / 5))
    return {
        run.name: {
            "losses": run.losses,
            "train_loss": statistics.fmean(run.losses[-last:]),
            "validation_loss": training.validate(
                functools.partial(_loss, run.model, case), run.model, data(text.validation, 0), 4
            ),
            "seconds": run.seconds,
        }
        for run in runs
    }


def _require(chosen: Sequence[Arm], case: Case, reports: Sequence[pamm_compile.Report]) -> None:
    """End the process if an arm does not compress what it is named after."""
    for arm, report in zip(chosen, reports, strict=True):
        if wrong := compressed.wrong(arm, case, report):
            raise SystemExit(wrong)


def _trial(runs: Sequence[training.Run], batches: Iterator[training.Batch]) -> float:
    """Compile all arms; return the seconds of a step of all of them, and leave no trace of it."""
    for run in runs:
        # A rate of 0 leaves weights as they are; the optimizer's state is then thrown away.
        for _ in range(_TRIAL_STEPS):
            run.step(next(batches), 0.0)
        run.optimizer.state.clear()
    took = sum(min(run.seconds) for run in runs)
    for run in runs:
        run.losses.clear()
        run.seconds.clear()
    return took


def _loss(model: Callable[..., Any], case: Case, batch: dict[str, Tensor]) -> Tensor:
    with models.precision(case):
        result: Tensor = model(**batch).loss
    return result
