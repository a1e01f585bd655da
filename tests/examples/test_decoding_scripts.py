"""The example and the benchmarks of generation, tiny: what they print and leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pamm_testing.programs import assert_finite

from pamm_compile import decoding

Run = Callable[..., str]
BENCHMARKS = "benchmarks/decoding"


@pytest.fixture
def recalls(run_here: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "recall"
    options = ("--out", folder, "--scale", 0.005, "--longest", 64)
    assert "saved in" in run_here(f"{BENCHMARKS}/recall.py", *options)
    return folder


def records(path: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert_finite(found)
    return found


def test_budgets_evolution_and_ranks(run_here: Run, recalls: Path, tmp_path: Path) -> None:
    out = tmp_path / "budgets.jsonl"
    small = ("--lengths", 64, "--budgets", 0.75, "--contexts", 2, "--facts", 3, "--text", 3)
    run_here(f"{BENCHMARKS}/budgets.py", recalls, *small, "--out", out)
    full, *others = records(out)
    assert full["method"] == "full"
    assert len(others) == 8
    for each in others:
        assert each["budget"] == 48
        assert each["text_loss"] == pytest.approx(full["text_loss"], abs=1.0)
    out.unlink()
    methods = ("--methods", "policy", "keydiff", "pages", "--bytes")
    run_here(f"{BENCHMARKS}/budgets.py", recalls, *small, *methods, "--out", out)
    full, *others = records(out)
    # Pages hold every token, so that no budget in bytes is theirs.
    assert [each["method"] for each in others] == ["policy", "keydiff"]
    for each in others:
        assert each["budget"] < 48  # type: ignore[operator]
        assert each["cache_bytes"] <= 0.8 * full["cache_bytes"]  # type: ignore[operator]
    assert "drawn in" in run_here(f"{BENCHMARKS}/picture.py", out)
    assert out.with_suffix(".png").stat().st_size > 1000

    policy = tmp_path / "policy.json"
    few = ("--generations", 2, "--population", 3, "--length", 64, "--facts", 3, "--contexts", 1)
    printed = run_here(f"{BENCHMARKS}/evolution.py", recalls, *few, "--out", policy)
    assert "7 evaluations" in printed
    assert decoding.EvictionPolicy.load(policy).flat().abs().max() > 0

    out = tmp_path / "ranks.jsonl"
    few = ("--ranks", 32, 8, "--tune", 1, "--length", 64, "--windows", 2)
    more = ("--from-nothing", 8, "--steps", 2, "--out", out)
    run_here(f"{BENCHMARKS}/ranks.py", recalls, *few, *more)
    whole, same, tuned, less, _, full, thin = records(out)
    assert same["answer_loss"] == pytest.approx(whole["answer_loss"], abs=1e-4)
    assert tuned["answer_loss"] != same["answer_loss"]
    assert less["answer_loss"] != same["answer_loss"]
    # Of 4 layers 4 query and 2 key heads lose 24 of 32 dimensions, each of 128 inputs.
    assert full["parameters"] - thin["parameters"] == 4 * 6 * 24 * 128  # type: ignore[operator]


def test_models(run_here: Run, tmp_path: Path) -> None:
    out = tmp_path / "models.jsonl"
    run_here(f"{BENCHMARKS}/models.py", "--only", "granite", "gpt_neox", "--out", out)
    neox, granite = records(out)
    assert granite["caches"] == granite["factor_keys"] == "yes"
    assert "keyword arguments" in str(neox["caches"])


def test_times(run_here: Run, tmp_path: Path) -> None:
    out = tmp_path / "times.jsonl"
    small = ("--layers", 3, "--hidden", 32, "--heads", 2, "--rounds", 2, "--budget", 64)
    run_here(f"{BENCHMARKS}/times.py", "--lengths", 128, *small, "--out", out)
    found = {r["arm"]: r for r in records(out)}
    assert len(found) == 6
    # 129 tokens and two more, of keys of a quarter of their width and whole values.
    full, thin = (found[arm]["cache_bytes"] for arm in ("full", "factored, pairs"))
    assert thin / full == (1 / 4 + 1) / 2  # type: ignore[operator]


def test_generate(run_here: Run) -> None:
    printed = run_here(
        "generate.py",
        *(
            "--train-steps",
            2,
            "--prompt-tokens",
            300,
            "--budget",
            64,
            "--new-tokens",
            6,
            "--read",
            4,
        ),
    )
    counts = r"reads (\d+) of 4 alike, writes (\d+) of 6"
    rows = re.findall(rf"^(\S.*?) +{counts} +([\d.]+) MiB +[\d.]+ ms a token$", printed, re.M)
    assert len(rows) == 9
    assert rows[0][:3] == ("everything", "4", "6")
    held = {name: float(mebibytes) for name, _, _, mebibytes in rows}
    # Half of the keys' width, and a cosine or sine for each dimension once for 8 heads of 4 layers.
    share = (1 / 2 + 1 / 8 + 1) / 2
    assert held["factored keys, rank 16 of 32"] == pytest.approx(
        share * held["everything"], abs=0.02
    )
    assert held["window with sinks"] < held["everything"] / 3
