"""The peak of a training step, as the machine sees it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

CUDA = "torch.cuda.max_memory_allocated"
HIGH_WATER = "resident set: VmHWM of /proc/self/status, reset through /proc/self/clear_refs"
SAMPLED = "resident set: sampled every half millisecond"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which glibc gives freed blocks back at once.

By default it raises the threshold with every large block freed, and from then on keeps such blocks:
the resident set would then depend on what ran before.
"""


def measure(step: Callable[[], object], device: str) -> tuple[int, str]:
    """Return the bytes that a step takes at its peak beyond those held before, and what was read.

    Args:
        step: one that has run before, so that what it compiles and caches is there already.
        device: where it runs.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, CUDA
    _release_free_memory()
    if _reset_high_water():
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before, HIGH_WATER
    return _sampled(step), SAMPLED


def _release_free_memory() -> None:
    """Give back what malloc keeps between blocks in use, which a step would else fill unseen."""
    if sys.platform == "linux":
        # Other C libraries than glibc have no such function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {field}; nothing else tells a peak here.")
    return int(found[1]) * 1024


def _sampled(step: Callable[[], object]) -> int:
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def sample() -> None:
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        step()
    finally:
        done.set()
        thread.join()
    return most - before
