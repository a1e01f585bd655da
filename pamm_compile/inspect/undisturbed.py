"""Running a model to look at it, and leaving it as it was."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pamm_compile.errors import InvalidOptionError
from pamm_compile.torch_backend import Backend

# Not all options of backend(): wrapped models take, say, `targets` or `seed` for those within.
_OURS = ("backend", "using", "rules", "methods", "goal", "min_tokens", "min_generators", "epsilon")


def refuse_options(model: torch.nn.Module, given: Mapping[str, Any], instead: str) -> None:
    """Raise if what a model is to be called with are options of ours.

    Models of Transformers take any keyword and ignore it, so that an option in the wrong place
    would answer for the defaults.

    Args:
        model: what is called.
        given: keyword arguments for it.
        instead: how the options are given, for the message.

    Raises:
        InvalidOptionError: an argument is a backend, or has an option's name that `forward` lacks.
    """
    own = getattr(model, "_orig_mod", model)
    known = inspect.signature(own.forward).parameters if inspect.isroutine(own.forward) else {}
    for name, value in given.items():
        if isinstance(value, Backend) or (name in _OURS and name not in known):
            raise InvalidOptionError(
                f"{name}={value!r} would be passed on to the model: keyword arguments are what it "
                f"is called with. {instead}"
            )


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put a model's buffers and the states of random-number generators back afterwards.

    Args:
        model: what is run meanwhile.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(d for d in devices if d is not None)):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
