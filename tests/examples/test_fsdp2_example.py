"""Run examples/fsdp2.py with torchrun, tiny, on two processes of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pamm_testing.programs import assert_explained, run, start

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = (
    "--layers", "1", "--hidden", "32", "--heads", "2", "--batch", "4", "--sequence", "64",
    "--steps", "4", "--lr", "0.01", "--ratio", "64", "--device", "cpu",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--base", "aot_eager"),
        pytest.param((), marks=pytest.mark.everything),
        pytest.param(
            (
                "--mixed-precision",
                "--tensor-parallel",
                "2",
                "--memory-budget",
                "0.99",
                "--base",
                "aot_eager",
            ),
            marks=pytest.mark.everything,
        ),
    ],
    ids=["fsdp2", "generated code", "sequence parallel"],
)
def test_fsdp2(options: tuple[str, ...], tmp_path: Path) -> None:
    printed = run(
        "fsdp2.py",
        *TINY,
        *options,
        launcher=TORCHRUN,
        GLOO_SOCKET_IFNAME="lo",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
    )
    assert "1 of 1 sites compressed in 1 training graph(s)" in printed
    rows = re.findall(r"^(exact|PAMM 64) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["exact", "PAMM 64"], printed
    exact, pamm = ([float(cell) for cell in row[1:]] for row in rows)
    assert exact[0] == pamm[0], "PAMM leaves forward alone"
    assert exact[1] != pamm[1], "later steps have other gradients behind them"
    if "--tensor-parallel" in options:
        # The gathered input stays saved without PAMM, whatever the memory budget.
        assert pamm[2] < exact[2]


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert_explained(start("fsdp2.py"), "start this with torchrun")
