"""Ways to store an input and to make weight gradients from what is stored, and their names."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

from pamm_compile.methods import draws
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm import triton
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.methods.subspace.method import Subspace

METHODS: dict[str, Callable[..., Method]] = {"pamm": Pamm, "subspace": Subspace}
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


def fingerprint(method: Method) -> str:
    """Return what tells a method from every other, its own source included.

    Two classes may declare the same fingerprint, and a class may change while what it declares does
    not: what one traced must not come from a cache of the other.

    Args:
        method: any.

    Returns:
        Text for cache keys.
    """
    kind = type(method)
    return f"{kind.__module__}.{kind.__qualname__} {_source(kind)} {method.fingerprint}"


def _source(kind: type) -> str:
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:
        file = None
    # A class typed at a prompt has no file; what it declares is all there is to know of it.
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
