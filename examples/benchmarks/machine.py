"""What a figure depends on besides the code: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

# torch.profiler's backend reads this when torch is imported, and else prints a line per start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import psutil
import torch

PACKAGES = ("torch", "triton", "transformers", "pamm-compile")
CHECKOUT = Path(__file__).resolve().parents[2]


def facts(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Return the machine, the versions and the commit that decide what a run measures."""
    count = threads or torch.get_num_threads()
    found: dict[str, Any] = {"machine": f"{processor()}, {count} threads"}
    found["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["system"] = platform.platform(terse=True)
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["commit"] = commit()
    return found


def commit() -> str | None:
    """Return the commit of the checkout that these scripts are in, if they are in one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def command() -> str:
    """Return the command that this process was started with, as one types it in the checkout."""
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(CHECKOUT)
    name = script.relative_to(CHECKOUT).as_posix() if inside else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def default_device() -> str:
    """Return the accelerator's type if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def require(device: str) -> torch.device:
    """Return a device, or end the program with a sentence if there is none."""
    found = torch.device(device)
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {device} does not work here: {error}") from error
    return found
