"""What runs in processes of its own: memory of one arm, times of all, losses of one seed."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import corpus
import torch
import train
from torch import Tensor

import pamm_compile
from benchmark import arms, peak, shapes
from benchmark.arms import Arm
from benchmark.shapes import Case

PEAKS = 3
WARMUP = 2
COMPILE_SHARE = 0.7
"""Of the time that is left; the rest is for the rounds."""
LEAST_ROUNDS = 3


def entry(path: str, job: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Run a job in a process of its own, and leave what it returns in a file."""
    case = arguments[0]
    torch.set_num_threads(case.threads)
    # Every arm compiles the same functions, and Dynamo counts the results per function.
    torch._dynamo.config.recompile_limit = 8 * len(arms.ARMS)
    Path(path).write_text(json.dumps(job(*arguments)))


def memory(case: Case, arm: Arm) -> dict[str, Any]:
    """Measure the bytes of one arm's step."""
    model, batch = shapes.make_model(case), shapes.make_batch(case)
    started = time.perf_counter()
    if arm.pamm:
        arms.pamm_backend(case).report.clear()
    loss = arms.loss_function(arms.compile_arm(arm, model, case), batch, case)
    arms.train_step(loss, model)
    seconds = time.perf_counter() - started
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
        "first_step_s": seconds,
    }
    if arm.pamm:
        report = arms.pamm_backend(case).report
        if not report.compressed:
            raise SystemExit(f"{case.cuts()}: nothing is compressed.\n{report}")
        result["compressed_sites"] = len(report.compressed)
        result["qkv_bytes_before"] = report.bytes_before
        result["qkv_bytes_after"] = report.bytes_after
    return result


def times(
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
    model, batch = shapes.make_model(case), shapes.make_batch(case)
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
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    names = list(losses)
    for round_ in range(rounds):
        if deadline is not None and time.time() > deadline and round_ >= LEAST_ROUNDS:
            break
        # Whoever comes after another arm finds other caches than whoever comes before it.
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            common.synchronize(device)
            start = time.perf_counter()
            arms.train_step(losses[name], model)
            common.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "skipped": skipped}


def quality(case: Case, ratios: Sequence[float], steps: int, rate: float) -> dict[str, Any]:
    """Train with exact torch.compile and with PAMM, on the same data from the same weights."""
    device, text = torch.device(case.device), corpus.Text()
    options = argparse.Namespace(
        model=case.shape.family,
        batch=case.batch,
        sequence=case.shape.sequence,
        device=case.device,
        dtype=case.dtype,
        seed=case.seed,
        steps=steps,
        lr=rate,
        validation_batches=4,
    )
    chosen: list[tuple[str, Any]] = [(arms.REFERENCE, "inductor")]
    for ratio in ratios:
        backend = pamm_compile.backend(ratio=ratio, min_tokens=case.min_tokens)
        chosen.append((f"PAMM, ratio {ratio:g}", backend))
    runs = []
    for name, backend in chosen:
        model = shapes.make_model(case)
        compiled = torch.compile(model, backend=backend, dynamic=False)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        runs.append(train.Run(name, model, compiled, optimizer))
    train.train(runs, text, options)
    common.synchronize(device)
    last = max(1, math.ceil(steps / 5))
    return {
        run.name: {
            "losses": run.losses,
            "train_loss": statistics.fmean(run.losses[-last:]),
            "validation_loss": train.validate(run, text, options),
            "seconds": run.times,
        }
        for run in runs
    }
