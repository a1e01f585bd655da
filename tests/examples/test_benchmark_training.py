"""The benchmark of training steps: a whole run, its verdicts, and the paper's table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pamm_testing.programs import EXAMPLES, assert_finite, run

ARMS = [
    "eager",
    "compile",
    "compile + budget 0.99",
    "compile + budget 0.8",
    "compile + budget 0.5",
    "compile + aggressive recomputation",
    "compile + checkpointing",
    "PAMM",
    "PAMM + budget 0.99",
    "PAMM + budget 0.8",
    "PAMM + budget 0.5",
]
CHOSEN = [
    "eager",
    "compile",
    "compile + budget 0.99",
    "compile + checkpointing",
    "PAMM",
    "PAMM + budget 0.99",
]


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    # The reference is among the arms without being asked for.
    arms = ("--arms", *(name for name in CHOSEN if name != "compile"))
    options = ("--preset", "ci", "--threads", "1", "--seeds", "1", *arms)
    printed = run("benchmark_training.py", *options, "--out", tmp_path)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert_finite(record)
    assert record["arms"] == CHOSEN
    assert record["skipped"] == []
    assert record["left_out"] == ["llama-350m", "llama-1b", "gpt2", "roberta"]
    for fact in ("machine", "memory", "torch", "transformers", "pamm-compile"):
        assert record["environment"][fact]
    model = record["models"]["llama-60m"]
    assert "1 of 8 layers, 64 of 512 features" in model["cuts"]
    arms = model["arms"]
    assert list(arms) == CHOSEN
    written = (tmp_path / "benchmark.md").read_text()
    for name, arm in arms.items():
        assert "error" not in arm, name
        assert "not_timed" not in arm, name
        assert len(arm["times_s"]) == 3
        assert all(seconds > 0 for seconds in arm["times_s"])
        ratio = arm["time_ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert 0 < arm["saved_bytes"] < arm["allocator_peak_bytes"]
        assert arm["peak_bytes"] > 0
        assert len(arm["peaks_bytes"]) == 3
        assert arm["peak_source"]
        # Nothing has been updated, and no arm changes the forward pass.
        assert arm["loss"] == pytest.approx(arms["eager"]["loss"], abs=1e-4)
        assert f"| {name} |" in written
        assert name in printed
    for name in ("PAMM", "PAMM + budget 0.99"):
        by_exact = arms[name]["time_ratio_at_same_setting"]
        assert 0 < by_exact["low"] <= by_exact["median"] <= by_exact["high"]
        assert f"| {name} by {name.replace('PAMM', 'compile')} |" in written
    assert arms["compile"]["time_ratio"]["median"] == 1
    exact, pamm = arms["compile"], arms["PAMM"]
    assert pamm["compressed_sites"] == 1
    assert exact["saved_bytes"] - pamm["saved_bytes"] == (
        pamm["qkv_bytes_before"] - pamm["qkv_bytes_after"]
    )
    assert pamm["qkv_bytes_before"] == 512 * 64 * 4
    assert arms["compile + checkpointing"]["saved_bytes"] < exact["saved_bytes"]
    _check_verdicts(model)
    (tmp_path / "benchmark.md").unlink()
    run("benchmark_training.py", "--read", tmp_path / "benchmark.json")
    assert (tmp_path / "benchmark.md").read_text() == written
    assert list(model["quality"]) == ["1"]
    for seed in model["quality"].values():
        assert list(seed) == ["compile", "PAMM, ratio 32"]
        assert all(len(each["losses"]) == 3 for each in seed.values())
        # The same weights and the same data, before the first update.
        first = [each["losses"][0] for each in seed.values()]
        assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert (tmp_path / "frontier-llama-60m.png").read_bytes().startswith(b"\x89PNG")


def _check_verdicts(model: dict[str, Any]) -> None:
    for metric in ("peak", "saved"):
        assert model["pareto"][metric]
        verdicts = model["verdicts"][metric]
        assert list(verdicts) == [name for name in CHOSEN if name.startswith("PAMM")]
        for found in verdicts.values():
            named = [arm for arms in found.values() for arm in arms]
            assert sorted(named) == sorted(n for n in CHOSEN if not n.startswith("PAMM"))


@pytest.fixture
def benchmark_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.usefixtures("benchmark_package")
def test_verdicts() -> None:
    from benchmark.verdict import Figures, verdict

    steady, faster, slower = [1.0, 1.1, 1.0, 1.1], [0.8, 0.9, 0.8, 0.9], [1.5, 1.6, 1.5, 1.6]
    # Faster in half of the rounds and slower in the other half.
    noisy = [0.9, 1.2, 0.9, 1.2]
    figures = {
        "arm": Figures(1000, steady),
        "larger": Figures(1100, steady),
        "slower": Figures(1000, slower),
        "smaller": Figures(900, noisy),
        "same": Figures(1005, noisy),
        "faster, larger": Figures(1100, faster),
        "faster": Figures(995, faster),
    }
    assert verdict("arm", figures, list(figures)[1:]) == {
        "dominates": ["larger", "slower"],
        "dominated_by": ["smaller", "faster"],
        "tie": ["same"],
        "trade_off": ["faster, larger"],
    }


@pytest.mark.usefixtures("benchmark_package")
def test_ratios_are_paired_by_round() -> None:
    from benchmark.verdict import compare_time, paired_ratios, quartiles

    # The machine slows down three times over; the first arm stays a tenth faster throughout.
    assert paired_ratios([0.9, 2.7], [1.0, 3.0]) == pytest.approx([0.9, 0.9])
    assert compare_time([0.9, 2.7, 1.8], [1.0, 3.0, 2.0]) == -1
    assert compare_time([1.0, 3.0, 2.0], [0.9, 2.7, 1.8]) == 1
    # Faster by the median, but not in three rounds of four.
    assert compare_time([0.8, 0.9, 0.95, 1.05, 1.1], [1.0] * 5) == 0
    assert compare_time([1.2, 1.1, 1.05, 0.95, 0.9], [1.0] * 5) == 0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.5]) == (1.5, 1.5, 1.5)


@pytest.mark.usefixtures("benchmark_package")
def test_pareto() -> None:
    from benchmark.verdict import pareto

    points = {
        "fast": (10.0, 1.0),
        "small": (1.0, 10.0),
        "between": (5.0, 5.0),
        "same as between": (5.0, 5.0),
        "worse than between": (5.0, 6.0),
        "worse than all": (11.0, 11.0),
    }
    assert pareto(points) == ["small", "between", "same as between", "fast"]


@pytest.mark.usefixtures("benchmark_package")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_of_the_step_alone() -> None:
    # In a process of its own, whose allocator gives freed blocks back at once.
    code = (
        "import torch; from benchmark import peak\n"
        "def step(): a = torch.ones(2**24); del a; b = torch.ones(2**23); return b.sum()\n"
        # Free memory between blocks in use must not hide what the step takes.
        "small = [torch.ones(10_000) for _ in range(4000)]; held = small[::2]; del small\n"
        "step(); held += [torch.ones(2**25)]\n"
        "gaps = [torch.ones(10_000) for _ in range(4000)]; held += gaps[-1:]; del gaps\n"
        "print(*peak.measure(step, 'cpu'), peak._sampled(step), sep='\\n')"
    )
    from benchmark import peak

    environment = {**os.environ, **peak.MALLOC, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    high_water, source, sampled = done.stdout.splitlines()
    assert source == peak.HIGH_WATER
    assert int(high_water) == pytest.approx(2**26, rel=0.02)
    assert int(sampled) <= int(high_water) * 1.02


@pytest.mark.parametrize(("ratio", "k"), [("128", 4), ("256", 2), ("512", 1)])
def test_paper_table(ratio: str, k: int, paper_table: dict[str, Any]) -> None:
    row = paper_table["models"]["llama-60m"]["qkv"][ratio]
    tokens, width, layers = 512, 64, 2
    assert row["compressed_sites"] == layers
    assert row["generators"] == k
    assert row["exact_bytes"] == layers * tokens * width * 2
    assert row["generator_bytes"] == layers * k * width * 2
    # One byte for f and two for α, for every token.
    assert row["index_and_scale_bytes"] == layers * tokens * (1 + 2)
    assert row["all_bytes"] == layers * (k * width * 2 + tokens * 3)
    assert row["partition_difference_bytes"] == row["exact_bytes"] - row["all_bytes"]
    # X is gone; C, f and α are there.
    blocks = Counter({int(size): count for size, count in row["partition_blocks"].items()})
    expected = Counter({tokens * width * 2: -layers})
    for size in (k * width * 2, tokens, tokens * 2):
        expected[size] += layers
    assert blocks == expected


@pytest.fixture(scope="module")
def paper_table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("table")
    size = ("--layers", "2", "--width", "64", "--vocabulary", "256", "--tokens", "512")
    printed = run("paper_table.py", "--models", "llama-60m", *size, "--only", "qkv", "--out", out)
    assert "| LLaMA-60M | 1/512 | 1 |" in printed
    record: dict[str, Any] = json.loads((out / "partitions-qkv.json").read_text())
    assert_finite(record)
    return record


@pytest.mark.usefixtures("benchmark_package")
def test_what_every_arm_saves_of_a_fake_model() -> None:
    from benchmark import partitions
    from benchmark.shapes import SHAPES, Case

    shape = SHAPES["llama-60m"]._replace(layers=1, width=64, vocabulary=300)
    case = Case("llama-60m", shape, batch=2, dtype=partitions.WEIGHTS)
    arms = dict(partitions.frontier(case))
    assert list(arms) == ARMS
    exact = arms["compile"]
    # 512 tokens of 64 features, less two generators, a byte and a bfloat16 a token.
    saving = 512 * 64 * 2 - (2 * 64 * 2 + 512 * 3)
    assert exact["saved_bytes"] - arms["PAMM"]["saved_bytes"] == saving
    assert exact["head_bytes"] == 512 * 300 * 2
    assert arms["compile + budget 0.99"]["saved_bytes"] < exact["saved_bytes"]
    assert arms["compile + checkpointing"]["saved_bytes"] < exact["saved_bytes"] / 2
    assert exact["saved_bytes"] < arms["eager"]["saved_bytes"]
    assert [name for name, arm in arms.items() if arm["compressed_sites"]] == [
        name for name in ARMS if name.startswith("PAMM")
    ]


def test_table_of_targets(tmp_path: Path) -> None:
    size = ("--layers", "1", "--width", "64", "--vocabulary", "257", "--tokens", "512")
    printed = run(
        "paper_table.py", "--models", "llama-60m", *size, "--ratio", "128", "--only", "targets",
        "--budgets", "1", "--out", tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "partitions-targets.json").read_text())
    rows = record["models"]["llama-60m"]["targets"]
    exact, qkv = rows.pop("compile"), rows["Q, K, V"]
    b, n, k, inner = 512, 64, 4, 1376
    assert exact["saved_flops"] == 0
    assert exact["weight_flops"] == 6 * b * (4 * n * n + 3 * n * inner + 257 * n)
    assert qkv["saved_flops"] == 2 * b * n * 3 * n - 2 * (b * k * n + b * 3 * n + k * 3 * n * n)
    assert qkv["saved_bytes"]["1"] == exact["saved_bytes"]["1"] - (b * n - k * n) * 2 + 3 * b
    assert [row["compressed_sites"] for row in rows.values()] == [1, 1, 2, 2, 3]
    both = rows["Q, K, V, gate, up"]
    assert both["saved_flops"] == qkv["saved_flops"] + rows["gate, up"]["saved_flops"]
    assert all(f"LLaMA-60M: {name} |" in printed for name in rows)
