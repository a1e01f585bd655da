"""Compare memory, time and loss of training steps: exact torch.compile's settings, and PAMM.

    python examples/benchmarks/steps.py                      # the preset for this machine
    python examples/benchmarks/steps.py --preset ci          # tiny, a minute or two
    python examples/benchmarks/steps.py --models gpt2 --layers 4 --batch 4
    python examples/benchmarks/steps.py --arms eager "compile + budget 0.99" PAMM
    python examples/benchmarks/steps.py --device cuda --time-limit 500
    python examples/benchmarks/steps.py --read runs/benchmark.json     # tables and plots anew

Arms: eager, compile, compile with a memory budget of 0.99, 0.8 and 0.5, with aggressive
recomputation, with every block checkpointed; PAMM, and PAMM with each of these budgets. Every arm's
memory is measured in a process of its own, the times of all arms in one, in turn. Writes
benchmark.json (after every step, so that a run that is stopped keeps what it has), benchmark.md,
and a picture of the memory–throughput frontier of every model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from examples.benchmarks import cli, compressed, machine, output, worker
from examples.benchmarks.arms import ARMS, EVERY_ARM, REFERENCE, Arm
from examples.benchmarks.models import DTYPES, SHAPES, Case
from examples.benchmarks.presets import PRESETS, Preset
from examples.benchmarks.processes import Processes, jobs_that_fit

_MEMORY_SHARE = 0.6
_MODELS_SHARE = 0.8
_GRACE = 60.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu or cpu, by device")
    parser.add_argument("--models", nargs="+", choices=SHAPES, help="default: the preset's")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", choices=[arm.name for arm in EVERY_ARM],
        help=f"default: all but a GPU session's; {REFERENCE!r} is always among them",
    )  # fmt: skip
    for field in ("layers", "batch", "sequence", "vocabulary"):
        parser.add_argument(f"--{field}", type=cli.positive, help="default: the preset's")
    parser.add_argument("--device", default=machine.default_device(), help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="bfloat16 is autocast (default: the preset's)"
    )
    parser.add_argument(
        "--base", choices=("inductor", "aot_eager"), default="inductor",
        help="aot_eager generates no code: to see that this runs",
    )  # fmt: skip
    parser.add_argument("--ratio", type=float, help="tokens per generator (default: the preset's)")
    parser.add_argument("--rounds", type=cli.positive, help="timed steps of every arm")
    parser.add_argument("--quality-models", nargs="*", choices=SHAPES, help="models to train")
    parser.add_argument("--quality-steps", type=int, help="training steps; 0 trains nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    parser.add_argument("--threads", type=cli.positive, default=torch.get_num_threads())
    parser.add_argument(
        "--jobs", type=int, help="arms at once that measure memory; 0: all in this process, to try"
    )
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
        base=args.base,
    )


class Benchmark:
    """One run of the program, and the record that it leaves."""

    def __init__(self, args: argparse.Namespace, preset: Preset) -> None:
        self.args = args
        self.started = time.time()
        names = {REFERENCE, *(args.arms or [arm.name for arm in ARMS])}
        self.arms = [arm for arm in EVERY_ARM if arm.name in names]
        self.record: dict[str, Any] = {
            "command": machine.command(),
            "environment": machine.facts(args.device, args.threads),
            "options": cli.options(args),
            "arms": [arm.name for arm in self.arms],
            "models": {},
            "left_out": [n for n in preset.left_out if n not in args.models],
            "skipped": [],
        }
        self.processes = Processes(args.device, max(1, args.jobs), inline=args.jobs == 0)

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
            worker.step_times,
            case,
            self.arms,
            self.args.rounds,
            until,
            timeout=_left(until, _GRACE),
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
            return self.processes.measure_memory(worker.memory, case, arm, timeout=_left(until))

        with tqdm(total=len(self.arms), unit="arm", desc="memory", dynamic_ncols=True) as bar:

            def done(arm: Arm, result: dict[str, Any]) -> None:
                model["arms"][arm.name].update(result)
                self.save()
                bar.update()

            # By itself, to know how many more of these a device holds at once.
            first, *rest = self.arms
            result = job(first)
            done(first, result)
            jobs = max(1, self.args.jobs)
            if "peak_bytes" in result:
                jobs = jobs_that_fit(case.device, worker.device_bytes(result), jobs)
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                futures = {pool.submit(job, arm): arm for arm in rest}
                for future in concurrent.futures.as_completed(futures):
                    done(futures[future], future.result())

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
                [each for each in self.arms if each.name == REFERENCE or _trains(each)],
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


def _trains(arm: Arm) -> bool:
    """Whether an arm may end at another loss: of arms that differ in their budget one is enough."""
    return arm.approximates and arm.budget == 1


def _left(deadline: float | None, grace: float = 0.0) -> float | None:
    return None if deadline is None else max(1.0, deadline - time.time() + grace)


def not_as_named(record: dict[str, Any]) -> list[str]:
    """Return what arms compressed something else than what they are named after."""
    arms = (arm for model in record["models"].values() for arm in model["arms"].values())
    said = (str(arm.get(key, "")) for arm in arms for key in ("error", "not_timed"))
    return list(dict.fromkeys(each for each in said if each.startswith(compressed.WRONG)))


def write_again(path: Path) -> None:
    """Write tables and plots of a record beside it."""
    record = json.loads(path.read_text())
    for name, model in record["models"].items():
        output.conclude(model)
        output.plot(model, path.with_name(f"frontier-{name}.png"))
    path.with_name("benchmark.md").write_text(output.markdown(record))


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.read:
        write_again(args.read)
        return
    preset = resolve(args)
    args.out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(args, preset)
    cli.announce(benchmark.record["environment"])
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
    if wrong := not_as_named(benchmark.record):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    cli.run(main)
