"""The rooms keep their order: nothing imports upwards, no file grows without end."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pamm_compile

PACKAGE = Path(pamm_compile.__file__).parent
MOST_LINES = 400

# From the top down: a room may import from its own line and from those below.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("__init__", "integrations"),
    ("inspect",),
    ("torch_backend",),
    ("recorded", "driver", "environment"),
    ("sites",),
    ("options",),
    ("rules",),
    ("decoding",),
    ("methods", "names", "devices"),
    ("graph",),
    ("report", "checks"),
    ("private",),
    ("errors", "_version"),
)
_LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _upward(path: Path, own: str) -> list[str]:
    found = [name for name in _imports(path) if name.split(".")[0] == "pamm_compile"]
    return [name for name in found if _LEVEL[_room(name)] < _LEVEL[own]]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upwards(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    assert _upward(path, relative.parts[0].removesuffix(".py")) == []


def test_the_check_of_imports_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("from pamm_compile.sites.decide import decide\n")
    assert _upward(source, "graph") == ["pamm_compile.sites.decide.decide"]


def test_no_file_is_long() -> None:
    root = PACKAGE.parent
    files = [
        path for room in (PACKAGE, root / "tests", root / "examples") for path in room.rglob("*.py")
    ]
    lengths = {str(path.relative_to(root)): path.read_text().count("\n") for path in files}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_modules_and_public_names_do_not_collide() -> None:
    """`import pamm_compile.NAME` would else put the module where the function was."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir()}
    assert modules.isdisjoint(set(pamm_compile.__all__) - {"__version__"})
