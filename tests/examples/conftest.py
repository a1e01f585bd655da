"""The examples in this process, and without the time that generating code takes."""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from pamm_testing.programs import CHECKOUT, EXAMPLES
from torch._inductor import compile_fx

from pamm_compile.private import inductor

# Behind what is installed: of the checkout only `examples` is wanted.
sys.path.append(str(CHECKOUT))


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Inductor do everything but generate code: graphs are partitioned, and run eagerly."""
    eager = functools.partial(compile_fx.compile_fx, inner_compile=inductor.run_eagerly)
    monkeypatch.setattr(compile_fx, "compile_fx", eager)
    monkeypatch.setattr(inductor, "compile_fx", eager)
    with functorch_config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a script in this process and returns what it prints."""

    def run(script: str, *options: Any) -> str:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, options)])
        # As in a process of its own: nothing compiled.
        torch._dynamo.reset()
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run
