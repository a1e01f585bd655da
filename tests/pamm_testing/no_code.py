"""Let Inductor do everything but generate code: graphs are partitioned, and run eagerly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch._functorch.config as functorch_config
from torch._inductor import compile_fx

from pamm_compile.private import inductor


@contextlib.contextmanager
def no_code() -> Iterator[None]:
    eager = functools.partial(compile_fx.compile_fx, inner_compile=inductor.run_eagerly)
    with (
        mock.patch.object(compile_fx, "compile_fx", eager),
        mock.patch.object(inductor, "compile_fx", eager),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield
