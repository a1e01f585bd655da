"""A limit on the error that holds along a training, not only where it was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pamm_testing.zoo import without_dropout
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile
from pamm_compile import InvalidOptionError, Pamm, Quantized, Recommendation
from pamm_compile.inspect.fidelity import root_mean_square
from pamm_compile.inspect.recommend import LIMITS
from pamm_compile.methods.base import Method

LIMIT = 0.2
MARGIN = 2
METHODS = (Pamm(32), Pamm(8), Quantized(4))


class Texts:
    """Batches of this package's own code, in bytes."""

    def __init__(self) -> None:
        files = sorted(Path(pamm_compile.__file__).parent.rglob("*.py"))
        text = bytearray(b"".join(path.read_bytes() for path in files))
        self._bytes = torch.frombuffer(text, dtype=torch.uint8).long()
        self._generator = torch.Generator().manual_seed(0)

    def batch(self) -> dict[str, Tensor]:
        starts = torch.randint(len(self._bytes) - 64, (8,), generator=self._generator)
        ids = torch.stack([self._bytes[start : start + 64] for start in starts])
        return {"input_ids": ids, "labels": ids}


def _model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    return without_dropout(LlamaForCausalLM(config))


def _errors(found: Recommendation, model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """Return the error of the method chosen for each target, on a batch never seen."""
    chosen = [method for method in found.rules.values() if method is not None]
    now = pamm_compile.fidelity(model, methods=tuple(dict.fromkeys(chosen)), draws=2, **batch)
    return [
        root_mean_square(row.error for row in rows)
        for (target, method), rows in now.by_target().items()
        if str(found.rules[target]) == method
    ]


def _worst_along_training(methods: Sequence[Method], *, renewed: bool) -> float:
    model, texts = _model(), Texts()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    worst = 0.0
    found = pamm_compile.recommend(
        model, max_error=LIMIT, margin=MARGIN if renewed else 1, methods=methods, **texts.batch()
    )
    for step in range(1, 49):
        model(**texts.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if renewed and step in (1, 2, 4, 8, 16, 32):
            found = found.renewed(model, **texts.batch())
        if step in (3, 6, 12, 24, 40, 48):
            worst = max(worst, *_errors(found, model, texts.batch()))
    return worst


@pytest.mark.everything
def test_a_limit_holds_where_it_is_renewed_as_steps_double() -> None:
    assert 0 < _worst_along_training(METHODS, renewed=True) <= LIMIT


@pytest.mark.everything
def test_a_limit_that_is_not_renewed_is_of_its_moment() -> None:
    """What the docs warn of."""
    assert _worst_along_training(METHODS[:2], renewed=False) > LIMIT


def test_a_margin_is_kept() -> None:
    model, batch = _model(), Texts().batch()
    found = pamm_compile.recommend(model, max_error=0.3, margin=3, methods=METHODS, **batch)
    narrow = pamm_compile.recommend(model, max_error=0.1, methods=METHODS, **batch)
    assert found.rules == narrow.rules
    assert found.renewed(model, **batch).rules == found.rules
    assert "0.3 / 3" in found.text()

    was_worse = dict.fromkeys(found.worst, 0.2)
    again = dataclasses.replace(found, worst=was_worse).renewed(model, **batch)
    assert set(again.rules.values()) == {None}
    assert min(again.worst.values()) >= 0.2


def test_a_task_sets_the_limit_that_was_measured_for_it() -> None:
    model, batch = _model(), Texts().batch()
    tuned, scratch = (
        pamm_compile.recommend(model, task=task, methods=METHODS, draws=1, **batch)
        for task in ("tuning", "scratch")
    )
    for task, found in (("tuning", tuned), ("scratch", scratch)):
        assert found.max_error == LIMITS[task]
        assert f"error at most {LIMITS[task]} ({task})" in found.text()
        assert found.to_dict()["task"] == task
        chosen = {(target, str(method)) for target, method in found.rules.items() if method}
        assert chosen
        assert all(found.worst[each] <= LIMITS[task] for each in chosen)
    assert tuned.rules != scratch.rules


@pytest.mark.parametrize("margin", [0.5, float("nan"), float("inf"), True, "2"])
def test_margins_that_mean_nothing_are_refused(margin: object) -> None:
    with pytest.raises(InvalidOptionError, match="margin="):
        pamm_compile.recommend(_model(), max_error=0.3, margin=margin)  # type: ignore[arg-type]
