"""The interpreter lives in one child process: Triton decides at import whether to interpret."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's")

sys.path.insert(0, str(Path(__file__).parent))

import interpreter

Interpret = Callable[..., Any]


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Call a function of `interpreter` where Triton interprets."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, interpreter.prepare) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
