"""Everything that is worth measuring in a short time on a GPU, what matters most first.

    python examples/benchmarks/gpu_session.py --out docs/benchmarks/gpu       # 25 minutes at most
    python examples/benchmarks/gpu_session.py --minutes 10
    python examples/benchmarks/gpu_session.py --only kernels "steps 1b"
    python examples/benchmarks/gpu_session.py --dry-run                   # a CPU, under a minute

Every part is a command of its own with a limit of its own, writes its results as they come, and is
ended when its time is up; what it has written by then stays. session.json says after every part
what became of it, with device, versions and commit. A part that fails costs nothing but itself.

With --dry-run the same parts run one after the other in this process, at toy sizes on the CPU, and
no code is generated: it shows that every command, option and file is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
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

from examples.benchmarks import cli, machine

MINUTES = 25.0
LEAST_SECONDS = 20.0
"""A part is not begun with less than this left."""
MAIN_ARMS = ("compile", "PAMM", "whole model")


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


def plan(out: Path) -> list[Part]:
    """Return the parts in the order of their value."""

    def steps(model: str, seconds: float, *arms: str, name: str = "steps", tried: int = 1) -> Part:
        folder = out / f"{name}-{model.removeprefix('llama-')}"
        common = ("--models", model, "--quality-steps", "0", "--time-limit", f"{seconds - 15:g}")
        toy = ("--preset", "ci", "--models", "llama-60m", "--rounds", "1", "--jobs", "0",
               "--base", "aot_eager", "--device", "cpu", "--dtype", "float32",
               "--arms", *arms[:tried])  # fmt: skip
        return Part(
            f"{name} {model.removeprefix('llama-')}",
            seconds,
            "steps",
            (*common, "--device", "cuda", "--preset", "gpu", "--dtype", "bfloat16-weights",
             "--arms", *arms, "--out", str(folder)),
            toy,
            f"{folder.name}/benchmark.json",
        )  # fmt: skip

    def kernels(name: str, seconds: float, *more: str) -> Part:
        path = out / f"{name.replace(' ', '-')}.json"
        common = ("--budget", f"{seconds - 20:g}", "--json", str(path), *more)
        return Part(name, seconds, "kernels", ("--device", "cuda", *common),
                    ("--device", "cpu", "--smoke"), path.name)  # fmt: skip

    tests = ("tests/methods/pamm/triton/test_gpu.py", "tests/test_models_on_gpu.py")
    frontier = ("compile", "PAMM", "whole model", "compile + budget 0.99", "PAMM + budget 0.99",
                "whole model + budget 0.99", "compile + budget 0.5", "PAMM + budget 0.5",
                "whole model + budget 0.5", "compile + checkpointing", "eager")  # fmt: skip
    return [
        Part("tests", 180, "pytest", ("-q", "-m", "gpu", *tests), ("--collect-only",)),
        kernels("kernels", 150),
        steps("llama-60m", 100, *MAIN_ARMS, tried=2),
        steps("llama-1b", 170, *MAIN_ARMS),
        kernels("kernels by tile", 180, "--tiles"),
        steps("llama-350m", 150, *MAIN_ARMS),
        steps("llama-60m", 240, *frontier, name="frontier"),
        Part(
            "training 60m", 300, "pretrain",
            ("--device", "cuda", "--seconds", "280", "--out", str(out / "training-60m.json")),
            ("--device", "cpu", "--dtype", "float32", "--base", "aot_eager", "--layers", "1",
             "--width", "64", "--batch", "2", "--seconds", "1", "--steps", "2",
             "--rules", "qkv=pamm:64"),
            "training-60m.json",
        ),
    ]  # fmt: skip


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


def in_a_process(out: Path) -> Callable[[Part, float], int | None]:
    """Return what runs a part as a command, its output in a file too."""

    def run(part: Part, limit: float) -> int | None:
        script = str(Path(__file__).with_name(f"{part.module}.py"))
        what = ["-m", "pytest"] if part.module == "pytest" else [script]
        log = out / f"{part.name.replace(' ', '-')}.log"
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    [sys.executable, "-u", *what, *part.arguments],
                    cwd=machine.CHECKOUT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                )
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = None
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    names = [part.name for part in plan(Path())]
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all together (25)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not args.dry_run:
        machine.require("cuda")
    facts = {"command": machine.command(), **machine.facts("cpu" if args.dry_run else "cuda")}
    cli.announce(facts)
    run = in_this_process if args.dry_run else in_a_process(out)
    session = Session(out, 60 * args.minutes, run, facts=facts)
    session.run([part for part in plan(out) if not args.only or part.name in args.only])
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
