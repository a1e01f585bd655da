"""The pages: links lead somewhere, tables are what their records say, programs exist."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from pamm_testing.programs import CHECKOUT
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile
from examples.studies import results
from pamm_compile.private import memory
from pamm_compile.targets import TARGETS

PAGES = results.pages()


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, _, anchor in (
        link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
    ):
        if target.startswith("http"):
            continue
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w/])(?:examples|tests|\.ci)/[\w/.]+[\w/]", text):
        assert (CHECKOUT / name).exists(), f"{page.name} names {name}"


def test_tests_that_pages_name_exist() -> None:
    sources = "\n".join(path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in sources, f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rooms_exist(page: Path) -> None:
    rooms = "graph|sites|methods|private|inspect|integrations|decoding"
    for name in re.findall(rf"`((?:{rooms})/[\w/]*(?:\.py)?)`", page.read_text()):
        assert (CHECKOUT / "pamm_compile" / name).exists(), f"{page.name} names {name}"


def test_the_changelog_begins_with_this_version() -> None:
    page = (CHECKOUT / "docs" / "changelog.md").read_text()
    assert re.findall(r"^## (\S+)", page, re.M)[0] == pamm_compile.__version__


def test_the_workflow_runs_scripts_that_exist() -> None:
    workflow = (CHECKOUT / ".github" / "workflows" / "tests.yml").read_text()
    named = re.findall(r"run: (\S+)$", workflow, re.M)
    assert named == [".ci/run", ".ci/nightly"]
    for name in named:
        assert os.access(CHECKOUT / name, os.X_OK), name


def test_every_reason_is_explained() -> None:
    page = (CHECKOUT / "docs" / "limitations.md").read_text()
    assert [reason.name for reason in pamm_compile.Reason if f"`{reason.name}`" not in page] == []


def test_the_table_of_targets_is_that_of_the_code() -> None:
    page = (CHECKOUT / "docs" / "start.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.split("| target | holds |")[1], re.M)
    assert rows[: len(TARGETS)] == [(name, target.holds) for name, target in TARGETS.items()]


def test_the_first_snippet_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (CHECKOUT / "README.md").read_text()
    snippet = re.findall(r"^```python\n(.*?)^```$", readme, re.S | re.M)[0]
    scope = {"model": torch.nn.Linear(2, 2)}
    exec(snippet, scope)
    assert capsys.readouterr().out == "nothing compiled yet\n"


def test_the_report_on_the_first_page_is_one() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    (shown,) = re.findall(r"^```text\n(.*?)^```$", readme, re.S | re.M)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 32000}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 8, "use_cache": False}
    with memory.fake_mode():
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, **layers), dtype=torch.bfloat16)
        ids = torch.zeros(8, 256, dtype=torch.int64)
        found = str(pamm_compile.explain(model, input_ids=ids, labels=ids))
    lines = [line.split() for line in found.splitlines()]
    for line in shown.splitlines():
        if not line.startswith("──"):
            assert line.split() in lines


def test_every_table_is_shown() -> None:
    text = "".join(page.read_text() for page in results.pages())
    assert [name for name in results.TABLES if f"<!-- table: {name} -->" not in text] == []


def test_tables_are_what_their_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    results.main(["--check"])
    assert "differing: none" in capsys.readouterr().out


def test_a_table_that_differs_is_found() -> None:
    page = "a\n<!-- table: first-screen -->\n| invented |\n<!-- end -->\nb\n"
    rewritten = results.written(page, "page")
    assert "invented" not in rewritten
    assert "| compile | 276.6 MiB" in rewritten
    assert rewritten.startswith("a\n<!-- table")
    assert rewritten.endswith("<!-- end -->\nb\n")
    assert results.written(rewritten, "page") == rewritten
    with pytest.raises(SystemExit, match="no table 'invented'"):
        results.written("<!-- table: invented -->\n<!-- end -->", "page")
    with pytest.raises(SystemExit, match="no <!-- end -->"):
        results.written("<!-- table: first-screen -->\n", "page")
