"""Choose methods for a model by what they do to its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Return the rules, and a table with a line a target and method."""
        chosen = [f"{t}: {'exact' if m is None else m}" for t, m in self.rules.items()]
        head = f"error at most {self.max_error:g}, at the fewest bytes:"
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
    methods: Sequence[Method] = CANDIDATES,
    draws: int = 2,
    loss: Callable[[Any], Tensor] | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Recommendation:
    """Choose the cheapest method of each target whose gradients are close enough, on a real batch.

    Equivalent to calling `fidelity(model, …, methods=methods)`, and choosing for every target the
    method that stores the fewest bytes among those whose error, root mean square over the target's
    sites, is at most `max_error`; none, if all are above. An error of the gradients is no loss:
    train a little with what is chosen, and without.

    Args:
        model: any module; a compiled one is unwrapped.
        args: what to call it with.
        max_error: ‖dŴ − dW‖ / ‖dW‖ of one step, above 0.
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
    found = fidelity(
        model, *args, methods=methods, draws=draws, loss=loss, progress=progress, **kwargs
    )
    named = {str(method): method for method in methods}
    rules: dict[str, Method | None] = {}
    for target in found.targets:
        of_target = [(m, rows) for (t, m), rows in found.by_target().items() if t == target]
        close = [(_bytes(rows), m) for m, rows in of_target if _error(rows) <= limit]
        # Of equally few bytes the one named first.
        rules[target] = named[min(close, key=lambda pair: pair[0])[1]] if close else None
    return Recommendation(rules, limit, found)


def _bytes(rows: Sequence[SiteFidelity]) -> int:
    return sum(row.bytes_stored for row in rows)


def _error(rows: Sequence[SiteFidelity]) -> float:
    return root_mean_square(row.error for row in rows)
