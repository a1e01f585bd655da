"""Choose methods for a model by the error of its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pamm_compile import checks
from pamm_compile.inspect.fidelity import Fidelity, SiteFidelity, fidelity, root_mean_square
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.methods.quantized.method import Quantized
from pamm_compile.methods.subspace.method import Subspace

CANDIDATES: tuple[Method, ...] = (
    *(Pamm(ratio) for ratio in (512, 128, 32)),
    *(Subspace(rank) for rank in (0.02, 0.05, 0.1, 0.2, 0.4)),
    Quantized(4),
    Quantized(8),
)
"""What `recommend` tries where nothing else is asked for."""


@dataclass(frozen=True)
class Recommendation:
    """Rules for `backend(rules=…)`, and the figures they were chosen by."""

    rules: dict[str, Method | None]
    """{target: method}; None leaves a target exact, since nothing met the error."""
    max_error: float
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
        head = f"error at most {self.max_error:g}{share}, at the fewest bytes:"
        return "\n".join(
            [head, *(f"  {each}" for each in chosen), "", self.fidelity.text(sites=False)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rules = {t: None if m is None else str(m) for t, m in self.rules.items()}
        return {"rules": rules, "max_error": self.max_error, **self.fidelity.to_dict()}


def recommend(
    model: torch.nn.Module,
    *args: Any,
    max_error: float,
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
    sites, is at most `max_error` / `margin`. If all are above, the target stays exact. The errors
    are those of this batch and of the weights now; they change in training. Call
    `Recommendation.renewed` whenever the number of steps has doubled, with a margin for the steps
    between. The error of the gradients is not the loss: train a little with the rules and without.

    Args:
        model: any module; a compiled one is unwrapped.
        args: what to call it with.
        max_error: ‖dŴ − dW‖ / ‖dW‖ of one step, above 0.
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
    hint = "0.3 asks for gradients within 30 % of the exact ones."
    limit = checks.number("max_error", max_error, "a number above 0", hint)
    if limit <= 0:
        raise checks.refusal("max_error", max_error, "a number above 0", hint)
    allowed, more = "a finite number of at least 1", "2 is for errors that may double; 1 for none."
    factor = checks.number("margin", margin, allowed, more)
    if not 1 <= factor < math.inf:
        raise checks.refusal("margin", margin, allowed, more)
    measured = {"methods": tuple(methods), "draws": draws, "loss": loss, "progress": progress}
    return _recommend(model, {}, {"max_error": limit, "margin": factor, **measured}, args, kwargs)


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


def _bytes(rows: Sequence[SiteFidelity]) -> int:
    return sum(row.bytes_stored for row in rows)


def _error(rows: Sequence[SiteFidelity]) -> float:
    return root_mean_square(row.error for row in rows)
