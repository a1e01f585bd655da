"""Trials of a tiny model, its graphs run operator by operator."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pamm_compile
from pamm_compile import InvalidOptionError, MeasurementError, NothingMatchedError, Trial
from pamm_compile.trials import trial as trials
from pamm_compile.trials.progress import Bar
from pamm_compile.trials.training import orders

STEPS, TOKENS, WIDTH = 8, 64, 16


class Plain(nn.Module):
    """Two layers and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


class Model(nn.Module):
    """These behind dropout, with a buffer that counts calls, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.layers = nn.Dropout(0.1), Plain()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        if self.training:
            self.calls.add_(1)
        return {"loss": self.layers(self.drop(x)).sub(1).square().mean() * scale}


def arm(**options: Any) -> pamm_compile.Backend:
    return pamm_compile.backend(
        **{"rules": "linear=pamm:2", "min_tokens": 1, "base": "aot_eager", "goal": "any"} | options
    )


def batches() -> Iterator[dict[str, Tensor]]:
    """One-shot, without end, and drawn from torch's own generator."""
    # What is left off while it waits must not be off for the arms.
    with torch.no_grad():
        while True:
            yield {"x": torch.randn(TOKENS, WIDTH)}


@torch.no_grad()
def depth(model: nn.Module) -> float:
    """A score."""
    assert not model.training
    return -sum(float(p.abs().sum()) for p in model.parameters())


@pytest.fixture(scope="module")
def found() -> tuple[Trial, nn.Module, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    model = Model().eval()
    model.layers.up.train()
    model.layers.up.weight.grad = torch.ones_like(model.layers.up.weight)
    before = _state(model)
    trial = pamm_compile.trial(
        model,
        batches(),
        backend={"half": arm()},
        steps=STEPS,
        held_out=batches,
        score=depth,
        progress=False,
    )
    return trial, model, before, _state(model)


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "gradients on": torch.is_grad_enabled(),
    }


def test_arms_share_weights_and_batches(found: tuple[Trial, Any, Any, Any]) -> None:
    trial = found[0]
    exact, control, *ours = trial.arms
    assert [a.name for a in trial.arms] == ["exact", "exact, other order", "half"]
    for each in ours:
        # No method changes the forward pass, and dropout draws the same.
        assert each.losses[0] == pytest.approx(exact.losses[0], rel=1e-6)
        assert each.losses[-1] != exact.losses[-1]
        assert each.report is not None
        assert each.report.compressed
        assert 0 < each.memory.saved_bytes < exact.memory.saved_bytes
    # The control has another order, of the same batches.
    assert control.losses[0] != pytest.approx(exact.losses[0], rel=1e-6)
    assert control.loss != exact.loss
    assert exact.time.median == 1
    assert trial.held_out == 16
    assert trial.slope.error < float("inf")
    assert ours[0].score == pytest.approx(depth(found[1].eval()), rel=0.05)  # type: ignore[arg-type]


def test_everything_is_left_as_it_was(found: tuple[Any, Any, dict[str, Any], Any]) -> None:
    _, _, before, after = found
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert before["modes"][0] is False
    assert True in before["modes"]


def test_what_is_shown_and_written(
    found: tuple[Trial, Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = found[0]
    for each in trial.arms:
        assert f"| {each.name} | {each.loss:.4f} |" in str(trial)
    assert trial.verdicts["half"].sentence in str(trial)
    said = trial.save(tmp_path / "new" / "v1.5")
    assert [line.split("/")[-1] for line in said] == ["v1.5.json", "v1.5.png"]
    record = json.loads((tmp_path / "new" / "v1.5.json").read_text())
    assert [len(each["losses"]) for each in record["arms"]] == [STEPS] * 3
    assert set(record["verdicts"]) == {"half"}
    picture = tmp_path / "new" / "v1.5.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "no picture: a picture needs matplotlib" in trial.save(tmp_path / "again")[1]
    assert (tmp_path / "again.json").exists()


def test_own_loss_optimizer_and_tuples() -> None:
    made = []

    def sgd(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        made.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return optimizer, made[-1]

    given = [(torch.randn(TOKENS, WIDTH), 2.0)] * 4
    trial = pamm_compile.trial(
        Plain(),
        given,
        backend=arm(),
        steps=4,
        loss=lambda model, batch: model(batch[0]).square().mean() * batch[1],
        optimizer=sgd,
        dtype="bfloat16",
        progress=False,
    )
    assert trial.held_out == 0
    assert [m.get_last_lr() for m in made] == [[pytest.approx(0.1 / 16)]] * 3
    # All batches are the same, so that nothing is known of noise.
    assert "exact runs are equal" in trial.verdicts["compressed"].sentence
    assert trial["compressed"].report.sites[0].dtype == "bfloat16"  # type: ignore[union-attr]
    assert trial["exact"].score is None


X = torch.randn(TOKENS, WIDTH)


@pytest.mark.parametrize(("steps", "warmup"), [(4, 1), (4, 3), (11, 1), (12, 1), (13, 1), (13, 6)])
def test_steps_that_differ_by_turns_have_quartiles_of_any_number(steps: int, warmup: int) -> None:
    backend = arm(rules=f"linear=gradients:2:every=10:warmup={warmup}")
    trial = pamm_compile.trial(Model(), [X] * steps, backend=backend, steps=steps, progress=False)
    time = trial["compressed"].time
    assert 0 < time.low <= time.median <= time.high


def test_the_step_that_compiles_a_second_graph_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[float]] = []
    ratios = trials._ratios
    monkeypatch.setattr(
        trials, "_ratios", lambda mine, *rest: seen.append(mine) or ratios(mine, *rest)
    )
    backend = arm(rules="linear=gradients:2:every=10:warmup=3")
    trial = pamm_compile.trial(Model(), [X] * 8, backend=backend, steps=8, progress=False)
    seconds = trial["compressed"].seconds
    # The fourth takes the graph along directions for the first time.
    assert seen[-1] == [seconds[2], *seconds[4:]]
    assert seen[0] == list(trial["exact"].seconds[2:])


def _compiled_inside() -> nn.Module:
    model = Model()
    model.layers.compile()
    return model


@pytest.mark.parametrize(
    ("model", "given", "more", "message"),
    [
        (3, [X] * 4, {}, "model=3 is not allowed"),
        (torch.compile(Model()), [X] * 4, {}, "is compiled already"),
        (_compiled_inside(), [X] * 4, {}, "its Plain, is compiled already"),
        (Model().requires_grad_(False), [X] * 4, {}, "nothing to train"),
        (Model(), [X] * 3, {}, "ended after 3, and steps=4"),
        (Model(), {"x": X}, {}, "batches is a mapping of \\['x'\\]. It must be an iterable"),
        (Model(), X, {}, "batches is a tensor of shape"),
        (Model(), lambda: None, {}, "batches is None"),
        (Model(), [X] * 4, {"held_out": []}, "held_out has no batch"),
        (Model(), [X] * 4, {"steps": 3}, "steps=3 is not allowed"),
        (Model(), [X] * 4, {"lr": -1}, "lr=-1 is not allowed"),
        (Model(), [X] * 4, {"clip": 0}, "clip=0 is not allowed"),
        (Model(), [X] * 4, {"dtype": "float16"}, "dtype='float16' is not allowed"),
        (Model(), [X] * 4, {"score": 3}, "score=3 is not allowed"),
        (Model(), [X] * 4, {"optimizer": lambda model: None}, "returned NoneType"),
        (Model(), [X] * 4, {"backend": "inductor"}, "backend='inductor' is not allowed"),
        (Model(), [X] * 4, {"backend": {"exact": arm()}}, "names of exact arms"),
        (Model(), [X] * 4, {"backend": {}}, "is not allowed"),
        (Model(), [X] * 4, {"backend": {"a": arm(), "b": arm(base="inductor")}}, "bases"),
        (Model(), [X] * 4, {"loss": lambda model, batch: batch.sum()}, "no trainable parameter"),
        (Plain(), [X] * 4, {}, "in which there is no scalar loss"),
        (Model(), [X] * 4, {"loss": lambda model, batch: batch}, "loss.model, batch. returned a t"),
    ],
)
def test_mistakes_are_sentences(model: Any, given: Any, more: dict[str, Any], message: str) -> None:
    options = {"backend": arm(), "steps": 4, "progress": False} | more
    with pytest.raises(InvalidOptionError, match=message):
        pamm_compile.trial(model, given, **options)


def test_nothing_compressed_shows_the_reasons() -> None:
    with pytest.raises(NothingMatchedError, match=r"(?s)'compressed' compresses nothing.*TOO_FEW"):
        pamm_compile.trial(Model(), [X] * 4, backend=arm(min_tokens=4096), steps=4, progress=False)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    with pytest.raises(MeasurementError, match="loss is nan in step 1"):
        pamm_compile.trial(Model(), [(X, float("nan"))] * 4, backend=arm(), steps=4, progress=False)


@pytest.mark.parametrize("steps", [4, 5, 100])
def test_the_control_has_another_order(steps: int) -> None:
    for seed in range(20):
        given, other = orders(steps, seed)
        assert sorted(other) == given == list(range(steps))
        assert other != given
        assert other[-1] == given[-1]


def test_a_log_gets_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(sys.stderr)
    for done in range(41):
        bar(done, 40, "loss 1.5")
    bar(40, 40, "measuring exact")
    bar.end()
    *lines, measuring, end = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "trial [########################] 40 of 40 steps, loss 1.5"
    assert measuring.endswith("40 of 40 steps, measuring exact")
    assert re.fullmatch(r"trial: \d+ s", end)


def test_a_terminal_gets_one_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bar = Bar(terminal := Terminal())
    bar(4, 4, "a long thing to do")
    bar(4, 4, "less")
    bar.end()
    first, *lines = terminal.getvalue().split("\r")
    assert first == ""
    assert len({len(line.rstrip("\n")) for line in lines}) == 1
    assert [line.endswith("\n") for line in lines] == [False, False, True]
