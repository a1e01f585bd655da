"""Everything that is worth measuring in a short time on a GPU, what matters most first.

    python examples/benchmarks/gpu_session.py --out docs/benchmarks/gpu       # 25 minutes at most
    python examples/benchmarks/gpu_session.py --minutes 10
    python examples/benchmarks/gpu_session.py --only kernels "steps 1b"
    python examples/benchmarks/gpu_session.py --dry-run               # a CPU, two minutes
    python examples/benchmarks/gpu_session.py --list                  # a CPU, what arms compress

Every part is a command of its own with a limit of its own, writes its results as they come, and is
ended when its time is up, with all that it started; what it has written by then stays. session.json
says after every part what became of it, with device, versions and commit. A part that fails costs
nothing but itself, and a part fails whose arms do not compress what they are named after.
predicted.md has the times of kernels and methods beside those that the model predicts.

With --dry-run the session lists what every arm compresses by the figures of an H100 that need not
be there. The same parts then run one after the other in this process, at toy sizes on the CPU, and
no code is generated: it shows that every command, option and file is right.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import cli, compressed, machine, method_times, tables
from examples.benchmarks.arms import by_name
from examples.benchmarks.models import WEIGHTS, Case
from examples.benchmarks.presets import PRESETS

MINUTES = 25.0
LEAST_SECONDS = 20.0
"""A part is not begun with less than this left."""
STEP_ARMS = (
    "compile", "gradients", "compile, CUDA graphs", "gradients, CUDA graphs", "Subspace",
    "Subspace, CUDA graphs", "gradients, rank 1/16", "recommended", "PAMM, Q, K, V",
    "compile, float8", "gradients, float8",
)  # fmt: skip
TRAINED_ARMS = ("gradients", "Subspace", "PAMM, Q, K, V")
LISTED_FOR = "h100"
"""The device whose figures a dry run decides by."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the session."""

    name: str
    seconds: float
    """Its limit."""
    module: str
    """A script of this folder, or "pytest"."""
    arguments: tuple[str, ...]
    toy: tuple[str, ...]
    """What to add or put in place for the dry run: later options win."""
    writes: str = ""
    """The file of its results in the session's folder."""
    arms: tuple[str, ...] = ()
    model: str = ""
    """That the arms are of."""


def plan(out: Path) -> list[Part]:
    """Return the parts in the order of their value."""

    def steps(model: str, seconds: float) -> Part:
        folder = out / f"steps-{model.removeprefix('llama-')}"
        return Part(
            f"steps {model.removeprefix('llama-')}",
            seconds,
            "steps",
            ("--models", model, "--quality-steps", "0", "--time-limit", f"{seconds - 15:g}",
             "--device", "cuda", "--preset", "gpu", "--dtype", WEIGHTS,
             "--arms", *STEP_ARMS, "--out", str(folder)),
            ("--preset", "ci", "--models", "llama-60m", "--rounds", "1", "--jobs", "0",
             "--base", "aot_eager", "--device", "cpu", "--dtype", "float32",
             "--arms", "gradients", "compile, CUDA graphs"),
            f"{folder.name}/benchmark.json",
            STEP_ARMS,
            model,
        )  # fmt: skip

    def kernels(name: str, seconds: float, *more: str) -> Part:
        path = out / f"{name.replace(' ', '-')}.json"
        common = ("--budget", f"{seconds - 20:g}", "--json", str(path), *more)
        return Part(name, seconds, "kernels", ("--device", "cuda", *common),
                    ("--device", "cpu", "--smoke"), path.name)  # fmt: skip

    def tests(name: str, seconds: float, chosen: str) -> Part:
        files = ("tests/methods/pamm/triton/test_gpu.py", "tests/test_models_on_gpu.py")
        arguments = ("-q", "-m", "gpu", "-k", chosen, *files)
        return Part(name, seconds, "pytest", arguments, ("--collect-only",))

    trained = "llama-60m"
    return [
        tests("correctness", 150, "not autotune"),
        Part(
            "methods", 180, "method_times",
            ("--device", "cuda", "--budget", "160", "--json", str(out / "methods.json")),
            ("--device", "cpu", "--smoke"), "methods.json",
        ),
        kernels("kernels", 120),
        steps("llama-1b", 330),
        steps("llama-350m", 270),
        Part(
            "training 60m", 210, "pretrain",
            ("--device", "cuda", "--model", trained, "--seconds", "190", "--arms", *TRAINED_ARMS,
             "--out", str(out / "training-60m.json")),
            ("--device", "cpu", "--dtype", "float32", "--base", "aot_eager", "--layers", "1",
             "--width", "64", "--batch", "2", "--seconds", "1", "--steps", "2"),
            "training-60m.json", TRAINED_ARMS, trained,
        ),
        tests("autotune", 120, "autotune"),
        kernels("kernels by tile", 120, "--tiles"),
    ]  # fmt: skip


def listing(parts: Sequence[Part]) -> tuple[list[str], list[str]]:
    """Return a table of what the arms of parts compress, and a sentence of each that is wrong.

    Layers are alike: one of each model, at its own sizes, by the figures of an H100.
    """
    rows, wrong = [], []
    for part in parts:
        if not part.arms:
            continue
        shape, batch = PRESETS["gpu"].models[part.model]
        case = Case(
            part.model, shape._replace(layers=1, vocabulary=257), batch=batch, dtype=WEIGHTS
        )
        for arm, what, sentence in compressed.predicted(
            case, [by_name(name) for name in part.arms], LISTED_FOR
        ):
            rows.append([part.name, arm.name, arm.rules.format(ratio=case.ratio), what])
            wrong += [f"{part.name}: {sentence}"] if sentence else []
    head = ["part", "arm", "rules", "compresses, in every layer, the inputs of"]
    return tables.markdown(head, rows, left=4), wrong


class Session:
    """Runs parts until the time is spent, and records what becomes of them.

    Args:
        out: folder of the results.
        seconds: all of them together.
        run: runs one part; returns its exit code, None if it was ended for its time.
        now: a clock.
        facts: about the machine.
    """

    def __init__(
        self,
        out: Path,
        seconds: float,
        run: Callable[[Part, float], int | None],
        now: Callable[[], float] = time.monotonic,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.out, self.run_part, self.now = out, run, now
        self.started = now()
        self.until = self.started + seconds
        self.record: dict[str, Any] = {"environment": facts or {}, "parts": {}}

    def run(self, parts: Sequence[Part]) -> None:
        """Run parts in order, each cut to the time that is left, none begun with too little."""
        for part in parts:
            limit = min(part.seconds, self.until - self.now())
            if limit < min(LEAST_SECONDS, part.seconds):
                self._note(part, "not begun: no time left", 0.0)
                continue
            begun = self.now()
            print(f"\n── {part.name}, at most {limit:.0f} s", flush=True)
            try:
                code = self.run_part(part, limit)
                outcome = {None: "ended for its time", 0: "done"}.get(code, f"exit code {code}")
            except Exception as error:  # noqa: BLE001  the parts that follow do not hang on it
                traceback.print_exc()
                outcome = f"{type(error).__name__}: {error}"
            self._note(part, outcome, self.now() - begun)

    def _note(self, part: Part, outcome: str, took: float) -> None:
        found = {"outcome": outcome, "seconds": round(took, 1)}
        if part.writes:
            found["results"] = part.writes if (self.out / part.writes).exists() else None
        self.record["parts"][part.name] = found
        self.record["seconds"] = round(self.now() - self.started, 1)
        (self.out / "session.json").write_text(json.dumps(self.record, indent=1) + "\n")
        print(f"── {part.name}: {outcome}, {took:.0f} s", flush=True)


def ended(command: Sequence[str], log: Path, limit: float) -> int | None:
    """Run a command, its output into a file; return its exit code, None if its time was up.

    Then all processes that it started are ended too: what they hold of a device, nobody else has.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=machine.CHECKOUT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Where all have ended there is no such group any more.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def in_a_process(out: Path) -> Callable[[Part, float], int | None]:
    """Return what runs a part as a command, its output in a file too."""

    def run(part: Part, limit: float) -> int | None:
        script = str(Path(__file__).with_name(f"{part.module}.py"))
        what = ["-m", "pytest"] if part.module == "pytest" else [script]
        log = out / f"{part.name.replace(' ', '-')}.log"
        code = ended([sys.executable, "-u", *what, *part.arguments], log, limit)
        print("\n".join(log.read_text().splitlines()[-30:]), flush=True)
        return code

    return run


def in_this_process(part: Part, limit: float) -> int:
    """Run a part at toy size; the tests are collected only."""
    arguments = [*part.arguments, *part.toy]
    if part.module == "pytest":
        command = [sys.executable, "-m", "pytest", *arguments]
        return subprocess.run(command, cwd=machine.CHECKOUT, check=False).returncode
    importlib.import_module(f"examples.benchmarks.{part.module}").main(arguments)
    return 0


def write_predicted(out: Path) -> None:
    """Write the table of measured beside predicted times, of what the session has measured."""
    record = out / "methods.json"
    if record.exists():
        (out / "predicted.md").write_text(method_times.markdown(json.loads(record.read_text())))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    names = [part.name for part in plan(Path())]
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all together (25)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true", help="of a dry run only what arms compress")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    out = args.out.resolve()
    chosen = [part for part in plan(out) if not args.only or part.name in args.only]
    if args.dry_run or args.list:
        lines, wrong = listing(chosen)
        print("\n".join(lines))
        if wrong:
            raise SystemExit("\n".join(wrong))
    if args.list:
        return
    out.mkdir(parents=True, exist_ok=True)
    if not args.dry_run:
        machine.require("cuda")
    facts = {"command": machine.command(), **machine.facts("cpu" if args.dry_run else "cuda")}
    cli.announce(facts)
    run = in_this_process if args.dry_run else in_a_process(out)
    session = Session(out, 60 * args.minutes, run, facts=facts)
    session.run(chosen)
    write_predicted(out)
    failed = [
        name
        for name, part in session.record["parts"].items()
        if part["outcome"] not in ("done", "ended for its time", "not begun: no time left")
    ]
    print(f"\n{session.record['seconds']:.0f} s; wrote {out}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
