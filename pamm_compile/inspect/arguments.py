"""Check the arguments that a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
