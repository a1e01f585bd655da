"""The interpreter lives in one child process: Triton decides at import whether to interpret."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's")

from pamm_testing.triton import interpreter

Interpret = Callable[..., Any]


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Call a function of `interpreter` where Triton interprets."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, interpreter.prepare) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
