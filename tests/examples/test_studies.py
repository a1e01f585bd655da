"""The methods that the studies compare, and the study programs at toy size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.benchmarks import estimators, quality
from examples.benchmarks.estimators import parse
from pamm_compile.methods.pamm.compression import Compressed, weight_gradients

Run = Callable[..., str]

TOKENS, FEATURES = 256, 24
TINY = ("--layers", "1", "--hidden", "32", "--heads", "2", "--batch", "2", "--sequence", "64")
FEW = (*TINY, "--steps", "4", "--threads", "1")


def rows(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(seed))


def approximation(method: str, x: Tensor, seed: int = 0) -> Tensor:
    stored = parse(method).store(x, estimators.generator_of(seed), torch.float32)
    return torch.stack([each.approximation for each in stored]).sum(0)


@pytest.mark.parametrize("method", ["exact", "pamm:256", "rows:256", "directions:24"])
def test_a_method_of_full_size_is_exact(method: str) -> None:
    x = rows()
    torch.testing.assert_close(approximation(method, x), x, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["rows:64", "hidden:12", "sketch:64"])
def test_sampling_and_sketching_are_unbiased(method: str) -> None:
    x, draws = rows(), 400
    total = torch.zeros_like(x)
    for seed in range(draws):
        total += approximation(method, x, seed)
    one = (approximation(method, x, 0) - x).norm()
    # Noise of the mean of D draws is that of one by √D; a bias would stay.
    assert (total / draws - x).norm() < 1.3 * one / math.sqrt(draws)


def test_pamm_is_what_the_package_computes() -> None:
    x, dz = rows(), rows(1)
    (stored,) = parse("pamm:8").store(x, estimators.generator_of(3), torch.float32)
    generators, index, scale = stored.tensors
    (expected,) = weight_gradients(Compressed(generators, index, scale), [dz], [False])
    torch.testing.assert_close(dz.T @ stored.approximation, expected, atol=1e-4, rtol=1e-4)


def test_the_mean_of_draws_is_less_noisy() -> None:
    x = rows()
    one = (approximation("pamm:8", x) - x).norm()
    assert (approximation("pamm:8,draws=4", x) - x).norm() < one


def test_later_stages_code_what_is_left() -> None:
    x = rows()
    first = approximation("directions:4", x)
    both = approximation("directions:4+pamm:16", x)
    assert (both - x).norm() < (first - x).norm()
    refined = approximation("pamm:16,refine", x)
    assert (refined - x).norm() < (approximation("pamm:16", x) - x).norm()


def test_scale_rules() -> None:
    x = rows()
    norms = approximation("pamm:8,scale=norm", x).norm(dim=1)
    torch.testing.assert_close(norms, x.norm(dim=1))
    plain, unshrunk = (approximation(f"pamm:8{rule}", x) for rule in ("", ",scale=unshrunk"))
    cosine = torch.nn.functional.cosine_similarity(plain, x, dim=1)
    near = cosine.square() > 0.34
    inner = (unshrunk * x).sum(1)[near]
    torch.testing.assert_close(inner, x.square().sum(1)[near], rtol=1e-3, atol=1e-3)


def test_the_gate_keeps_only_near_rows_and_rescales() -> None:
    x = rows()
    kept = approximation("pamm:8,epsilon=0.5", x).norm(dim=1) > 0
    assert 8 <= int(kept.sum()) < TOKENS
    cosine = torch.nn.functional.cosine_similarity(
        approximation("pamm:8,epsilon=0.5", x)[kept], x[kept], dim=1
    )
    assert (cosine.square() >= 0.75 - 1e-5).all()


@pytest.mark.parametrize("name", ["pamm", "rows", "hidden", "sketch", "directions"])
def test_fill_stores_as_much_as_fits(name: str) -> None:
    x = torch.randn(1024, 64)
    kept = parse(f"{name}:fill=13").store(x, estimators.generator_of(0), torch.bfloat16)
    step = {"pamm": 64 * 2, "rows": 64 * 2 + 4, "sketch": 64 * 2, "hidden": 2048}
    room = 13 * 1024 - kept[0].bytes
    assert 0 <= room < step.get(name, 2 * (1024 + 64))
    two = parse(f"directions:2+{name}:fill=13").store(x, estimators.generator_of(0), torch.bfloat16)
    assert sum(each.bytes for each in two) <= 13 * 1024


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pam:4", "no method 'pam'"),
        ("pamm", "needs a size"),
        ("pamm:4,fill=3", "not both"),
        ("pamm:4,scales=norm", "no option 'scales=norm'"),
    ],
)
def test_a_mistaken_method_is_explained(text: str, complaint: str) -> None:
    with pytest.raises(SystemExit, match=complaint):
        parse(text)


def test_coded_layers_change_the_matched_weight_gradients_only() -> None:
    args = quality.parse([*TINY])
    torch.manual_seed(0)
    plain = quality.models.study_model(args)
    batch = {"input_ids": torch.randint(256, (2, 64)), "labels": torch.randint(256, (2, 64))}
    plain(**batch).loss.backward()
    exact = {name: p.grad.clone() for name, p in plain.named_parameters()}
    plain.zero_grad()
    coders = quality.replace_projections(plain, quality.TARGETS["qkv"])
    assert len(coders) == 1
    coders[0].method = parse("pamm:4")
    plain(**batch).loss.backward()
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p.grad, exact[n])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj"}


def test_quality_study(run_here: Run, tmp_path: Path) -> None:
    out = tmp_path / "quality.jsonl"
    options = ("--seeds", "0", "1", "--validation-batches", "1", "--out", out)
    methods = ["exact", "pamm:4", "directions:2+pamm:fill=16@2"]
    run_here("benchmarks/quality.py", *FEW, "--methods", *methods[:2], *options)
    # The third run alone is missing.
    printed = run_here("benchmarks/quality.py", *FEW, "--methods", *methods, *options)
    runs = quality.records(out)
    assert [(r["seed"], r["method"]) for r in runs] == [
        (0, "exact"), (0, "pamm:4"), (1, "exact"), (1, "pamm:4"), (0, methods[2]), (1, methods[2])
    ]  # fmt: skip
    for each in runs:
        assert all(math.isfinite(each[key]) for key in ("train", "validation", "bytes_per_token"))
        assert len(each["losses"]) == 4
    by = {(r["seed"], r["method"]): r for r in runs}
    assert by[0, "exact"]["losses"][0] == by[0, "pamm:4"]["losses"][0]
    assert by[0, "exact"]["losses"][:3] == by[0, methods[2]]["losses"][:3]
    assert by[0, "pamm:4"]["bytes_per_token"] == 3 + 4 * 32 * 2 / 128
    assert by[0, methods[2]]["bytes_per_token"] <= 16
    gap = by[1, "pamm:4"]["validation"] - by[1, "exact"]["validation"]
    assert f"{gap:+.3f}" in printed


def test_fine_tuning_starts_from_an_exactly_trained_model(run_here: Run, tmp_path: Path) -> None:
    out = tmp_path / "tuning.jsonl"
    options = ("--pretrain", "4", "--seeds", "0", "--validation-batches", "1", "--out", out)
    run_here("benchmarks/quality.py", *FEW, "--methods", "exact", "pamm:4", *options)
    exact, pamm = quality.records(out)
    assert exact["losses"][0] == pamm["losses"][0] < math.log(256) - 0.05


def test_fidelity_study(run_here: Run, tmp_path: Path) -> None:
    methods = ("pamm:128", "pamm:8", "rows:fill=8")
    printed = run_here(
        "benchmarks/fidelity.py", *FEW, "--methods", *methods, "--at", "0", "3",
        "--picture", "pamm:8", "--draws", "2", "--out", tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "fidelity-32-seed0.json").read_text())
    assert len(record["rows"]) == 3 * 2 * 3
    assert {row["projection"] for row in record["rows"]} == {"q_proj", "k_proj", "v_proj"}
    for row in record["rows"]:
        assert all(math.isfinite(row[key]) for key in ("cosine", "error", "bias", "noise"))
        # All 128 rows are generators: only the rounding of what is stored is left.
        assert row["method"] != "pamm:128" or (row["cosine"] > 0.9999 and row["error"] < 0.02)
    assert all(f"`{method}`" in printed for method in methods)
    for name in ("fidelity-32-seed0.png", "generators-32.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
