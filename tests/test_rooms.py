"""The rooms keep their order: nothing imports upwards or sideways, no file grows without end."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pamm_compile

PACKAGE = Path(pamm_compile.__file__).parent
MOST_LINES = 400

# From the top down: a room may import from the lines below its own, and from nothing beside it.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("__init__", "integrations"),
    ("trials",),
    ("inspect",),
    ("torch_backend",),
    ("recorded", "environment", "remembering"),
    ("driver",),
    ("sites",),
    ("options",),
    ("rules",),
    ("decoding",),
    ("methods.__init__",),
    ("methods.remembered",),
    (
        "methods.pamm",
        "methods.subspace",
        "methods.quantized",
        "methods.identity",
        "methods.checked",
    ),
    ("methods.base", "methods.codes", "methods.draws", "methods.rank", "methods.triton"),
    ("methods.sampling",),
    ("names", "devices", "targets"),
    ("graph",),
    ("report", "checks", "size"),
    ("private",),
    ("errors", "_version"),
)
_LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def _room(module: str) -> str:
    """Return the room of "pamm_compile.a.b": "a", or "a.b" where the rooms of a are told apart."""
    parts = module.split(".")[1:] or ["__init__"]
    if f"{parts[0]}.__init__" in _LEVEL:
        inner = ".".join(parts[:2])
        return inner if inner in _LEVEL else f"{parts[0]}.__init__"
    return parts[0]


def _modules(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inside = PACKAGE.parent.joinpath(*name.split("."))
                is_module = inside.is_dir() or inside.with_suffix(".py").exists()
                yield name if is_module else node.module


def _wrong(path: Path, own: str) -> list[str]:
    """Return the imports of a file that lead to its own level or up, to other rooms."""
    found = [name for name in _modules(path) if name.split(".")[0] == "pamm_compile"]
    return [n for n in found if _room(n) != own and _LEVEL[_room(n)] <= _LEVEL[own]]


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.quick
def test_every_arrow_between_rooms_leads_down() -> None:
    wrong = {_name(path): _wrong(path, _room(_name(path))) for path in FILES}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_every_file_has_a_room() -> None:
    assert {_name(path) for path in FILES if _room(_name(path)) not in _LEVEL} == set()


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("graph", "from pamm_compile.sites.decide import decide"),
        ("devices", "from pamm_compile import methods"),
        ("methods.pamm", "from pamm_compile.methods.subspace import method"),
        ("methods.triton", "from pamm_compile.methods import fingerprint"),
    ],
)
def test_the_check_of_imports_can_fail(tmp_path: Path, own: str, line: str) -> None:
    source = tmp_path / "source.py"
    source.write_text(line)
    assert len(_wrong(source, own)) == 1


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
