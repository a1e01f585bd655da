"""The examples in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pamm_testing.programs import CHECKOUT, EXAMPLES

# Behind what is installed: of the checkout only `examples` is wanted.
sys.path.append(str(CHECKOUT))


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
