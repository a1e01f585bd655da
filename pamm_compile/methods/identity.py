"""What code a method is of, for cache keys: no cache may answer for code that has changed.

A key holds, of the method's class and of every base class, of what its fields hold and of what its
functions close over: the bytecode of all functions, and a digest of every file that these are in.
torch, Python's own library and this package are left out: their versions are in the keys already.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace

from pamm_compile.methods.base import Method

_VERSIONED = {*sys.stdlib_module_names, "torch", "pamm_compile"}
_PLAIN = (int, float, complex, str, bytes, type(None), type(...))

_numbers: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()
_next = itertools.count()


@dataclass(frozen=True)
class Identity:
    """What tells a method's code from all other."""

    text: str
    is_known: bool
    """Whether all of its code is in files, so that another process with the same text runs the
    same: not so at a prompt, in a notebook, or what `exec` made."""


def identity(method: Method) -> Identity:
    """Return what tells a method from every other, its own source included.

    Two classes may declare the same fingerprint, and a class may change while what it declares does
    not: what one traced must not come from a cache of the other.

    Args:
        method: any.

    Returns:
        Its code, and what it declares.
    """
    reader = _Reader()
    reader.read(method)
    kind = type(method)
    text = f"{kind.__module__}.{kind.__qualname__} {reader.digest()} {method.fingerprint}"
    if not reader.is_known:
        # In one process, at least, one class is never taken for another.
        text += f" {_numbers.setdefault(kind, next(_next))}"
    return Identity(text, reader.is_known)


class _Reader:
    """Reads the code that a value can run, as far as it can be seen."""

    def __init__(self) -> None:
        self.is_known = True
        self._parts: list[str] = []
        self._seen: dict[int, object] = {}

    def digest(self) -> str:
        """Return a digest of all that was read."""
        return hashlib.sha256("\n".join(self._parts).encode()).hexdigest()

    def read(self, value: object) -> None:
        """Read whatever a field, a class or a function may hold."""
        if isinstance(value, _PLAIN):
            self._parts.append(repr(value))
            return
        if id(value) in self._seen:
            return
        # Kept, so that no other object gets its id meanwhile.
        self._seen[id(value)] = value
        if isinstance(value, type):
            self._read_class(value)
        elif isinstance(value, FunctionType):
            self._read_function(value)
        elif isinstance(value, ModuleType):
            self._read_file(value.__name__)
        else:
            for part in _parts_of(value):
                self.read(part)

    def _read_class(self, kind: type) -> None:
        for each in kind.__mro__:
            if _is_versioned(each.__module__):
                continue
            self._parts.append(f"{each.__module__}.{each.__qualname__}")
            self._read_file(each.__module__)
            for name, value in sorted(vars(each).items()):
                if not _is_special(name) or isinstance(value, FunctionType):
                    self._parts.append(name)
                    self.read(value)

    def _read_function(self, function: FunctionType) -> None:
        if _is_versioned(function.__module__ or ""):
            self._parts.append(f"{function.__module__}.{function.__qualname__}")
            return
        code = function.__code__
        self._parts.append(_code_text(code))
        file = Path(code.co_filename)
        if file.is_file():
            self._parts.append(hashlib.sha256(file.read_bytes()).hexdigest())
        elif not _is_special(function.__name__):
            # Special ones without a file are those that dataclasses make.
            self.is_known = False
        self.read(function.__defaults__)
        self.read(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:
                # Not assigned yet.
                self.is_known = False

    def _read_file(self, module: str) -> None:
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None or not Path(file).is_file():
            self.is_known = False
        else:
            self._parts.append(hashlib.sha256(Path(file).read_bytes()).hexdigest())


def _parts_of(value: object) -> Iterator[object]:
    """Yield what a value consists of, beginning with its class."""
    if isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, classmethod | staticmethod | MethodType):
        yield value.__func__
    elif isinstance(value, functools.partial | functools.partialmethod):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, tuple | list):
        yield from value
    elif isinstance(value, set | frozenset):
        yield from sorted(value, key=repr)
    elif hasattr(value, "__wrapped__"):
        yield value.__wrapped__
    elif isinstance(value, SimpleNamespace) or not _is_versioned(type(value).__module__):
        yield type(value)
        yield getattr(value, "__dict__", None)
        slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
        for name in itertools.chain.from_iterable([s] if isinstance(s, str) else s for s in slots):
            yield getattr(value, name, None)


def _is_versioned(module: str) -> bool:
    return module.partition(".")[0] in _VERSIONED


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _code_text(code: CodeType) -> str:
    """Return what code does, without where it stands."""
    constants = [
        _code_text(each)
        if isinstance(each, CodeType)
        else repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
        for each in code.co_consts
    ]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants))
