"""Run a function in several processes that form one process group, and report who fails.

    launch("ddp_checks:main", "fsdp_checks:main", ranks=2)

starts `python ranks.py gloo ddp_checks:main fsdp_checks:main` once per rank, with the environment
that torchrun sets and a rendezvous through a file, so that no port is guessed. The first rank that
fails ends the others after a few seconds, and the tracebacks are the message of the error: a rank
that waits in a collective for a dead one would else hide the cause until the timeout.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
_RENDEZVOUS = "PAMM_TEST_RENDEZVOUS"
_STARTED = "PAMM_TEST_STARTED"
_TIMEOUT = "PAMM_TEST_TIMEOUT"
_POLL_SECONDS = 0.05
_START_SECONDS = 300
"""To import torch and to meet, on a machine that has other things to do."""
_GRACE_SECONDS = 3
_TAIL = 6000


class RankFailedError(Exception):
    """A rank ended with an error, or none ended in time."""


def launch(
    *targets: str,
    ranks: int,
    timeout: float = 900,
    backend: str = "gloo",
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run "module:function" of this folder on every rank.

    Args:
        targets: what to run, one after the other in the same processes, since starting them costs
            more than many a check; each finds the process group initialised and Dynamo reset.
        ranks: how many processes.
        timeout: seconds after all have started at which all of them are ended.
        backend: of the process group.
        environment: further variables.

    Returns:
        What each rank printed.

    Raises:
        RankFailedError: with the tracebacks of the ranks that failed, or where all of them were
            when the time was up.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        processes = []
        for rank in range(ranks):
            out = stack.enter_context(open(scratch / f"{rank}.out", "w"))
            err = stack.enter_context(open(scratch / f"{rank}.err", "w"))
            process = subprocess.Popen(
                [sys.executable, __file__, backend, *targets],
                stdout=out,
                stderr=err,
                env={
                    **os.environ,
                    **_variables(rank, ranks, scratch, timeout),
                    **(environment or {}),
                },
            )
            processes.append(process)
        try:
            _wait(processes, scratch, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [(scratch / f"{rank}.out").read_text() for rank in range(ranks)]


def _variables(rank: int, ranks: int, scratch: Path, timeout: float) -> dict[str, str]:
    path = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        _RENDEZVOUS: f"file://{scratch / 'store'}",
        _STARTED: str(scratch / f"{rank}.started"),
        _TIMEOUT: str(timeout),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / f"cache{rank}"),
    }


def _wait(processes: list[subprocess.Popen[bytes]], scratch: Path, timeout: float) -> None:
    deadline = time.monotonic() + _START_SECONDS
    starting = True
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            # Ranks that lose their peer fail too, and sometimes before the culprit has ended.
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            while time.monotonic() < deadline and None in [p.poll() for p in processes]:
                time.sleep(_POLL_SECONDS)
            break
        if starting and all((scratch / f"{r}.started").exists() for r in range(len(processes))):
            starting = False
            deadline = time.monotonic() + timeout
        if time.monotonic() > deadline:
            tails = [f"rank {r}:\n{_tail(scratch, r)}" for r in range(len(processes))]
            what = "not all started" if starting else "still running"
            waited = _START_SECONDS if starting else timeout
            raise RankFailedError(f"{what} after {waited:g} s\n" + "\n".join(tails))
        time.sleep(_POLL_SECONDS)
    failed = {r: p.poll() for r, p in enumerate(processes) if p.poll()}
    if failed:
        reports = [f"rank {r} ended with {code}\n{_tail(scratch, r)}" for r, code in failed.items()]
        raise RankFailedError("\n".join(reports))


def _tail(scratch: Path, rank: int) -> str:
    return (scratch / f"{rank}.err").read_text()[-_TAIL:]


def _run(backend: str, *targets: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        backend,
        init_method=os.environ[_RENDEZVOUS],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=60),
    )
    Path(os.environ[_STARTED]).touch()
    # Where each rank waits, should the launcher end it for its time.
    faulthandler.dump_traceback_later(0.8 * float(os.environ[_TIMEOUT]))
    for target in targets:
        module, function = target.split(":")
        getattr(importlib.import_module(f"pamm_testing.distributed.{module}"), function)()
        torch._dynamo.reset()
    # Not in a finally: after an error the others may be waiting in a collective for ever.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(*sys.argv[1:])
