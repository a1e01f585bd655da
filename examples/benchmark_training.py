"""Compare memory, time and loss of training steps: exact torch.compile's settings, and PAMM.

    python examples/benchmark_training.py                      # the preset for this machine
    python examples/benchmark_training.py --preset ci          # tiny, a minute or two
    python examples/benchmark_training.py --models gpt2 --layers 4 --batch 4
    python examples/benchmark_training.py --arms eager "compile + budget 0.99" PAMM
    python examples/benchmark_training.py --device cuda --time-limit 500
    python examples/benchmark_training.py --read runs/benchmark.json     # tables and plots anew

Arms: eager, compile, compile with a memory budget of 0.99, 0.8 and 0.5, with aggressive
recomputation, with every block checkpointed; PAMM, and PAMM with each of these budgets. Every arm's
memory is measured in a process of its own, the times of all arms in one, in turn. Writes
benchmark.json (after every step, so that a run that is stopped keeps what it has), benchmark.md,
and a picture of the memory–throughput frontier of every model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from benchmark import output, peak, worker
from benchmark.arms import ARMS, REFERENCE, Arm
from benchmark.presets import PRESETS, Preset
from benchmark.shapes import SHAPES, Case
from tqdm import tqdm

_MEMORY_SHARE = 0.6
_MODELS_SHARE = 0.8
_GRACE = 60.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu or cpu, by device")
    parser.add_argument("--models", nargs="+", choices=SHAPES, help="default: the preset's")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", choices=[arm.name for arm in ARMS],
        help=f"default: all; {REFERENCE!r} is always among them",
    )  # fmt: skip
    for field in ("layers", "batch", "sequence", "vocabulary"):
        parser.add_argument(f"--{field}", type=common.positive, help="default: the preset's")
    parser.add_argument("--device", default=common.default_device(), help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="bfloat16 is autocast (default: preset's)"
    )
    parser.add_argument("--ratio", type=float, help="tokens per generator (default: the preset's)")
    parser.add_argument("--rounds", type=common.positive, help="timed steps of every arm")
    parser.add_argument("--quality-models", nargs="*", choices=SHAPES, help="models to train")
    parser.add_argument("--quality-steps", type=int, help="training steps; 0 trains nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    parser.add_argument("--threads", type=common.positive, default=torch.get_num_threads())
    parser.add_argument("--jobs", type=common.positive, help="arms at once that measure memory")
    parser.add_argument("--time-limit", type=float, help="seconds to spend at most, about")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    parser.add_argument("--read", type=Path, help="measure nothing; write what this file holds")
    return parser.parse_args(arguments)


def resolve(args: argparse.Namespace) -> Preset:
    """Fill the options that were not given from the preset."""
    args.preset = args.preset or ("cpu" if args.device == "cpu" else "gpu")
    preset = PRESETS[args.preset]
    args.models = args.models or list(preset.models)
    defaults = {
        "dtype": preset.dtype,
        "ratio": preset.ratio,
        "rounds": preset.rounds,
        "quality_models": [name for name in preset.quality if name in args.models],
        "quality_steps": preset.quality_steps,
        "seeds": list(preset.seeds),
        "jobs": preset.jobs,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return preset


def make_case(name: str, preset: Preset, args: argparse.Namespace) -> Case:
    # A model that the preset has no sizes for is cut to one layer.
    shape, batch = preset.models.get(name, (SHAPES[name]._replace(layers=1), 4))
    given = {field: getattr(args, field) for field in ("layers", "sequence", "vocabulary")}
    return Case(
        model=name,
        shape=shape._replace(**{field: value for field, value in given.items() if value}),
        batch=args.batch or batch,
        device=args.device,
        dtype=args.dtype,
        ratio=args.ratio,
        min_tokens=preset.min_tokens,
        threads=args.threads,
    )


class Processes:
    """Starts jobs in processes of their own."""

    def __init__(self, jobs: int) -> None:
        cores = os.cpu_count() or 1
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // jobs)))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *_python_path()])
        methods = multiprocessing.get_all_start_methods()
        # Processes forked from one that has imported everything start at once. That one is started
        # here, with malloc's settings, so that they have them, and those that are spawned have not.
        self._forked = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        self._spawned = multiprocessing.get_context("spawn")
        if "forkserver" in methods:
            self._forked.set_forkserver_preload(["benchmark.worker"])
            with _environment(peak.MALLOC):
                from multiprocessing.forkserver import ensure_running

                ensure_running()

    def run(
        self, job: Callable[..., dict[str, Any]], *arguments: Any, timeout: float | None = None
    ) -> dict[str, Any]:
        """Return what a job returns; if it fails, its error."""
        context = self._forked if job is worker.memory else self._spawned
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "result.json")
            process = context.Process(target=worker.entry, args=(path, job, *arguments))
            process.start()
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
                return {"error": "no time left"}
            if process.exitcode:
                return {"error": f"failed with exit code {process.exitcode}"}
            result: dict[str, Any] = json.loads(Path(path).read_text())
            return result


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Benchmark:
    """One run of the program, and the record that it leaves."""

    def __init__(self, args: argparse.Namespace, preset: Preset) -> None:
        self.args = args
        self.started = time.time()
        names = {REFERENCE, *(args.arms or [arm.name for arm in ARMS])}
        self.arms = [arm for arm in ARMS if arm.name in names]
        facts: dict[str, Any] = {**common.environment(args), "commit": common.commit()}
        facts["machine"] = f"{common.processor()}, {args.threads} threads"
        options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
        self.record: dict[str, Any] = {
            "command": shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "environment": facts,
            "options": options,
            "arms": [arm.name for arm in self.arms],
            "models": {},
            "left_out": [n for n in preset.left_out if n not in args.models],
            "skipped": [],
        }
        self.processes = Processes(args.jobs)

    def deadline(self, share: float = 1.0) -> float | None:
        """Return when a share of the time limit is spent."""
        limit = self.args.time_limit
        return None if limit is None else self.started + share * limit

    def save(self) -> None:
        """Write the record as it is now."""
        self.record["seconds"] = time.time() - self.started
        path = self.args.out / "benchmark.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.record, indent=1) + "\n")
        unfinished.replace(path)

    def measure(self, case: Case, until: float | None) -> None:
        """Measure memory and times of all arms on one model."""
        model: dict[str, Any] = {
            "case": dataclasses.asdict(case),
            "shape": case.shape._asdict(),
            "tokens": case.tokens,
            "generators": case.generators,
            "cuts": case.cuts(),
            "arms": {arm.name: {} for arm in self.arms},
        }
        self.record["models"][case.model] = model
        print(f"\n{case.cuts()}", flush=True)
        now = time.time()
        half = None if until is None else now + _MEMORY_SHARE * (until - now)
        self._memory(case, model, half)
        result = self.processes.run(
            worker.times, case, self.arms, self.args.rounds, until, timeout=_left(until, _GRACE)
        )
        for name, reason in result.get("skipped", {}).items():
            model["arms"][name]["not_timed"] = reason
        for arm in model["arms"].values():
            if "error" in result:
                arm["not_timed"] = result["error"]
        for name, seconds in result.get("seconds", {}).items():
            model["arms"][name]["times_s"] = seconds
        output.conclude(model)
        self.save()
        print("\n".join(output.model_table(model)))
        for metric in output.METRICS:
            print(f"by {metric} memory and time:")
            print("\n".join(f"  {sentence}" for sentence in output.sentences(model, metric)))
        if "pareto" in model:
            output.plot(model, self.args.out / f"frontier-{case.model}.png")

    def _memory(self, case: Case, model: dict[str, Any], until: float | None) -> None:
        def job(arm: Arm) -> dict[str, Any]:
            if until is not None and time.time() > until:
                return {"error": "no time left"}
            return self.processes.run(worker.memory, case, arm, timeout=_left(until))

        with (
            concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool,
            tqdm(total=len(self.arms), unit="arm", desc="memory", dynamic_ncols=True) as bar,
        ):
            futures = {pool.submit(job, arm): arm for arm in self.arms}
            for future in concurrent.futures.as_completed(futures):
                model["arms"][futures[future].name].update(future.result())
                self.save()
                bar.update()

    def train(self, case: Case) -> None:
        """Train one model with several seeds."""
        model = self.record["models"][case.model]
        model["quality"] = {}
        for seed in self.args.seeds:
            what = f"training {case.model}, seed {seed}"
            left = _left(self.deadline())
            if left is not None and left < _GRACE / 2:
                self.record["skipped"].append(what)
                continue
            result = self.processes.run(
                worker.quality,
                dataclasses.replace(case, seed=seed),
                [case.ratio],
                self.args.quality_steps,
                self.args.lr,
                timeout=left,
            )
            if "error" in result:
                self.record["skipped"].append(f"{what} ({result['error']})")
            else:
                model["quality"][str(seed)] = result
            self.save()
        if model["quality"]:
            model["quality_summary"] = output.summarize_quality(model["quality"])
            print("\n".join(output.quality_table(model["quality"])))


def _left(deadline: float | None, grace: float = 0.0) -> float | None:
    return None if deadline is None else max(1.0, deadline - time.time() + grace)


def write_again(path: Path) -> None:
    """Write tables and plots of a record beside it."""
    record = json.loads(path.read_text())
    for name, model in record["models"].items():
        output.conclude(model)
        output.plot(model, path.with_name(f"frontier-{name}.png"))
    path.with_name("benchmark.md").write_text(output.markdown(record))


def main() -> None:
    args = parse()
    if args.read:
        write_again(args.read)
        return
    preset = resolve(args)
    args.out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(args, preset)
    for name, fact in benchmark.record["environment"].items():
        print(f"{name:13} {fact}")
    cases = [make_case(name, preset, args) for name in args.models]
    end = benchmark.deadline(_MODELS_SHARE if args.quality_steps else 1.0)
    for number, case in enumerate(cases):
        now, waiting = time.time(), len(cases) - number
        benchmark.measure(case, None if end is None else now + max(0.0, end - now) / waiting)
    for case in cases:
        if case.model in args.quality_models and args.quality_steps:
            benchmark.train(case)
    benchmark.save()
    (args.out / "benchmark.md").write_text(output.markdown(benchmark.record))
    print(f"\n{benchmark.record['seconds']:.0f} s; wrote {args.out}/benchmark.json, .md and plots")


if __name__ == "__main__":
    common.run(main)
