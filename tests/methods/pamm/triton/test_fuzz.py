"""The generated GPU kernels on random sites, interpreted, against the definition.

`PAMM_KERNEL_FUZZ_DRAWS` and `PAMM_KERNEL_FUZZ_SEED` draw more, and others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from pamm_testing.triton import interpreter, kernel_fuzz

from pamm_compile.methods.pamm import triton as lowering

Interpret = Callable[..., Any]

DRAWS = int(os.environ.get("PAMM_KERNEL_FUZZ_DRAWS", "30"))
SEED = int(os.environ.get("PAMM_KERNEL_FUZZ_SEED", "0"))
PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
def test_generated_kernels_on_random_sites(interpret: Interpret, part: int) -> None:
    lowering.register()
    failed = []
    for number in range(part, DRAWS, PARTS):
        drawn = kernel_fuzz.draw(SEED * 1_000_000 + number)
        x, c, grads = kernel_fuzz.tensors(drawn)
        inputs = [x, c, *grads]
        code = kernel_fuzz.code(drawn, inputs)
        try:
            got = interpret(interpreter.run_wrapper, code, inputs)
            kernel_fuzz.judge(drawn, x, c, grads, got)
        except AssertionError as error:
            failed.append(f"{drawn}: {error}")
    assert not failed, "\n".join(failed)
