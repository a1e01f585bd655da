"""Run examples/fsdp2.py with torchrun, tiny, on two processes of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = (
    "--layers", "1", "--hidden", "32", "--heads", "2", "--batch", "4", "--sequence", "64",
    "--steps", "4", "--lr", "0.01", "--ratio", "8", "--base", "aot_eager", "--device", "cpu",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--mixed-precision",), ("--tensor-parallel", "2", "--memory-budget", "0.99")],
    ids=["fsdp2", "sequence parallel"],
)
def test_fsdp2(options: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, EXAMPLE, *TINY, *options],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        },
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "1 of 1 sites compressed in 1 training graph(s)" in done.stdout
    rows = re.findall(r"^(exact|PAMM 8) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["exact", "PAMM 8"], done.stdout
    exact, pamm = ([float(cell) for cell in row[1:]] for row in rows)
    assert exact[0] == pamm[0], "PAMM leaves forward alone"
    assert exact[1] != pamm[1], "later steps have other gradients behind them"
    if "--tensor-parallel" in options:
        # The gathered input stays saved without PAMM, whatever the memory budget.
        assert pamm[2] < exact[2]


def test_without_torchrun() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, env=clean, check=False
    )
    assert done.returncode != 0
    assert "start this with torchrun" in done.stderr
    assert "Traceback" not in done.stderr
