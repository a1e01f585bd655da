"""Cache keys of methods: other code is another key, wherever it stands."""

from __future__ import annotations

import copy
import importlib
import linecache
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pamm_compile
from pamm_compile import Pamm, Subspace
from pamm_compile.driver import make_pipeline
from pamm_compile.methods.identity import identity

_METHOD = """
from pamm_compile import Cost
class Base:
    factor = {factor}
    def store(self, x, seed, outputs): return ({factor} * x[::2],)
    def weight_gradients(self, s, grads, t): return [g[::2].T @ s[0] for g in grads]
    def stored_bytes(self, size): return size.bytes // 2
    def cost(self, size): return Cost(1, 1, 1)
    def describe(self, size): return "mine"
class Mine(Base):
    fingerprint = "1"
"""

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes modules, as an editor would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    return write


def _uuid(method: Any) -> str | None:
    return make_pipeline(pamm_compile.backend(rules={"qkv": method}).options, {}).uuid()


def _made(module: str, name: str = "Mine") -> Any:
    return getattr(importlib.import_module(module), name)()


_OF = {
    "base": ("from a import Base\nclass Mine(Base):\n    fingerprint = '1'", "b"),
    "base of a base": (
        "from c import Middle\nclass Mine(Middle):\n    fingerprint = '1'",
        "b",
    ),
    "mixin": (
        "from a import Base\nclass Other: pass\nclass Mine(Other, Base):\n    fingerprint = '1'",
        "b",
    ),
    "field": (
        """
        import a
        class Mine:
            fingerprint = "1"
            def __init__(self): self.inner = [a.Mine()]
            def store(self, *given): return self.inner[0].store(*given)
            def weight_gradients(self, *given): return self.inner[0].weight_gradients(*given)
            def stored_bytes(self, size): return self.inner[0].stored_bytes(size)
            def cost(self, size): return self.inner[0].cost(size)
            def describe(self, size): return "mine"
        """,
        "b",
    ),
    "function of another file": (
        "import a\nclass Mine(a.Base.__base__):\n    fingerprint = '1'\n"
        "for n in 'store weight_gradients stored_bytes cost describe'.split():\n"
        "    setattr(Mine, n, getattr(a.Base, n))",
        "b",
    ),
}


@pytest.mark.parametrize("way", _OF)
def test_code_in_another_file_counts(way: str, write: Write) -> None:
    source, module = _OF[way]
    keys = []
    for factor in (2.0, 4.0, 2.0):
        write(
            a=_METHOD.format(factor=factor),
            c="from a import Base\nclass Middle(Base): pass",
            b=source,
        )
        keys.append(_uuid(_made(module)))
    assert None not in keys
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_a_file_edited_after_it_was_loaded(write: Write, tmp_path: Path) -> None:
    """The old code is running: its key is neither the old file's nor the new one's."""
    write(a=_METHOD.format(factor=2.0))
    old = _made("a")
    before = _uuid(old)
    (tmp_path / "a.py").write_text(_METHOD.format(factor=4.0))
    mixed = _uuid(old)
    write(a=_METHOD.format(factor=4.0))
    assert len({before, mixed, _uuid(_made("a"))}) == 3


def test_what_a_class_of_ours_is_made_of_is_known() -> None:
    for method in (Pamm(4), Subspace(0.5)):
        assert identity(method) == identity(copy.copy(method))
        assert identity(method).is_known


@dataclass(frozen=True)
class OfAFile(Subspace):
    """Its file is known, and so are the functions that dataclasses make."""

    more: float = 1.0


def test_closures_and_namespaces_count() -> None:
    def closing_over(factor: float) -> Any:
        class Mine(OfAFile):
            def store(self, x: Any, seed: Any, outputs: Any) -> Any:
                return (factor * x[::2],)

        return Mine()

    assert identity(OfAFile()).is_known
    assert identity(closing_over(2.0)) == identity(closing_over(2.0))
    assert identity(closing_over(2.0)) != identity(closing_over(4.0))
    names = "weight_gradients", "stored_bytes", "cost", "describe", "fingerprint"
    rest = {name: getattr(Subspace(), name) for name in names}
    spaces = [
        types.SimpleNamespace(store=store, **rest)
        for store in (lambda *given: (given[0][::2],), lambda *given: (given[0][::4],))
    ]
    assert len({_uuid(space) for space in spaces}) == 2
    assert None not in map(_uuid, spaces)


def test_code_of_no_file_is_in_no_cache() -> None:
    made = []
    for factor in (2.0, 4.0, 4.0):
        space: dict[str, Any] = {"__name__": "somewhere"}
        exec(_METHOD.format(factor=factor), space)
        made.append(space["Mine"]())
    assert [_uuid(method) for method in made] == [None] * 3
    backends = {pamm_compile.backend(rules={"qkv": method}) for method in made}
    assert len(backends) == 3
    assert pamm_compile.backend(rules={"qkv": made[0]}) in backends
    # A class of a file with functions of none.
    mixed = type("Mixed", (OfAFile,), {"store": made[0].store})()
    assert _uuid(mixed) is None


@pytest.mark.parametrize("file", ["<stdin>", "<string>", "<ipython-input-1-5d41402abc4b>", "cell"])
def test_a_method_typed_at_a_prompt_or_in_a_notebook(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There __main__ has no file, and a cell has lines in linecache at most."""
    source = _METHOD.format(factor=2.0)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setitem(linecache.cache, "cell", (len(source), None, source.splitlines(True), file))
    exec(compile(source, file, "exec"), vars(main))
    assert _uuid(main.Mine()) is None
