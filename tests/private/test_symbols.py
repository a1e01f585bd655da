"""Private torch: every symbol is named in one place, and its loss is reported by name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pamm_compile
from pamm_compile.private import aot, inductor, memory, scaled, symbols

PACKAGE = Path(pamm_compile.__file__).parent
SUBJECTS = (aot, inductor, memory, scaled)


@pytest.mark.quick
@pytest.mark.parametrize("symbol", symbols.RESOLVED)
def test_this_torch_has(symbol: str) -> None:
    symbols.resolve(symbol)


def _private_names(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        # torch._check is documented, for the shape functions of custom operators.
        found += [n for n in names if re.match(r"torch\._[^_]", n) and n != "torch._check"]
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name != "private"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_other_file_uses_private_torch(path: Path) -> None:
    assert _private_names(path) == []


def test_the_check_for_private_torch_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("import torch\nfrom torch._inductor import ir\ntorch._dynamo.reset()\n")
    assert set(_private_names(source)) >= {"torch._inductor.ir", "torch._dynamo.reset"}


def test_every_symbol_of_a_subject_is_resolved_on_import() -> None:
    """What a module looks up later would fail in the midst of somebody's compilation."""
    for subject in SUBJECTS:
        tree = ast.parse(Path(str(subject.__file__)).read_text())
        inside = [
            call
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "resolve"
        ]
        assert inside == [], subject.__name__
    assert len(symbols.RESOLVED) > 30


def test_a_missing_symbol_is_named() -> None:
    with pytest.raises(
        pamm_compile.UnsupportedTorchError,
        match=r"has no torch\._inductor\.nowhere, which pamm_compile needs. Supported: torch 2\.11",
    ):
        symbols.resolve("torch._inductor:nowhere")


_IMPORT = "import pamm_compile"
_BY_NAME = "torch.compile(torch.nn.Linear(2, 2), backend='pamm')(torch.ones(1, 2))"
# Inductor itself is to have been imported whole.
_NO_TEMPLATE = "import torch._inductor.select_algorithm as m; del m.TritonTemplate"
_TEMPLATE = "has no torch._inductor.select_algorithm.TritonTemplate, which pamm_compile needs."
_DAMAGES = [
    (
        "import torch._dynamo.backends.debugging as m; del m.boxed_nop",
        _IMPORT,
        "has no torch._dynamo.backends.debugging.boxed_nop, which pamm_compile needs.",
    ),
    (_NO_TEMPLATE, _IMPORT, _TEMPLATE),
    (_NO_TEMPLATE, _BY_NAME, _TEMPLATE),
    (
        "torch.__version__ = '2.10.0'",
        _IMPORT,
        "torch 2.10.0 is too old: pamm_compile needs torch 2.11 or newer.",
    ),
]
_FORKS = """
import os, sys
import torch, torch._dynamo.backends.debugging, torch._inductor.compile_fx
assert "pamm_compile" not in sys.modules
for number, text in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{number}.err", os.O_CREAT | os.O_WRONLY), 2)
        exec(text)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_importing_the_backend_ends_in_one_clear_error(tmp_path: Path) -> None:
    """Each in a process that has torch, made to look like one outside the range, and not us."""
    texts = [f"{damage}\n{use}" for damage, use, _ in _DAMAGES]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKS, *texts],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * len(_DAMAGES)
    for number, (_, _, message) in enumerate(_DAMAGES):
        said = (tmp_path / f"{number}.err").read_text()
        last = said.rstrip().splitlines()[-1]
        assert last.startswith("pamm_compile.errors.UnsupportedTorchError: torch ")
        assert message in last
        assert said.count("UnsupportedTorchError: ") == 1


@pytest.mark.parametrize("version", ["1.13.1", "2.10.0+cpu"])
def test_an_old_torch_is_refused(version: str) -> None:
    with pytest.raises(pamm_compile.UnsupportedTorchError, match=f"torch {version[:4]}.* too old"):
        symbols.check_torch_version(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0.dev20261101", "3.0.0a0"])
def test_a_newer_torch_is_not(version: str) -> None:
    symbols.check_torch_version(version)
