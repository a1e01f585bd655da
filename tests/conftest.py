"""Shared set-up: no state carried from one test to the next, one thread pool for two workers."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator

import pamm_testing.no_code
import pytest
import torch
from hypothesis import settings

# The same examples every time by default; with --everything fresh ones, which find what is new.
settings.register_profile("same", deadline=None, max_examples=50, derandomize=True, database=None)
settings.register_profile("fresh", deadline=None, max_examples=50)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_code() -> Iterator[None]:
    """Let Inductor do everything but generate code, which is most of its time."""
    with pamm_testing.no_code.no_code():
        yield


@pytest.fixture
def own_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test an Inductor cache directory of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def compile_threads(cores: int, workers: int, *, has_gpu: bool) -> int:
    """Return how many compilers Inductor may start for each process of tests.

    Its pool is a process that imports torch beside every process of ours: not worth it for C++,
    but autotuning on a GPU compiles dozens of kernels that wait for nothing else.
    """
    return max(1, cores // workers) if has_gpu else 1


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = compile_threads(os.cpu_count() or 1, workers, has_gpu=torch.cuda.is_available())
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    if platform.machine() == "x86_64":
        # Else Inductor compiles six programs to probe the compiler, for each cache folder anew.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    # Tracing makes objects by the million; looking for cycles in a growing heap took a fifth of the
    # time.
    gc.set_threshold(100_000, 50, 100)
    settings.load_profile("fresh" if config.getoption("everything") else "same")
    # Under xdist the workers share the cores; oversubscription makes matmuls many times slower.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--everything", action="store_true", help="repeat checks on models like others"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and there is none"
    if not config.getoption("everything"):
        reasons["everything"] = "runs with --everything"
    for item in items:
        for mark, reason in reasons.items():
            # Its keywords are the names of folders too, of the checkout as well.
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
