"""What runs in processes of its own: memory of one arm, times of all, losses of one seed."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pamm_compile
from examples.benchmarks import arms, corpus, models, peak, training
from examples.benchmarks.arms import Arm
from examples.benchmarks.models import Case
from examples.benchmarks.timing import in_turn, seconds

PEAKS = 3
WARMUP = 2
COMPILE_SHARE = 0.7
"""Of the time that is left; the rest is for the rounds."""
LEAST_ROUNDS = 3


def set_up(case: Case) -> None:
    """Set threads, and let Dynamo keep the code of all arms of one function."""
    torch.set_num_threads(case.threads)
    torch._dynamo.config.recompile_limit = 8 * len(arms.ARMS)


def memory(case: Case, arm: Arm) -> dict[str, Any]:
    """Measure the bytes of one arm's step."""
    set_up(case)
    model, batch = models.make_model(case), models.make_batch(case)
    started = time.perf_counter()
    if arm.pamm:
        arms.pamm_backend(case).report.clear()
    loss = arms.loss_function(arms.compile_arm(arm, model, case), batch, case)
    arms.train_step(loss, model)
    first_step = time.perf_counter() - started
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
    if arm.pamm:
        report = arms.pamm_backend(case).report
        if not report.compressed:
            raise SystemExit(f"{case.cuts()}: nothing is compressed.\n{report}")
        result["compressed_sites"] = len(report.compressed)
        result["qkv_bytes_before"] = report.bytes_before
        result["qkv_bytes_after"] = report.bytes_after
    return result


def device_bytes(measured: dict[str, Any]) -> int:
    """Return what a job that measures another arm of the same model may need of a device.

    Twice what this arm took, since eager and others take more, and what CUDA itself does.
    """
    return 2**30 + 2 * int(measured["peak_bytes"] + 4 * measured["parameters"])


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
        loss = arms.loss_function(arms.compile_arm(arm, model, case), batch, case)
        try:
            for _ in range(WARMUP):
                arms.train_step(loss, model)
        except torch.OutOfMemoryError as error:
            model.zero_grad(set_to_none=True)
            skipped[arm.name] = str(error).splitlines()[0]
            continue
        losses[arm.name] = loss
    times: dict[str, list[float]] = {name: [] for name in losses}
    for round_ in range(rounds):
        if deadline is not None and time.time() > deadline and round_ >= LEAST_ROUNDS:
            break
        for name in in_turn(list(losses), round_):
            step = functools.partial(arms.train_step, losses[name], model)
            times[name].append(seconds(step, device))
    return {"seconds": times, "skipped": skipped}


def quality(case: Case, ratios: Sequence[float], steps: int, rate: float) -> dict[str, Any]:
    """Train with exact torch.compile and with PAMM, on the same data from the same weights."""
    set_up(case)
    text = corpus.Text()

    def data(of: Tensor, seed: int) -> Any:
        sizes = (case.shape.family, case.batch, case.shape.sequence)
        return training.batches(of, *sizes, seed, case.device)

    chosen: list[tuple[str, Any]] = [(arms.REFERENCE, case.base)]
    for ratio in ratios:
        backend = arms.pamm_backend(dataclasses.replace(case, ratio=ratio))
        chosen.append((f"PAMM, ratio {ratio:g}", backend))
    runs = []
    for name, backend in chosen:
        model = models.make_model(case)
        compiled = torch.compile(model, backend=backend, dynamic=False)
        loss = functools.partial(_loss, compiled, case)
        runs.append(training.Run(name, model, loss, training.optimizer_of(model, rate)))
    training.train_side_by_side(runs, data(text.train, case.seed), steps, rate)
    last = max(1, math.ceil(steps / 5))
    return {
        run.name: {
            "losses": run.losses,
            "train_loss": statistics.fmean(run.losses[-last:]),
            "validation_loss": training.validate(run.model, data(text.validation, 0), 4),
            "seconds": run.seconds,
        }
        for run in runs
    }


def _loss(model: Callable[..., Any], case: Case, batch: dict[str, Tensor]) -> Tensor:
    with models.precision(case):
        result: Tensor = model(**batch).loss
    return result
