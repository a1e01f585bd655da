"""Choose methods for a model by the error of its gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pamm_compile import checks
from pamm_compile.errors import InvalidOptionError
from pamm_compile.inspect.fidelity import Fidelity, SiteFidelity, fidelity, root_mean_square
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.methods.quantized.method import Quantized
from pamm_compile.methods.remembered.method import GradientSubspace
from pamm_compile.methods.subspace.method import Subspace

CANDIDATES: tuple[Method, ...] = (
    *(Pamm(ratio) for ratio in (512, 128, 32)),
    *(Subspace(rank) for rank in (0.02, 0.05, 0.1, 0.2, 0.4)),
    Quantized(4),
    Quantized(8),
    *(GradientSubspace(rank) for rank in (0.0625, 0.125, 0.25)),
)
"""What `recommend` tries where nothing else is asked for."""

Task = Literal["tuning", "scratch"]

LIMITS: dict[str, float] = {"tuning": 0.5, "scratch": 0.1}
"""The largest error of gradients by what one does, from runs that were measured.

tuning: an encoder of pretrained weights ends 0.01 of held loss above exact where errors are about a
half (docs/benchmarks/score.jsonl). scratch: from random weights noise of 0.3 costs 0.03 nats in 300
steps and noise of 0.01 nothing (docs/benchmarks/quality-random.jsonl); gaps grow with the steps.
"""

_MATMULS = 3
"""Of a linear layer in a step: forward, and the gradients of input and weight."""


@dataclass(frozen=True)
class Recommendation:
    """Rules for `backend(rules=…)`, and the figures they were chosen by."""

    rules: dict[str, Method | None]
    """{target: method}; None leaves a target exact, since nothing met the error."""
    max_error: float | None
    """None where a time was asked for."""
    fidelity: Fidelity
    worst: dict[tuple[str, str], float]
    """The largest error of each target and method, of all times that were asked for."""
    asked: dict[str, Any]
    """What `recommend` was asked for, besides the model and its batch."""

    def renewed(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Recommendation:
        """Choose again, by the errors now and by all errors found before.

        Equivalent to `recommend(model, …)` with the options that this was made with, where every
        method counts with the largest error that it had at any time.

        Args:
            model: as trained so far; a compiled one is unwrapped.
            args: what to call it with.
            kwargs: what to call it with.

        Returns:
            Rules that are within the limit now; train with these.

        Raises:
            MeasurementError: the model returns no loss, or nothing was found.
        """
        return _recommend(model, self.worst, self.asked, args, kwargs)

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Return the rules, and a table with a line a target and method."""
        chosen = [f"{t}: {'exact' if m is None else m}" for t, m in self.rules.items()]
        margin = self.asked["margin"]
        share = "" if margin == 1 else f" / {margin:g}"
        task = self.asked["task"]
        named = "" if task is None else f" ({task})"
        head = f"error at most {self.max_error}{share}{named}, at the fewest bytes:"
        if self.max_error is None:
            head = (
                f"the least error in {self.asked['time']:g} of a step's time, "
                f"{self.predicted_time:.2f} by a model of it:"
            )
        return "\n".join(
            [head, *(f"  {each}" for each in chosen), "", self.fidelity.text(sites=False)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rules = {t: None if m is None else str(m) for t, m in self.rules.items()}
        asked = {"max_error": self.max_error, **{n: self.asked[n] for n in ("task", "time")}}
        return {"rules": rules, **asked, **self.fidelity.to_dict()}

    @property
    def predicted_time(self) -> float:
        """A step's time with these rules by an exact one's, by a model of it: matmuls alone."""
        chosen = {(t, str(m)) for t, m in self.rules.items() if m is not None}
        return 1 - sum(
            _saved(rows, self.fidelity)
            for key, rows in self.fidelity.by_target().items()
            if key in chosen
        )


def recommend(
    model: torch.nn.Module,
    *args: Any,
    task: Task | None = None,
    max_error: float | None = None,
    time: float | None = None,
    margin: float = 1.0,
    methods: Sequence[Method] = CANDIDATES,
    draws: int = 2,
    loss: Callable[[Any], Tensor] | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Recommendation:
    """Choose the cheapest method of each target whose gradients are close enough, on a real batch.

    Equivalent to calling `fidelity(model, …, methods=methods)`, and choosing for every target the
    method that stores the fewest bytes among those whose error, root mean square over the target's
    sites, is at most `LIMITS[task]` / `margin`, or `max_error` / `margin`. If all are above, the
    target stays exact. The errors are those of this batch and of the weights now; they change in
    training. Call `Recommendation.renewed` whenever the number of steps has doubled, with a margin
    for the steps between. The error of the gradients is not the loss: train a little with the rules
    and without.

    With `time`, it chooses the methods of all targets together: of those that bring a step down to
    so much of its time, by a model, those with the least squares of errors; the fastest where none
    does. Weight gradients count as a third of a step there.

    Args:
        model: any module; a compiled one is unwrapped.
        args: what to call it with.
        task: "tuning" of pretrained weights, or training from random ones, "scratch".
        max_error: ‖dŴ − dW‖ / ‖dW‖ of one step, above 0, in place of the task's limit.
        time: of a step by an exact one's, in (0, 1), in place of a limit of the error.
        margin: factor by which errors may grow until the next choice, at least 1.
        methods: to choose from.
        draws: of every method, at least 1.
        loss: makes a scalar of what the model returns; by default its `loss`, or a scalar itself.
        progress: whether to show a bar, where tqdm is installed; None does in a terminal.
        kwargs: what to call it with.

    Returns:
        Rules for `backend`, the first target first, and the table behind them.

    Raises:
        InvalidOptionError: a value is not allowed.
        MeasurementError: the model returns no loss, or nothing was found.
    """
    if sum(each is not None for each in (task, max_error, time)) != 1:
        raise InvalidOptionError(
            "recommend() needs one of task, which sets the limit of the gradients' error that was "
            "measured for it, max_error, a limit of your own, and time, a share of a step's. For "
            'example task="tuning", max_error=0.2 or time=0.85.'
        )
    limit, within = None, None
    if task is not None:
        checks.choice("task", task, list(LIMITS))
        limit = LIMITS[task]
    if max_error is not None:
        hint = "0.3 asks for gradients within 30 % of the exact ones."
        limit = checks.number("max_error", max_error, "a number above 0", hint)
        if limit <= 0:
            raise checks.refusal("max_error", max_error, "a number above 0", hint)
    if time is not None:
        hint = "0.85 asks for steps that take 0.85 of an exact one's time."
        within = checks.number("time", time, "a number in (0, 1)", hint)
        if not 0 < within < 1:
            raise checks.refusal("time", time, "a number in (0, 1)", hint)
    allowed, more = "a finite number of at least 1", "2 is for errors that may double; 1 for none."
    factor = checks.number("margin", margin, allowed, more)
    if not 1 <= factor < math.inf:
        raise checks.refusal("margin", margin, allowed, more)
    measured = {"methods": tuple(methods), "draws": draws, "loss": loss, "progress": progress}
    asked = {"task": task, "max_error": limit, "time": within, "margin": factor, **measured}
    return _recommend(model, {}, asked, args, kwargs)


def _recommend(
    model: torch.nn.Module,
    before: Mapping[tuple[str, str], float],
    asked: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Recommendation:
    measured = {name: asked[name] for name in ("methods", "draws", "loss", "progress")}
    found = fidelity(model, *args, **measured, **kwargs)
    named = {str(method): method for method in asked["methods"]}
    by_target = found.by_target()
    worst = {key: max(_error(rows), before.get(key, 0.0)) for key, rows in by_target.items()}
    if asked["time"] is not None:
        quick = {
            target: named.get(method)
            for target, method in _in_time(found, worst, asked["time"]).items()
        }
        return Recommendation(quick, None, found, worst, asked)
    allowed = asked["max_error"] / asked["margin"]
    rules: dict[str, Method | None] = {}
    for target in found.targets:
        close = [
            (_bytes(rows), method)
            for (of, method), rows in by_target.items()
            if of == target and worst[of, method] <= allowed
        ]
        # Of equally few bytes the one named first.
        rules[target] = named[min(close, key=lambda pair: pair[0])[1]] if close else None
    return Recommendation(rules, asked["max_error"], found, worst, asked)


def _in_time(
    found: Fidelity, worst: Mapping[tuple[str, str], float], time: float
) -> dict[str, str]:
    """Return a method's name for each target, "" for exact ones."""
    # By target: name, what is saved of a step, and the squares of errors of all sites.
    options = []
    for target in found.targets:
        of = [(name, rows) for (t, name), rows in found.by_target().items() if t == target]
        made = [(name, _saved(r, found), len(r) * worst[target, name] ** 2) for name, r in of]
        options.append([("", 0.0, 0.0), *made])

    def saved(choice: Sequence[tuple[str, float, float]]) -> float:
        return sum(each[1] for each in choice)

    choices = list(itertools.product(*options))
    enough = [choice for choice in choices if 1 - saved(choice) <= time]
    if enough:
        best = min(enough, key=lambda choice: (sum(each[2] for each in choice), -saved(choice)))
    else:
        best = max(choices, key=saved)
    return dict(zip(found.targets, (name for name, _, _ in best), strict=True))


def _saved(rows: Sequence[SiteFidelity], found: Fidelity) -> float:
    """Return what a method saves of a step at some sites."""
    every = {row.parameters: row.flops_exact for row in found.sites}
    return sum((1 - r.time) * r.flops_exact for r in rows) / sum(every.values()) / _MATMULS


def _bytes(rows: Sequence[SiteFidelity]) -> int:
    return sum(row.bytes_stored for row in rows)


def _error(rows: Sequence[SiteFidelity]) -> float:
    return root_mean_square(row.error for row in rows)
