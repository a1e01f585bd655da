"""What the tests' own set-up decides."""

from __future__ import annotations

import runpy
from pathlib import Path

compile_threads = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["compile_threads"]


def test_compilers_of_a_gpu_machine_work_side_by_side() -> None:
    assert compile_threads(16, 1, has_gpu=True) == 16
    assert compile_threads(16, 4, has_gpu=True) == 4
    assert compile_threads(2, 4, has_gpu=True) == 1
    assert compile_threads(16, 1, has_gpu=False) == 1
