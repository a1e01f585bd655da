"""What the tests' own set-up decides."""

from __future__ import annotations

import runpy
from pathlib import Path

from pamm_testing import longest

compile_threads = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["compile_threads"]


def test_compilers_of_a_gpu_machine_work_side_by_side() -> None:
    assert compile_threads(16, 1, has_gpu=True) == 16
    assert compile_threads(16, 4, has_gpu=True) == 4
    assert compile_threads(2, 4, has_gpu=True) == 1
    assert compile_threads(16, 1, has_gpu=False) == 1


def test_the_longest_tests_and_those_left_out_are_written(tmp_path: Path) -> None:
    run, page = tmp_path / "run.xml", tmp_path / "page.md"
    run.write_text(
        '<testsuites><testsuite time="12.4">'
        '<testcase classname="tests.a" name="test_long" time="9"/>'
        '<testcase classname="tests.a" name="test_short" time="1"/>'
        '<testcase classname="tests.b" name="test_left" time="0">'
        f'<skipped message="{longest.LEFT_OUT}"/></testcase>'
        "</testsuite></testsuites>"
    )
    page.write_text("before\n<!-- test run -->\nold\n<!-- end of test run -->\nafter\n")
    longest.main([str(run), "--page", str(page), "--count", "1"])
    text = page.read_text()
    assert "2 tests in 12 s" in text
    assert "| `tests/a.py::test_long` | 9 |" in text
    assert "| `tests/b.py` | 1 |" in text
    assert "test_short" not in text
    assert text.startswith("before\n")
    assert "old" not in text
