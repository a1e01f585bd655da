"""Jobs in processes of their own: another's memory and compiled code are not in them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks import peak
from examples.benchmarks.machine import CHECKOUT

Job = Callable[..., dict[str, Any]]
_PRELOADED = "examples.benchmarks.worker"


class Processes:
    """Starts jobs that measure memory, and jobs that measure anything else.

    Processes forked from one that has imported everything start at once; but what has touched an
    accelerator cannot be forked, and importing torch with one may touch it. Off the CPU all are
    spawned.

    Args:
        device: where the jobs run.
        jobs: how many run at once at most; they share the cores for compiling.
        inline: run them in this process one after the other: to see that they run, not to measure.
    """

    def __init__(self, device: str, jobs: int, *, inline: bool = False) -> None:
        self.inline = inline
        cores = os.cpu_count() or 1
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // jobs)))
        self._spawned: BaseContext = multiprocessing.get_context("spawn")
        self._for_memory = self._spawned
        self.method = "spawn"
        available = "forkserver" in multiprocessing.get_all_start_methods()
        if torch.device(device).type == "cpu" and available and not inline:
            self.method = "forkserver"
            self._for_memory = multiprocessing.get_context("forkserver")
            self._for_memory.set_forkserver_preload([_PRELOADED])
            # Started here, with malloc's settings, so that its children have them, and those that
            # are spawned have not.
            # Python before 3.13.1 does not hand it sys.path, and says nothing if preloading fails.
            path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
            with _environment({**peak.MALLOC, "PYTHONPATH": path}):
                from multiprocessing.forkserver import ensure_running

                ensure_running()

    def measure_memory(
        self, job: Job, *arguments: Any, timeout: float | None = None
    ) -> dict[str, Any]:
        """Run a job where freed memory is given back at once; else as `run`."""
        if self.inline:
            return job(*arguments)
        return _run(self._for_memory, job, arguments, timeout)

    def run(self, job: Job, *arguments: Any, timeout: float | None = None) -> dict[str, Any]:
        """Return what a job returns; if it fails, its error."""
        if self.inline:
            return job(*arguments)
        return _run(self._spawned, job, arguments, timeout)


def _run(
    context: BaseContext, job: Job, arguments: tuple[Any, ...], timeout: float | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "result.json")
        process = context.Process(target=_entry, args=(path, job, *arguments))  # type: ignore[attr-defined]
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


def _entry(path: str, job: Job, *arguments: Any) -> None:
    Path(path).write_text(json.dumps(job(*arguments)))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def jobs_that_fit(device: str, bytes_each: int, wanted: int) -> int:
    """Return how many jobs may share a device's memory, at least 1.

    Args:
        device: where they run; a CPU takes as many as are wanted.
        bytes_each: what one is expected to need at its peak.
        wanted: how many at most.
    """
    if torch.device(device).type == "cpu":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(wanted, free // bytes_each))
