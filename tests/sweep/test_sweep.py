"""The sweep over architectures sees what it is to see, on models whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pamm_testing.sweep import __main__ as command
from pamm_testing.sweep.check import check, names_in, verdict
from pamm_testing.sweep.reads import Reads
from pamm_testing.sweep.shrink import VOCAB, shrink
from pamm_testing.sweep.steps import Architecture, Step
from torch import Tensor, nn

from pamm_compile.report import GraphReport, Note, Report, SiteReport


class _Small(nn.Module):
    """A projection, a table that is looked up, rows of a weight, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.proj = nn.Embedding(9, 16), nn.Linear(16, 16)
        self.rows, self.latent = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(3, 16))
        self.scale = nn.Parameter(torch.randn(5, 16))
        self.register_buffer("picked", torch.tensor([1, 5]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(self.table(ids)) * self.scale
        queries = self.proj(self.latent)
        return torch.cat([x @ self.rows[self.picked].T, x @ queries.T], -1)


def _built() -> tuple[nn.Module, dict[str, Any]]:
    return _Small(), {"ids": torch.randint(0, 9, (4, 5))}


def test_reads_follow_weights_through_what_moves_them() -> None:
    model, inputs = _built()
    with Reads(model, inputs) as reads:
        model(**inputs)
    assert reads.found.keys() == {"proj.weight", "rows"}
    assert reads.beside_weights.keys() == {"proj.weight", "latent"}


def test_a_row_says_what_a_step_showed() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    row = check(Architecture("torch/plain", lambda: (Plain(), {"x": torch.randn(4, 16)})))
    assert row["status"] == "trained", row
    assert row["weights"] == 2
    assert row["linear"]["compressed"] == ["a.weight"]
    # The backward pass of tanh reads it.
    assert row["linear"]["declined"] == {"SHARED_INPUT": ["b.weight"]}
    assert not list(command._wrong(row))


def _step(**weights: float) -> Step:
    grads = {name: torch.full((2, 2), value) for name, value in weights.items()}
    return Step(torch.ones(()), grads, {}, dict.fromkeys(grads, ("Model", "Layer")))


def _report(compressed: str, *notes: Note) -> Report:
    site = SiteReport((compressed,), (4, 2), "float32", "marked", 0, 32, 32, compressed=True)
    return Report([GraphReport((site,), notes)])


@pytest.mark.parametrize(
    ("ours", "notes", "wrong"),
    [
        ({"a": 3.0, "b": 1.0}, (), {}),
        ({"a": 1.0, "b": 1.0}, (), {"unchanged": ["a"]}),
        ({"a": 3.0, "b": 3.0}, (), {"unlisted": ["b"]}),
        ({"a": 3.0, "b": 3.0}, (Note("AMBIGUOUS_NAME", "{a,b}"),), {}),
        ({"a": 3.0, "b": 3.0}, (Note("AMBIGUOUS_NAME", "{a,c}"),), {"unlisted": ["b"]}),
        ({"a": 3.0}, (), {"unlisted": ["b"]}),
    ],
)
def test_the_verdict_finds_what_is_not_as_promised(
    ours: dict[str, float], notes: tuple[Note, ...], wrong: dict[str, list[str]]
) -> None:
    exact = _step(a=1.0, b=1.0)
    step = replace(_step(**ours), classes=exact.classes)
    row = verdict(exact, step, _report("a", *notes), {"a"})
    found = {kind: row[kind] for kind in command.WRONG if kind in row}
    assert found == wrong


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", {"a"}),
        ("a, b + c", {"a", "b", "c"}),
        ("l.{0,1}.w, {q,k.v}.w", {"l.0.w", "l.1.w", "q.w", "k.v.w"}),
    ],
)
def test_names_are_read_out_of_notes(text: str, names: set[str]) -> None:
    assert names_in(text) == names


def test_weights_in_no_list_are_silent() -> None:
    step = _step(a=1.0, b=1.0, c=1.0)
    report = _report("a", Note("NOT_A_PROJECTION", "b", "grouped_mm"))
    row = verdict(step, replace(step, weights=_step(a=3.0, b=1.0, c=1.0).weights), report, {*"abc"})
    assert row["silent"] == ["c"]


def test_what_hangs_or_dies_is_a_row() -> None:
    def hang() -> tuple[nn.Module, dict[str, Any]]:
        while True:
            pass

    def die() -> tuple[nn.Module, dict[str, Any]]:
        import os

        os._exit(3)

    states: dict[str, Callable[..., Any]] = {"hung": hang, "died": die}
    for state, build in states.items():
        row = command.in_a_process(Architecture(f"torch/{state}", build), 1)
        assert row["status"] == state
        assert command._is_wrong(row)


def test_rows_that_are_there_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps({"name": "torch/a", "status": "skipped", "error": "none"}) + "\n")
    ran = []

    def one(architecture: Architecture, limit: float) -> dict[str, Any]:
        ran.append(architecture.name)
        return {"name": architecture.name, "status": "trained", "seconds": 1.0}

    both = [Architecture(f"torch/{name}", _built) for name in "ab"]
    monkeypatch.setattr(command, "catalogue", lambda layers: both)
    monkeypatch.setattr(command, "preload", lambda: None)
    monkeypatch.setattr(command, "in_a_process", one)
    monkeypatch.setattr("sys.argv", ["sweep", "--out", str(out)])
    with pytest.raises(SystemExit) as exit_code:
        command.main()
    assert exit_code.value.code == 0
    assert ran == ["torch/b"]
    assert len(out.read_text().splitlines()) == 2
    assert "2 tried: 1 skipped, 1 trained" in capsys.readouterr().out


def test_widths_shrink_by_one_factor_and_a_layer_of_every_kind_stays() -> None:
    small = shrink(
        {
            "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 50000,
            "intermediate_size": 1407, "num_hidden_layers": 4, "eos_token_id": 49999,
            "image_token_id": 49998, "layer_types": ["a", "a", "b", "a"], "bos_token_id": 1,
            "text_config": {"n_embd": 256, "n_layer": 6},
        },
        8, 1,
    )  # fmt: skip
    assert small["hidden_size"] == small["num_attention_heads"] * small["head_dim"] == 64
    assert small["layer_types"] == ["a", "b"]
    assert small["num_hidden_layers"] == 2
    assert small["intermediate_size"] % 8 == 0
    assert small["vocab_size"] == VOCAB
    assert small["bos_token_id"] == 1
    assert small["eos_token_id"] != small["image_token_id"] < VOCAB
    assert small["text_config"] == {"n_embd": 32, "n_layer": 1}
