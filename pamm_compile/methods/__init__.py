"""Ways to store an input and to make weight gradients from what is stored, and their names."""

from __future__ import annotations

import functools
from collections.abc import Callable

from pamm_compile.methods import draws
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm import triton
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.methods.quantized.method import Quantized
from pamm_compile.methods.remembered.method import GradientSubspace
from pamm_compile.methods.subspace.method import Subspace

METHODS: dict[str, Callable[..., Method]] = {
    "pamm": Pamm,
    "subspace": Subspace,
    "quantized": Quantized,
    "gradients": GradientSubspace,
}
"""What rules that are written as text may name; `register_method` adds to these."""


def register_method(name: str, make: Callable[..., Method]) -> None:
    """Give a method a name by which rules that are written as text find it.

    Args:
        name: as in "qkv=NAME:64".
        make: a class or function; the text's values become its arguments.
    """
    METHODS[name] = make


@functools.cache
def register_lowerings() -> None:
    """Tell Inductor how it compiles the operators of all methods; again does nothing.

    Raises:
        UnsupportedTorchError: this torch lacks a symbol that the lowerings use.
    """
    triton.register()
    draws.register()
