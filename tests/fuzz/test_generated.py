"""Random modules that multiply by weights in every way: each is in a list, with a true reason.

PAMM_GENERATED=2000 python -m pytest tests/fuzz/test_generated.py
"""

from __future__ import annotations

import os

import pytest
import torch
from pamm_testing.generated import PARTS
from pamm_testing.generation import generate
from pamm_testing.graphs import look

COUNT = int(os.environ.get("PAMM_GENERATED", "0"))
FEW = 2 * len(PARTS)
DECLINED_IN_VAIN = {746, 835}
"""Where a large layer makes a weight for every sample, those behind are taken to mix its tokens."""


def _check(seed: int) -> None:
    torch._dynamo.reset()
    made = generate(seed)
    found = look(made.module, made.batch, "linear=pamm:4")
    said = dict.fromkeys(found.compressed, "") | found.reasons
    names = [name for each in found.compressed for name in each.split(" + ")]
    said |= {name: "" for name in names if name not in said}
    silent = made.said.keys() - said.keys()
    assert not silent, f"generate({seed}) {made.parts}: silent {sorted(silent)}"
    if seed in DECLINED_IN_VAIN:
        assert "NOT_OVER_TOKENS" in found.reasons.values(), "mended: take it out of the list"
        return
    wrong = {n: said[n] for n, allowed in made.said.items() if said[n] not in allowed}
    assert not wrong, f"generate({seed}) {made.parts}: {wrong}"


@pytest.mark.parametrize("kind", range(len(PARTS)), ids=list(PARTS))
def test_every_weight_is_listed_for_a_true_reason(kind: int) -> None:
    for seed in range(kind, FEW, len(PARTS)):
        _check(seed)


@pytest.mark.everything
def test_every_weight_of_many_modules_is_listed() -> None:
    for seed in range(FEW, COUNT or 2000):
        _check(seed)
