"""The methods that the studies compare, and the study programs at toy size."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pamm_compile
from examples.benchmarks import tables
from examples.studies import estimators, quality
from examples.studies.choices import parse
from pamm_compile.methods.base import Method
from pamm_compile.size import Size

Run = Callable[..., str]

TOKENS, FEATURES = 256, 24
TINY = ("--layers", "1", "--hidden", "32", "--heads", "2", "--batch", "2", "--sequence", "64")
FEW = (*TINY, "--steps", "4", "--threads", "1")


def rows(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(seed))


def approximation(method: str, x: Tensor, seed: int = 0) -> Tensor:
    chosen = parse(method).method
    stored = chosen.store(x, torch.tensor(seed), [FEATURES])
    return estimators.approximation(chosen, stored, x)


METHODS = [
    "exact",
    "pamm:16",
    "generators:8:scale=norm:refine=1",
    "rows:16",
    "hidden:8",
    "sketch:16",
    "rows:16+generators:4",
    "generators:fill=13",
    "subspace:8",
    "directions:8",
]


@pytest.mark.parametrize("text", METHODS)
def test_every_method_has_the_protocol(text: str) -> None:
    method = parse(text).method
    assert isinstance(method, Method)
    x, grads = rows(), [rows(1), rows(2)[:, :10]]
    stored = method.store(x, torch.tensor(3), [FEATURES, 10])
    first, second = method.weight_gradients(stored, grads, [False, True])
    approximate = estimators.approximation(method, stored, x)
    torch.testing.assert_close(first, grads[0].T @ approximate, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(second, approximate.T @ grads[1], atol=1e-3, rtol=1e-4)
    size = Size(TOKENS, FEATURES, (FEATURES, 10), torch.float32)
    # Seeds aside: those of torch's generators are not counted anywhere either.
    kept = sum(tensor.nbytes for tensor in stored if tensor.dim() or tensor.dtype != torch.int64)
    assert method.stored_bytes(size) == kept
    assert method.describe(size)


@pytest.mark.parametrize("method", ["exact", "generators:256", "rows:256"])
def test_a_method_of_full_size_is_exact(method: str) -> None:
    x = rows()
    torch.testing.assert_close(approximation(method, x), x, atol=2e-5, rtol=1e-4)


UNBIASED = ["rows:64", "hidden:12", "sketch:64", "rounded:4", "tail:12:4:damp=1"]


# The lottery draws of all 24 directions, so that none is left out for good.
@pytest.mark.parametrize("method", [*UNBIASED, "lottery:6:share=4"])
def test_what_leaves_nothing_out_is_unbiased(method: str) -> None:
    x, draws = rows(), 400
    total = torch.zeros_like(x)
    for seed in range(draws):
        total += approximation(method, x, seed)
    one = (approximation(method, x, 0) - x).norm()
    # Noise of the mean of D draws is that of one by √D; a bias would stay.
    assert (total / draws - x).norm() < 1.3 * one / math.sqrt(draws)


def test_noise_is_as_long_as_asked_for() -> None:
    x, grad = rows(), rows(1)
    exact = grad.T @ x
    method = parse("noise:0.3").method
    found = [
        method.weight_gradients(method.store(x, torch.tensor(seed), [24]), [grad], [False])[0]
        for seed in range(50)
    ]
    assert (found[0] - exact).norm() / exact.norm() == pytest.approx(0.3, rel=0.1)
    assert (torch.stack(found).mean(0) - exact).norm() / exact.norm() < 0.06


def test_unbiased_noise_is_as_long_as_the_error_it_stands_for() -> None:
    x, grad = rows(), rows(1)
    exact = grad.T @ x

    def found(text: str, seed: int) -> torch.Tensor:
        method = parse(text).method
        stored = method.store(x, torch.tensor(seed), [24])
        return method.weight_gradients(stored, [grad], [False])[0]

    noisy = [found("unbiased:6", seed) for seed in range(50)]
    error = (found("directions:6", 0) - exact).norm()
    assert (noisy[0] - exact).norm() == pytest.approx(float(error), rel=0.15)
    assert (torch.stack(noisy).mean(0) - exact).norm() < 0.2 * error


def test_the_mean_of_draws_is_less_wrong_than_one() -> None:
    x = rows()
    one, eight, none = (
        statistics.fmean(float((approximation(text, x, seed) - x).norm()) for seed in range(20))
        for text in ("lottery:6", "lottery:6:draws=8", "directions:12")
    )
    # What no candidate spans stays out in both.
    assert none < eight < one


def test_remedies_keep_what_they_say() -> None:
    x = rows() + 3.0
    assert approximation("restored:4", x).norm() == pytest.approx(float(x.norm()), rel=1e-4)
    torch.testing.assert_close(approximation("centred:2", x).mean(0), x.mean(0))
    # A random direction of the tail takes nothing from the first ones.
    few, more = (approximation(text, x) for text in ("directions:8", "tail:12:4"))
    assert (more - x).norm() < (few - x).norm()
    size = Size(TOKENS, FEATURES, (24,), torch.bfloat16)
    for text in ("tail:12:4", "lottery:8", "centred:8", "restored:8", "rounded:4"):
        assert 0 < parse(text).method.stored_bytes(size) < size.bytes


def test_some_steps_are_exact() -> None:
    chosen = parse("subspace:8@first=2@last=1@every=4")
    assert [step for step in range(10) if chosen.is_exact_in(step, 10)] == [0, 1, 4, 8, 9]
    assert [step for step in range(4) if parse("rows:2@1").is_exact_in(step, 4)] == [0]
    assert all(parse("exact").is_exact_in(step, 4) for step in range(4))


@pytest.mark.parametrize("kind", quality.training.OPTIMIZERS)
def test_optimizers_train_at_a_rate_of_their_own(kind: str) -> None:
    args = quality.parse([*TINY, "--optimizer", kind, "--average", "0.5", "--clip", "2"])
    torch.manual_seed(0)
    model = quality.models.study_model(args)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    text = quality.corpus.Prose()
    losses = quality.train(model, [], parse("exact"), text, 12, 0, args)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert quality.setting(args) != quality.setting(quality.parse([*TINY]))


def test_an_estimator_is_a_rule() -> None:
    """What is compared here can be trained with, compiled, by the same text."""
    model = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    rules = {"qkv": parse("rows:16").method}
    backend = pamm_compile.backend(rules=rules, base="aot_eager", min_tokens=1)
    backend.report.clear()
    torch.compile(model, backend=backend)(torch.randn(4, 16, 32)).sum().backward()
    (site,) = backend.report.compressed
    assert site.method == "Rows(k=16)"
    assert model.self_attn.in_proj_weight.grad.isfinite().all()


def test_pamm_is_the_packages() -> None:
    assert parse("pamm:64").method == pamm_compile.Pamm(64)
    assert parse("generators:8").method == pamm_compile.Pamm(2**31, min_generators=8)
    chosen = parse("generators:8:epsilon=0.5:sampling='uniform'").method
    assert isinstance(chosen, pamm_compile.Pamm)


def test_the_mean_of_draws_is_less_noisy() -> None:
    x = rows()
    one = (approximation("generators:8", x) - x).norm()
    assert (approximation("generators:8:draws=4", x) - x).norm() < one


def test_later_stages_code_what_is_left() -> None:
    x = rows()
    first = approximation("generators:4", x)
    both = approximation("generators:4+generators:16", x)
    assert (both - x).norm() < (first - x).norm()
    refined = approximation("generators:16:refine=1", x)
    plain = approximation("generators:16:draws=1:refine=0:scale=projection", x)
    assert (refined - x).norm() < (plain - x).norm()


def test_scale_rules() -> None:
    x = rows()
    norms = approximation("generators:8:scale=norm", x).norm(dim=1)
    torch.testing.assert_close(norms, x.norm(dim=1))
    unshrunk = approximation("generators:8:scale=unshrunk", x)
    cosine = torch.nn.functional.cosine_similarity(unshrunk, x, dim=1)
    near = cosine.square() > 0.34
    inner = (unshrunk * x).sum(1)[near]
    torch.testing.assert_close(inner, x.square().sum(1)[near], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["generators", "rows", "hidden", "sketch"])
def test_fill_stores_as_much_as_fits(name: str) -> None:
    size = Size(1024, 64, (64,), torch.bfloat16)
    stored = parse(f"{name}:fill=13").method.stored_bytes(size)
    step = {"generators": 64 * 2, "rows": 64 * 2 + 4, "sketch": 64 * 2, "hidden": 2048}
    assert 0 <= 13 * 1024 - stored < step[name]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pam:4", "no method 'pam'"),
        ("rows", "missing 1 required positional argument"),
        ("rows:4:scale=norm", "unexpected keyword argument"),
        ("generators:4:scale=size", "no scale 'size'"),
        ("rows:4@middle=3", "'@middle=3' is none of"),
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
    coders[0].method = parse("generators:4").method
    plain(**batch).loss.backward()
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p.grad, exact[n])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj"}


def test_quality_study(run_here: Run, tmp_path: Path) -> None:
    out = tmp_path / "quality.jsonl"
    options = ("--seeds", "0", "1", "--validation-batches", "1", "--out", out)
    methods = ["exact", "generators:4", "rows:2+generators:4@2"]
    run_here("studies/quality.py", *FEW, "--methods", *methods[:2], *options)
    # The third run alone is missing.
    printed = run_here("studies/quality.py", *FEW, "--methods", *methods, *options)
    runs = tables.records(out)
    assert [(r["seed"], r["method"]) for r in runs] == [
        (0, "exact"), (0, "generators:4"), (1, "exact"), (1, "generators:4"), (0, methods[2]),
        (1, methods[2]),
    ]  # fmt: skip
    for each in runs:
        assert all(math.isfinite(each[key]) for key in ("train", "validation", "bytes_per_token"))
        assert len(each["losses"]) == 4
    by = {(r["seed"], r["method"]): r for r in runs}
    assert by[0, "exact"]["losses"][0] == by[0, "generators:4"]["losses"][0]
    assert by[0, "exact"]["losses"][:3] == by[0, methods[2]]["losses"][:3]
    assert by[0, "generators:4"]["bytes_per_token"] == 3 + 4 * 32 * 2 / 128
    assert by[0, methods[2]]["bytes_per_token"] == 3 + (4 * 32 * 2 + 2 * (32 * 2 + 4)) / 128
    gap = by[1, "generators:4"]["validation"] - by[1, "exact"]["validation"]
    assert f"{gap:+.3f}" in printed


def test_fine_tuning_starts_from_an_exactly_trained_model(run_here: Run, tmp_path: Path) -> None:
    out = tmp_path / "tuning.jsonl"
    options = ("--pretrain", "4", "--seeds", "0", "--validation-batches", "1", "--out", out)
    run_here("studies/quality.py", *FEW, "--methods", "exact", "generators:4", *options)
    exact, pamm = tables.records(out)
    assert exact["losses"][0] == pamm["losses"][0] < math.log(256) - 0.05


def test_fidelity_study(run_here: Run, tmp_path: Path) -> None:
    methods = ("generators:128", "generators:8", "rows:fill=8")
    printed = run_here(
        "studies/fidelity.py", *FEW, "--methods", *methods, "--at", "0", "3",
        "--targets", "linear", "--picture", "generators:8", "--draws", "2", "--out", tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "fidelity-32-seed0.json").read_text())
    assert len(record["rows"]) == 3 * 2 * 7
    assert {row["group"] for row in record["rows"]} == {"qkv", "o", "gate, up", "down"}
    for row in record["rows"]:
        assert all(math.isfinite(row[key]) for key in ("cosine", "error", "bias", "noise"))
        # All 128 rows are generators.
        assert row["method"] != "generators:128" or row["error"] < 0.001
    assert all(f"`{method}`" in printed for method in methods)
    for name in ("fidelity-32-seed0.png", "generators-32.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
