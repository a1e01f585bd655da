"""Whoever names no rules gets one and the same thing, wherever they ask, and the pages show it."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pamm_testing.programs import CHECKOUT, EXAMPLES
from torch import nn

import pamm_compile
from pamm_compile import cli
from pamm_compile.inspect import compare, explain, predict
from pamm_compile.methods.remembered.method import GradientSubspace
from pamm_compile.options import Options
from pamm_compile.rules import Rule, make_rules
from pamm_compile.torch_backend import named_backend
from pamm_compile.trials import trial

SAID = Options(rules=(Rule("linear", GradientSubspace()),), goal="speed")


class Asked(Exception):
    """Someone made a backend."""


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PAMM_COMPILE_"):
            monkeypatch.delenv(name)


def model() -> tuple[nn.Module, dict[str, Any]]:
    return nn.Linear(8, 8), {"input": torch.randn(4, 8)}


def to_train() -> tuple[nn.Module, list[Any]]:
    return nn.Linear(8, 8), [torch.randn(4, 8)]


def _callback(**given: Any) -> Options:
    pytest.importorskip("transformers")
    from pamm_compile.integrations.transformers import PammCallback

    return PammCallback(**given).backend.options


BUILDERS: list[Callable[..., Options]] = [
    lambda **given: pamm_compile.backend(**given).options,
    lambda **given: Options.from_mapping(given),
    lambda **given: pamm_compile.by_name({f"pamm.{n}": v for n, v in given.items()}).options,
    _callback,
]
IDS = ("backend", "mapping", "name", "callback")


@pytest.mark.quick
@pytest.mark.parametrize("build", [*BUILDERS, Options], ids=[*IDS, "Options"])
def test_who_names_nothing(build: Callable[..., Options]) -> None:
    assert build() == SAID
    assert build(goal="memory").goal == "memory"
    assert build(goal="memory").rules == SAID.rules
    assert build(min_tokens=1, seed=3).goal == SAID.goal
    assert build(rules=None, goal=None) == SAID
    mine = build(rules="linear=gradients")
    assert (mine.rules, mine.goal) == (SAID.rules, "memory")


@pytest.mark.parametrize("build", BUILDERS, ids=IDS)
@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"ratio": 256}, "qkv=pamm:256"),
        ({"epsilon": 0.5}, "qkv=pamm:256:epsilon=0.5"),
        ({"epsilon": float("inf")}, "qkv=pamm:256"),
        ({"sampling": "uniform"}, "qkv=pamm:256:sampling=uniform"),
        ({"min_generators": 1}, "qkv=pamm:256"),
        ({"targets": "qkv"}, "qkv=pamm:256"),
        ({"ratio": None, "targets": "mlp"}, "mlp=pamm:256"),
    ],
    ids=str,
)
def test_who_names_one_thing_of_a_rule(
    build: Callable[..., Options], given: dict[str, Any], rule: str
) -> None:
    assert build(**given) == Options(rules=make_rules(rule), goal="memory")


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAMM_COMPILE_GOAL", "any")
    assert pamm_compile.by_name().options == Options(SAID.rules, "any")
    monkeypatch.setenv("PAMM_COMPILE_MIN_GENERATORS", "1")
    # None is not given, so that the environment decides.
    assert pamm_compile.by_name({"pamm.goal": None, "pamm.rules": None}).options.rules == (
        pamm_compile.backend(256).options.rules
    )


def test_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Options] = []
    monkeypatch.setattr(
        pamm_compile.Backend, "__call__", lambda self, *_, **__: used.append(self.options)
    )
    named_backend(None, [])  # type: ignore[arg-type]
    named_backend(None, [], options={"epilogue_fusion": False})  # type: ignore[arg-type]
    assert used == [SAID, SAID]


@pytest.mark.parametrize(
    ("command", "function", "argument"),
    [
        ("explain", "explain", "using"),
        ("compare", "compare_memory", "backend"),
        ("trial", "trial", "backend"),
        ("fidelity", "fidelity", "rules"),
    ],
)
def test_the_command_line(
    command: str, function: str, argument: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    given: dict[str, Any] = {}

    def record(*_: Any, **options: Any) -> None:
        given.update(options)
        raise pamm_compile.PammError("seen")

    monkeypatch.setattr(cli, function, record)
    monkeypatch.chdir(tmp_path)
    name = "to_train" if command == "trial" else "model"
    assert cli.main([command, f"{__name__}:{name}"]) == 2
    if command == "fidelity":
        assert make_rules(given[argument]) == SAID.rules
    else:
        assert given[argument].options == SAID


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (explain, "backend", lambda m, x: pamm_compile.explain(m, x)),
        (predict, "backend", lambda m, x: pamm_compile.predict_saved(m, x)),
        (compare, "make_backend", lambda m, x: pamm_compile.compare_memory(m, lambda m: m(x))),
        (
            trial,
            "make_backend",
            lambda m, x: pamm_compile.trial(m, [x] * 4, steps=4, progress=False),
        ),
    ],
    ids=["explain", "predict_saved", "compare_memory", "trial"],
)
def test_who_gives_no_backend(
    module: Any, name: str, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> None:
        raise Asked

    assert getattr(module, name) is pamm_compile.backend
    monkeypatch.setattr(module, name, make)
    with pytest.raises(Asked):
        call(nn.Linear(8, 8), torch.randn(4, 8))


def _programs() -> dict[str, str]:
    """Return what newcomers are shown: the first block of code of the pages, and a program."""
    found = {"minimal.py": (EXAMPLES / "minimal.py").read_text()}
    for page in ("README.md", "docs/start.md"):
        text = (CHECKOUT / page).read_text()
        found[page] = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0]
    return found


@pytest.mark.parametrize("program", _programs().values(), ids=_programs())
def test_what_a_newcomer_is_shown(program: str) -> None:
    calls = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pamm_compile.backend"
    ]
    assert calls
    for call in calls:
        assert eval(call, {"pamm_compile": pamm_compile}).options == SAID


def test_the_table_of_options() -> None:
    page = (CHECKOUT / "docs" / "start.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.M))
    (rule,) = re.findall('"(.*)"', rows["rules"])
    recommended, own = re.findall('"(.*?)"', rows["goal"])
    assert Options(rules=rule, goal=recommended) == Options()  # type: ignore[arg-type]
    assert Options(rules=rule).goal == own  # type: ignore[arg-type]
    for name in ("siblings", "min_tokens", "strict"):
        assert rows[name] == f"`{getattr(SAID, name)}`" or rows[name] == str(getattr(SAID, name))
