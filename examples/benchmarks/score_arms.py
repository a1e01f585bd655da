"""What trains in `score.py`, beside what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pamm_compile
from pamm_compile.methods.base import Method
from pamm_compile.options import Goal, Options
from pamm_compile.remembering import early, period
from pamm_compile.rules import Target

RulesGiven = str | Mapping[Target, Method | None] | None


class Arm(NamedTuple):
    """What trains, and how."""

    label: str
    rules: RulesGiven = None
    """None trains with exact gradients."""
    lora: int = 0
    """Rank of adapters; 0 trains all weights."""
    share: float = 1.0
    """Of the setting's steps that are taken."""
    budget: float = 1.0
    """Of the activation memory that torch.compile may keep."""
    goal: Goal = "speed"
    order: int = 0
    """Another one takes the batches of a seed in another order."""
    first: float = 0.0
    """Share of the steps, at the start, that are exact."""
    last: float = 0.0
    """Share of the steps, at the end, that are exact."""

    timed_as: str = ""
    """Another arm whose compiled steps are the same."""

    @property
    def options(self) -> Options | None:
        """Those of the backend; None trains exactly."""
        return None if self.rules is None else pamm_compile.backend(rules=self.rules).options

    @property
    def turns(self) -> int:
        """After how many steps all are alike again."""
        return 1 if self.options is None else period(self.options)

    @property
    def early(self) -> int:
        """How many steps are nearly exact for coming first, beside those of its turns."""
        return 0 if self.options is None else early(self.options)

    def is_exact(self, number: int, steps: int) -> bool:
        """Tell whether one of so many steps is exact for being one of the first or last."""
        return number < self.first * steps or number >= (1 - self.last) * steps


EXACT = {
    "exact": Arm("exact"),
    "exact-5/6": Arm("exact, 5/6 of the steps", share=5 / 6),
    "exact-2/3": Arm("exact, 2/3 of the steps", share=2 / 3),
}
OURS = {
    "warm-6": Arm("gradient subspace, rank 1/8", "linear=gradients", timed_as="warm"),
    "subspace": Arm("Subspace, rank 1/8", "linear=subspace"),
    "subspace-16": Arm("Subspace, rank 1/16", "linear=subspace:0.0625"),
    "eight": Arm("8 bits", "linear=quantized:8", goal="memory"),
    "pamm": Arm("PAMM, k = 64, on Q, K, V", "qkv=pamm:1000000:min_generators=64"),
}
LENGTHS = tuple(EXACT)
TIMED_ONLY = {"budget": Arm("exact, budget 0.99", budget=0.99)}
