"""The benchmark of training steps: a whole run, its verdicts, and the paper's table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pamm_testing.programs import CHECKOUT, EXAMPLES, assert_finite, run

from examples.benchmarks import compile_time, full_size, partitions, peak, processes, steps, worker
from examples.benchmarks.arms import ARMS, by_name
from examples.benchmarks.models import SHAPES, WEIGHTS, Case
from examples.benchmarks.timing import paired_ratios, quartiles
from examples.benchmarks.verdict import Figures, compare_time, pareto, verdict

Run = Callable[..., str]
CHOSEN = ["compile", "PAMM", "compile + checkpointing"]


def scripts() -> list[Path]:
    modules = [
        p for room in ("benchmarks", "studies") for p in sorted((EXAMPLES / room).glob("*.py"))
    ]
    return [path for path in modules if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_every_script_finds_its_checkout_in_the_same_way(path: Path) -> None:
    lines = (
        "if not __package__:\n"
        "    # Run by its path; see this package's docstring.\n"
        "    sys.path[0] = str(Path(__file__).resolve().parents[2])\n"
    )
    text = path.read_text()
    assert lines in text
    assert text.index(lines) < text.index("from examples.")


def test_what_a_user_runs_imports_no_study() -> None:
    modules = list((EXAMPLES / "benchmarks").rglob("*.py"))
    assert len(modules) > 20
    imports = re.compile(r"^\s*(from|import) examples\.studies", re.M)
    assert not [path for path in modules if imports.search(path.read_text())]


def test_a_script_runs_from_a_plain_checkout(tmp_path: Path) -> None:
    """From any folder, without PYTHONPATH, and the package is that of the checkout."""
    code = (
        "import runpy, sys; sys.argv = ['partitions.py', '--help']\n"
        f"sys.path[0] = {str(EXAMPLES / 'benchmarks')!r}\n"
        f"try: runpy.run_path({str(EXAMPLES / 'benchmarks' / 'partitions.py')!r}, "
        "run_name='__main__')\n"
        "except SystemExit: print(sys.modules['pamm_compile'].__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(CHECKOUT)


@pytest.mark.slow
@pytest.mark.everything
def test_a_whole_run(tmp_path: Path) -> None:
    # The reference is among the arms without being asked for.
    arms = ("--arms", *(name for name in CHOSEN if name != "compile"))
    options = ("--preset", "ci", "--threads", "1", "--seeds", "1", "--base", "aot_eager", *arms)
    printed = run("benchmarks/steps.py", *options, "--out", tmp_path)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert_finite(record)
    assert record["arms"] == CHOSEN
    assert record["skipped"] == []
    assert record["left_out"] == [name for name in SHAPES if name != "llama-60m"]
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
        assert arm["loss"] == pytest.approx(arms["compile"]["loss"], abs=1e-4)
        assert f"| {name} |" in written
        assert name in printed
    by_exact = arms["PAMM"]["time_ratio_at_same_setting"]
    assert 0 < by_exact["low"] <= by_exact["median"] <= by_exact["high"]
    assert "| PAMM by compile |" in written
    assert arms["compile"]["time_ratio"]["median"] == 1
    exact, pamm = arms["compile"], arms["PAMM"]
    assert pamm["compressed_sites"] == 1
    assert exact["saved_bytes"] - pamm["saved_bytes"] == (
        pamm["inputs_bytes_before"] - pamm["inputs_bytes_after"]
    )
    assert pamm["inputs_bytes_before"] == 512 * 64 * 4
    assert arms["compile + checkpointing"]["saved_bytes"] < exact["saved_bytes"]
    _check_verdicts(model)
    (tmp_path / "benchmark.md").unlink()
    steps.write_again(tmp_path / "benchmark.json")
    assert (tmp_path / "benchmark.md").read_text() == written
    assert list(model["quality"]) == ["1"]
    for seed in model["quality"].values():
        assert list(seed) == ["compile", "PAMM"]
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


def test_verdicts() -> None:
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


def test_ratios_are_paired_by_round() -> None:
    # The machine slows down three times over; the first arm stays a tenth faster throughout.
    assert paired_ratios([0.9, 2.7], [1.0, 3.0]) == pytest.approx([0.9, 0.9])
    assert compare_time([0.9, 2.7, 1.8], [1.0, 3.0, 2.0]) == -1
    assert compare_time([1.0, 3.0, 2.0], [0.9, 2.7, 1.8]) == 1
    # Faster by the median, but not in three rounds of four.
    assert compare_time([0.8, 0.9, 0.95, 1.05, 1.1], [1.0] * 5) == 0
    assert compare_time([1.2, 1.1, 1.05, 0.95, 0.9], [1.0] * 5) == 0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.5]) == (1.5, 1.5, 1.5)


def test_pareto() -> None:
    points = {
        "fast": (10.0, 1.0),
        "small": (1.0, 10.0),
        "between": (5.0, 5.0),
        "same as between": (5.0, 5.0),
        "worse than between": (5.0, 6.0),
        "worse than all": (11.0, 11.0),
    }
    assert pareto(points) == ["small", "between", "same as between", "fast"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_of_the_step_alone() -> None:
    # In a process of its own, whose allocator gives freed blocks back at once.
    code = (
        "import torch; from examples.benchmarks import peak\n"
        "def step(): a = torch.ones(2**24); del a; b = torch.ones(2**23); return b.sum()\n"
        # Free memory between blocks in use must not hide what the step takes.
        "small = [torch.ones(10_000) for _ in range(4000)]; held = small[::2]; del small\n"
        "step(); held += [torch.ones(2**25)]\n"
        "gaps = [torch.ones(10_000) for _ in range(4000)]; held += gaps[-1:]; del gaps\n"
        "print(*peak.measure(step, 'cpu'), peak._sampled(step), sep='\\n')"
    )
    environment = {**os.environ, **peak.MALLOC, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    high_water, source, sampled = done.stdout.splitlines()
    assert source == peak.HIGH_WATER
    assert int(high_water) == pytest.approx(2**26, rel=0.02)
    assert int(sampled) <= int(high_water) * 1.02


def test_the_papers_table(run_here: Run, tmp_path: Path) -> None:
    size = ("--layers", "1", "--width", "64", "--vocabulary", "256", "--tokens", "512")
    options = ("--models", "llama-60m", *size, "--only", "qkv", "--out", tmp_path)
    printed = run_here("benchmarks/partitions.py", *options)
    assert "| LLaMA-60M | 1/512 | 1 |" in printed
    record = json.loads((tmp_path / "partitions-qkv.json").read_text())
    assert_finite(record)
    rows = record["models"]["llama-60m"]["qkv"]
    for ratio, k in {"128": 4, "256": 2, "512": 1}.items():
        _check_row(rows[ratio], k, tokens=512, width=64, layers=1)


def _check_row(row: dict[str, Any], k: int, *, tokens: int, width: int, layers: int) -> None:
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


def test_what_every_arm_saves_of_a_fake_model() -> None:
    shape = SHAPES["llama-60m"]._replace(layers=1, width=64, vocabulary=300)
    case = Case("llama-60m", shape, batch=2, dtype=WEIGHTS)
    chosen = ("compile", "PAMM", "compile + budget 0.99", "PAMM + budget 0.99", "eager")
    names = [*chosen, "compile + checkpointing"]
    arms = dict(full_size.frontier(case, [by_name(name) for name in names]))
    assert list(arms) == names
    exact = arms["compile"]
    # 512 tokens of 64 features, less two generators, a byte and a bfloat16 a token.
    saving = 512 * 64 * 2 - (2 * 64 * 2 + 512 * 3)
    assert exact["saved_bytes"] - arms["PAMM"]["saved_bytes"] == saving
    assert exact["head_bytes"] == 512 * 300 * 2
    assert arms["compile + budget 0.99"]["saved_bytes"] < exact["saved_bytes"]
    assert arms["compile + checkpointing"]["saved_bytes"] < exact["saved_bytes"] / 2
    assert exact["saved_bytes"] < arms["eager"]["saved_bytes"]
    compressed = [name for name, arm in arms.items() if arm["compressed_sites"]]
    assert compressed == ["PAMM", "PAMM + budget 0.99"]


@pytest.mark.everything
def test_arms_that_are_nearly_exact_keep_half_of_what_they_keep() -> None:
    shape = SHAPES["llama-60m"]._replace(layers=1, width=64, vocabulary=300)
    case = Case("llama-60m", shape, batch=32, dtype=WEIGHTS)
    names = ["compile", "8 bits", "gradient subspace", "torch's 8 bits"]
    arms = dict(full_size.frontier(case, [by_name(name) for name in names]))
    exact, ours, remembered, peer = (arms[name] for name in names)
    kept = ours["inputs_bytes_after"] / ours["inputs_bytes_before"]
    assert 0.5 < kept < 0.52
    assert exact["saved_bytes"] - ours["saved_bytes"] == (
        ours["inputs_bytes_before"] - ours["inputs_bytes_after"]
    )
    # The most of any step, which keeps inputs in 8 bits.
    assert remembered["saved_bytes"] == ours["saved_bytes"]
    # All that is saved in 16 bits, behind linear layers or not, in megabytes or more.
    assert 0.5 < peer["saved_bytes"] / exact["saved_bytes"] < 0.6
    (line,) = [each for each in partitions.inputs_left({"m": {"arms": arms}}) if each]
    assert f"8 bits {kept:.3f}; gradient subspace {kept:.3f}." in line


@pytest.mark.everything
def test_table_of_targets(run_here: Run, tmp_path: Path) -> None:
    size = ("--layers", "1", "--width", "64", "--vocabulary", "257", "--tokens", "512")
    printed = run_here(
        "benchmarks/partitions.py", "--models", "llama-60m", *size, "--ratio", "128",
        "--only", "targets", "--budgets", "1", "--out", tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "partitions-targets.json").read_text())
    rows = record["models"]["llama-60m"]["targets"]
    exact, _, qkv = rows.pop("compile"), rows.pop("whole model"), rows["PAMM on Q, K, V"]
    b, n, k, inner = 512, 64, 4, 1376
    assert exact["saved_flops"] == 0
    assert exact["weight_flops"] == 6 * b * (4 * n * n + 3 * n * inner + 257 * n)
    assert qkv["saved_flops"] == 2 * b * n * 3 * n - 2 * (b * k * n + b * 3 * n + k * 3 * n * n)
    assert qkv["saved_bytes"]["1"] == exact["saved_bytes"]["1"] - (b * n - k * n) * 2 + 3 * b
    assert [row["compressed_sites"] for row in rows.values()] == [1, 1, 2, 2, 3]
    both, mlp = rows["PAMM on Q, K, V, gate, up"], rows["PAMM on gate, up"]
    assert both["saved_flops"] == qkv["saved_flops"] + mlp["saved_flops"]
    assert all(f"LLaMA-60M: {name} |" in printed for name in rows)


def test_nothing_is_forked_off_the_cpu() -> None:
    """Where CUDA was touched, a forked process cannot use it: one that preloads may touch it."""
    assert processes.Processes("cuda", jobs=1).method == "spawn"
    assert processes.Processes("cpu", jobs=1).method in ("forkserver", "spawn")


def test_jobs_share_the_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    measured = {"peak_bytes": 2 * 2**30, "parameters": 2**28}
    # Twice two GiB and twice a GiB of gradients, and one of CUDA's own: two fit into 20.
    assert worker.device_bytes(measured) == 7 * 2**30
    assert processes.jobs_that_fit("cuda", worker.device_bytes(measured), 6) == 2
    assert processes.jobs_that_fit("cuda", 40 * 2**30, 6) == 1
    assert processes.jobs_that_fit("cpu", 40 * 2**30, 6) == 6


def test_what_matters_most_is_measured_first() -> None:
    names = [arm.name for arm in ARMS]
    assert names[:4] == ["compile", "PAMM", "whole model", "compile + budget 0.99"]


@pytest.mark.usefixtures("no_code")
def test_cold_compilation_is_timed_with_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    case = compile_time.layers_case(1)
    found = {name: [worker.cold_compile(case, by_name(name))] for name in ("compile", "PAMM")}
    (exact,), (ours,) = found["compile"], found["PAMM"]
    assert exact["pass_seconds"] == 0
    assert 0 < ours["pass_seconds"] < ours["seconds"]
    assert exact["cpu_seconds"] > 0
    (row,) = compile_time.model_rows({"models": {"deep": found}})
    assert row[0] == "deep: PAMM"
    assert row[1].startswith(f"{ours['seconds'] / exact['seconds']:.3f} (")
    assert len(row) == len(compile_time.MODEL_HEAD)


def test_the_pass_is_timed_by_layers() -> None:
    found = worker.partition_time(compile_time.layers_case(2), by_name("PAMM"))
    assert found["compressed_sites"] == 2
    assert 0 < found["pass_seconds"] < found["seconds"]
    (row,) = compile_time.layer_rows({"layers": {"2": found}})
    assert row[0] == "2"
