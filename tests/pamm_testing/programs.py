"""Run the example programs as users do, at toy size."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
EXAMPLES = CHECKOUT / "examples"
TINY = ("--layers", "1", "--hidden", "32", "--heads", "2", "--batch", "4", "--sequence", "64")


def start(
    script: str, *options: Any, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is.

    Args:
        script: its name in examples/.
        options: its command line.
        launcher: arguments of Python that come before the script.
        environment: variables to set.
    """
    return subprocess.run(
        [sys.executable, *launcher, EXAMPLES / script, *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=600,
        check=False,
    )


def run(script: str, *options: Any, launcher: tuple[str, ...] = (), **environment: str) -> str:
    """Run a program that is to succeed, and return what it prints."""
    done = start(script, *options, launcher=launcher, **environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def assert_explained(done: subprocess.CompletedProcess[str], explanation: str) -> None:
    """Check that a program failed with a sentence, not with a traceback."""
    assert done.returncode != 0
    assert explanation in done.stderr
    assert "Traceback" not in done.stderr


def assert_finite(data: Any) -> None:
    """Check every number in plain data."""
    if isinstance(data, dict):
        for value in data.values():
            assert_finite(value)
    elif isinstance(data, list):
        for value in data:
            assert_finite(value)
    elif isinstance(data, int | float):
        assert math.isfinite(data)
