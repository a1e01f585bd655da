"""Time to a score, of records whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.benchmarks import score
from examples.benchmarks.score import TASKS, Arm, Task
from examples.studies import errors, tried
from pamm_compile import Pamm
from pamm_compile.rules import make_rules, parse_rules

TASK = TASKS["scratch"]
EXACTLY = Arm("exact")
EXACT = {"exact": (120, 2.0), "exact-5/6": (100, 2.2), "exact-2/3": (80, 2.6)}


def record(arm: str, seed: int, loss: float, steps: int = 120, rate: float = 1e-3) -> Any:
    return {"task": TASK.name, "arm": arm, "seed": seed, "loss": loss, "steps": steps, "rate": rate}


def exact_runs() -> list[Any]:
    return [record(n, s, loss, steps) for n, (steps, loss) in EXACT.items() for s in range(3)]


def rows(records: list[Any]) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in score.table(TASK, records)[2:]]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize(("loss", "steps"), [(2.0, 120), (2.1, 110), (2.4, 90), (1.9, 130)])
def test_a_loss_is_worth_the_steps_of_the_nearest_exact_runs(loss: float, steps: float) -> None:
    curve = [(steps, loss) for steps, loss in EXACT.values()]
    assert score.steps_worth(loss, curve) == pytest.approx(steps)


def test_each_kind_of_step_counts_by_its_share() -> None:
    exact = [1.0] * 12
    # A neighbour that took the machine for one round changes no median.
    mine = [1.2, 0.8, 0.8] * 4
    mine[4] = 9.0
    assert score.step_ratio(mine, exact, 3) == pytest.approx((1.2 + 0.8 + 0.8) / 3)


def test_nearly_exact_steps_at_the_start_count_as_those_of_a_turn() -> None:
    arm = Arm("warm", "linear=gradients:every=4:warmup=5")
    assert (arm.turns, arm.early) == (4, 4)
    assert (EXACTLY.turns, EXACTLY.early) == (1, 0)
    # The steps from the eighth on, of which the ninth is nearly exact.
    mine = [0.8, 1.2, 0.8, 0.8] * 3
    assert score.step_ratio(mine, [1.0] * 12, 4, 0.5) == pytest.approx(0.5 * 1.2 + 0.5 * 0.9)


def test_rates_are_chosen_by_all_seeds_before_one() -> None:
    runs = [record("gradients", s, 2.5, rate=1e-3) for s in range(3)]
    runs.append(record("gradients", 0, 2.4, rate=2e-3))
    assert score.best_rates(runs) == {("scratch", "gradients"): 1e-3}
    assert score.best_rates([runs[-1], record("gradients", 0, 2.5)]) == {
        ("scratch", "gradients"): 2e-3
    }


def test_time_to_a_score_is_steps_by_time_of_a_step() -> None:
    runs = [*exact_runs(), *(record("subspace", seed, 2.1) for seed in range(3))]
    times = {"exact": [2.0] * 10, "subspace": [1.0] * 10}
    saved = {"exact": 2**20, "subspace": 2**19}
    clock = {"task": TASK.name, "times_s": times, "saved_bytes": saved}
    found = rows([*runs, clock])
    loss, gaps, step, mebibytes, mean, by_seed = found["Subspace, rank 1/8"][1:]
    assert (loss, gaps, step, mebibytes) == ("2.1000", "+0.100, +0.100, +0.100", "0.50", "0.5")
    # 120 steps are worth 110 exact ones, and take half of the time each.
    assert (mean, by_seed) == ("0.55", "0.55, 0.55, 0.55")
    assert found["exact"][-2] == "1.00"


def test_exact_steps_at_an_end_count_as_exact_ones() -> None:
    arm = Arm("half of it exact", "linear=subspace", first=0.25, last=0.25)
    setting = Task(**{**vars(TASK), "arms": {**score.EXACT, "mixed": arm}})
    runs = [*exact_runs(), *(record("mixed", seed, 2.0) for seed in range(3))]
    times = {"exact": [2.0] * 10, "mixed": [1.0] * 10}
    clock = {"task": TASK.name, "times_s": times, "saved_bytes": {"exact": 2**21, "mixed": 2**20}}
    *_, step, mebibytes, mean, _ = score.table(setting, [*runs, clock])[-1].strip("| ").split(" | ")
    assert (step, mebibytes, mean) == ("0.75", "2.0", "0.75")


def test_an_arm_without_three_seeds_is_left_out() -> None:
    runs = [*exact_runs(), *(record("subspace", seed, 2.1) for seed in range(2))]
    assert list(rows(runs)) == [TASK.arms[name].label for name in EXACT]


@pytest.mark.parametrize("arms", [TASK.arms["pamm"], errors.METHODS["pamm-64"]])
def test_as_many_generators_are_kept_as_the_name_says(arms: Arm) -> None:
    assert arms.rules is not None
    method = parse_rules(arms.rules)[0].method
    assert isinstance(method, Pamm)
    assert "k = 64" in arms.label
    assert {method.generators(tokens) for tokens in (1024, 2048, 16384)} == {64}


def test_another_order_takes_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def batches(seed: int) -> Any:
        seen.append(seed)
        return TASK.batches(seed)

    setting = Task(**{**vars(TASK), "steps": 0, "batches": batches})
    for order in (0, 2):
        score.train(setting, Arm("exact", order=order), 1, 1e-3, "eager")
    assert seen == [1, 2001]


def test_fewer_seeds_are_shown_where_they_are_asked_for() -> None:
    runs = [*exact_runs(), record("subspace", 1, 2.1)]
    last = score.table(TASK, runs, least=1)[-1]
    assert last.startswith("| Subspace, rank 1/8 | 0.001 | 2.1000 | +0.100 (seed 1) |")


def test_the_ends_of_a_run_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(score, "step", lambda _task, _model, call, *_: seen.append(call))
    setting = Task(**{**vars(TASK), "steps": 10})
    score.train(setting, Arm("half", first=0.1, last=0.2), 0, 1e-3, "eager")
    exact, own = seen[0], seen[4]
    assert exact is not own
    assert [call is exact for call in seen] == [True, *[False] * 7, True, True]


@pytest.mark.parametrize("method", [tried.RandomSubspace(), tried.SomeFeatures()])
def test_directions_by_chance_are_orthonormal_and_others_every_time(
    method: tried.RandomSubspace,
) -> None:
    gradients = [torch.ones(3, 24, 64), torch.ones(3, 40, 64)]
    one, other = method.remember(gradients), method.remember(gradients)
    assert one.shape == (3, 8, 64)
    torch.testing.assert_close(one @ one.mT, torch.eye(8).expand(3, 8, 8))
    assert not torch.equal(one, other)
    is_identity = isinstance(method, tried.SomeFeatures)
    assert ((one == 0) | (one == 1)).all().item() is is_identity


@pytest.mark.parametrize("task", tried.TASKS.values(), ids=tried.TASKS)
def test_the_rules_of_every_arm_are_allowed_and_no_two_alike(task: Task) -> None:
    ours = [arm for arm in task.arms.values() if arm.rules is not None]
    known = {
        (arm.first, arm.last, *(rule.fingerprint for rule in make_rules(arm.rules))) for arm in ours
    }
    assert len(known) == len(ours)
