"""All architectures, in the order in which they are tried."""

from __future__ import annotations

import contextlib
import importlib
import itertools

from pamm_testing.sweep import libraries, transformers_models
from pamm_testing.sweep.steps import Architecture

_BEFORE = 25
"""Families of Transformers before the other libraries."""


def catalogue(layers: int) -> list[Architecture]:
    """Return every architecture, of Transformers and of other libraries."""
    families = transformers_models.families(layers)
    others = libraries.architectures(layers)
    # In turns, so that a run that is stopped has some of each.
    mixed = itertools.chain.from_iterable(itertools.zip_longest(families[_BEFORE:], others))
    return [*families[:_BEFORE], *(each for each in mixed if each is not None)]


def preload() -> None:
    """Import what most architectures need, so that the processes made of this one need not."""
    for module in (
        "torch._inductor.compile_fx", "torch._dynamo.backends.debugging", "timm", "x_transformers",
        "transformers.models.llama.modeling_llama", "diffusers.models.attention_processor", "peft",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
