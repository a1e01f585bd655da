"""The wheel holds what a user's process can reach, and needs no more than torch to be imported."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ABSENT = (
    "accelerate cma hypothesis lightning matplotlib mypy pamm_testing peft psutil pytest ruff "
    "torchao tqdm transformers"
)
IMPORT_ALL = f'''
import importlib, pkgutil, sys

# As in an environment that has torch, what torch needs, and nothing else.
sys.modules.update(dict.fromkeys("{ABSENT}".split()))
import pamm_compile
assert pamm_compile.__file__.startswith(sys.argv[1]), pamm_compile.__file__
# Who trains does not pay for what is for decoding.
assert not [name for name in sys.modules if name.startswith("pamm_compile.decoding")]
# These rooms are for those who have the libraries that they serve; and one runs when imported.
apart = ("pamm_compile.integrations.", "pamm_compile.decoding", "pamm_compile.__main__")
for module in pkgutil.walk_packages(pamm_compile.__path__, "pamm_compile."):
    if not module.name.startswith(apart):
        importlib.import_module(module.name)
'''


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a folder beside what it builds.
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "pamm_compile", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_every_module_of_the_wheel_imports_without_extras(unpacked: Path) -> None:
    subprocess.run([sys.executable, "-c", IMPORT_ALL, str(unpacked)], cwd=unpacked, check=True)


def test_the_wheel_has_no_tools_for_maintainers(unpacked: Path) -> None:
    package = unpacked / "pamm_compile"
    assert {p.suffix for p in package.rglob("*") if p.is_file()} == {
        ".jinja", ".json", ".py", ".typed",
    }  # fmt: skip
    runnable = {p.name for p in package.rglob("*.py") if '__name__ == "__main__"' in p.read_text()}
    assert runnable <= {"__main__.py"}
    assert {p.name for p in unpacked.iterdir() if p.suffix != ".dist-info"} == {"pamm_compile"}
