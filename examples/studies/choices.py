"""How a study writes a method: as in rules, "name:value:option=value".

Stages that code what the stage before left over are joined by "+", and "@…" at the end keeps steps
exact: "@N" or "@first=N" the first, "@last=N" the last, "@every=N" every Nth.

    exact                       X itself
    pamm:256, subspace:0.1      the package's methods, by `pamm_compile.methods.METHODS`
    generators:16               PAMM with k = 16, whatever the number of tokens
    generators:16:scale=norm:refine=1:draws=4
    directions:4                r principal directions, not quantised
    rows:64                     k sampled rows, rescaled (uniform CRS: PAMM with ε = 0)
    hidden:8                    random projection of the features to r (the idea of CompAct)
    sketch:64                   count sketch of the tokens into k buckets
    directions:4+generators:16  the same, and PAMM on the rest
    generators:fill=16          as many as fit into 16 bytes a token in bfloat16; not after a "+"

Controls, whose error is known, and remedies, of controls.py:

    noise:0.1                   exact dW, and noise of a tenth of its length
    unbiased:40                 exact dW, and noise as long as the error of 40 directions
    rounded:8                   X rounded without bias to 8 bits
    tail:40:8:damp=0.5          40 directions, 8 of them random ones of what the others leave over
    lottery:40:share=2          40 of 80 directions, drawn by their size and reweighted
    lottery:40:share=2:draws=8  the mean of eight draws
    centred:40                  the mean token exactly, and 40 directions of the rest
    restored:40                 40 directions, and X̂ made as long as X
    shares:0.1:0.1:0.2:0.2      directions at the inputs of q, k, v; o; gate, up; down, by features
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

from examples.studies import controls, estimators
from examples.studies.estimators import Chain, Exact, Filled
from pamm_compile.methods import METHODS
from pamm_compile.methods.base import Method

NAMES: dict[str, Callable[..., Method]] = {
    "exact": Exact,
    "generators": estimators.generators,
    "directions": estimators.directions,
    "rows": estimators.Rows,
    "hidden": estimators.Hidden,
    "sketch": estimators.Sketch,
    "noise": controls.Noise,
    "unbiased": controls.Unbiased,
    "rounded": controls.Rounded,
    "tail": controls.Tail,
    "lottery": controls.Lottery,
    "centred": controls.Centred,
    "restored": controls.Restored,
    "shares": controls.Shares,
}
"""Beside those of `pamm_compile.methods.METHODS`."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method as a study writes it, and the steps that are exact."""

    text: str
    method: Method
    first: int = 0
    last: int = 0
    every: int = 0

    @property
    def is_exact(self) -> bool:
        return isinstance(self.method, Exact)

    def is_exact_in(self, step: int, steps: int) -> bool:
        """Tell whether one of a run's steps is exact."""
        at_interval = self.every > 0 and step % self.every == 0
        return self.is_exact or step < self.first or step >= steps - self.last or at_interval


def parse(text: str) -> Choice:
    """Read a method as this module's docstring writes it."""
    body, *marks = text.split("@")
    *before, last = [_stage(part, text) for part in body.split("+")]
    for stage in reversed(before):
        last = Chain(stage, last)
    steps = {}
    for mark in marks:
        key, _, number = mark.rpartition("=")
        if key not in ("", "first", "last", "every") or not number.isdigit():
            raise SystemExit(f"{text!r}: '@{mark}' is none of @N, @first=N, @last=N and @every=N")
        steps[key or "first"] = int(number)
    return Choice(text, last, **steps)


def _stage(part: str, text: str) -> Method:
    name, *values = part.split(":")
    make = NAMES.get(name) or METHODS.get(name)
    if make is None:
        raise SystemExit(f"{text!r}: no method {name!r}; there are {', '.join([*NAMES, *METHODS])}")
    named: dict[str, Any] = {}
    positional = []
    for value in values:
        key, given, option = value.rpartition("=")
        if given:
            named[key] = _value(option)
        else:
            positional.append(_value(value))
    fill = named.pop("fill", None)
    try:
        if fill is not None:
            return Filled(lambda size: make(size, **named), float(fill))
        return make(*positional, **named)
    except TypeError as error:
        raise SystemExit(f"{text!r}: {error}") from None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
