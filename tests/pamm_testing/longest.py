"""Write docs/benchmarks/tests.md's tables of a test run: what takes longest, what it leaves out.

python -m pytest -n auto --dist worksteal --junitxml=run.xml
PYTHONPATH=tests python -m pamm_testing.longest run.xml
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs" / "benchmarks" / "tests.md"
LEFT_OUT = "runs with --everything"
COMMANDS = {
    LEFT_OUT: "`python -m pytest --everything`, `.ci/nightly`",
    "needs a CUDA device, and there is none": "`python -m pytest -m gpu` on a machine with a GPU",
}
"""By the reason for which a test is skipped, what runs it."""


class Test(NamedTuple):
    """One test of a run."""

    name: str
    file: str
    seconds: float
    skipped: str
    """Why; empty if it ran."""


def read(path: Path) -> tuple[list[Test], float]:
    """Return the tests of a JUnit file of pytest's, and the seconds that the run took."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None, f"{path} holds no test run"
    tests = []
    for case in suite.iter("testcase"):
        skipped = case.find("skipped")
        file = "/".join(case.attrib["classname"].split(".")) + ".py"
        reason = "" if skipped is None else skipped.attrib.get("message", "")
        tests.append(Test(case.attrib["name"], file, float(case.attrib["time"]), reason))
    return tests, float(suite.attrib["time"])


def tables(tests: Sequence[Test], seconds: float, count: int) -> str:
    """Return the two tables as Markdown."""
    done = [test for test in tests if not test.skipped]
    ordered = sorted(done, key=lambda test: -test.seconds)
    lines = [
        f"{len(done)} tests in {seconds:.0f} s on {os.cpu_count()} cores ({platform.machine()}, "
        f"torch {torch.__version__}); the {count} longest:",
        "",
        "| test | seconds |",
        "|---|--:|",
        *(f"| `{t.file}::{t.name}` | {t.seconds:.0f} |" for t in ordered[:count]),
        "",
        "What it leaves out:",
        "",
        "| file | tests | which command runs them |",
        "|---|--:|---|",
    ]
    left = Counter((test.skipped, test.file) for test in tests if test.skipped in COMMANDS)
    rows = sorted(left.items(), key=lambda row: (list(COMMANDS).index(row[0][0]), row[0][1]))
    lines += [f"| `{file}` | {n} | {COMMANDS[reason]} |" for (reason, file), n in rows]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the tables between their marks."""
    marks = r"(<!-- test run -->\n).*?(<!-- end of test run -->)"
    new, found = re.subn(
        marks, lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text("utf-8"), flags=re.S
    )
    assert found == 1, f"{page} has {found} places for the tables"
    page.write_text(new, "utf-8")


def main(arguments: Iterable[str] | None = None) -> None:
    """Read a run and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("junit", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(None if arguments is None else list(arguments))
    tests, seconds = read(options.junit)
    write(options.page, tables(tests, seconds, options.count))


if __name__ == "__main__":
    main()
