"""What else was tried to win time to a score: arms beside those of `score.py`, by its yardstick.

    python examples/studies/tried.py --seed 0 --rate 5e-5 --task encoder
    python examples/studies/tried.py --times --arm exact mlp
    python examples/studies/tried.py --table --least 1

None of these is recommended. Their runs stand in the record of `score.py`, whose exact runs they
are compared with.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import cli, score
from examples.benchmarks.score_arms import Arm, RulesGiven
from pamm_compile import GradientSubspace


@dataclass(frozen=True)
class RandomSubspace(GradientSubspace):
    """Draws directions anew at every nearly exact gradient, whatever that is."""

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is traced."""
        return f"{type(self).__name__} {super().fingerprint}"

    def remember(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return Q, orthonormal rows at random."""
        like, r = self._like(gradients)
        drawn = torch.randn(*like.shape[:-2], like.shape[-1], r, device=like.device)
        return torch.linalg.qr(drawn).Q.mT.contiguous()

    def _like(self, gradients: Sequence[Tensor]) -> tuple[Tensor, int]:
        outputs = [each.shape[-2] for each in gradients]
        return gradients[0], self.directions(gradients[0].shape[-1], outputs)


@dataclass(frozen=True)
class SomeFeatures(RandomSubspace):
    """Makes the gradients of some columns of a weight, drawn anew at every nearly exact one."""

    def remember(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return Q, rows of the identity."""
        like, r = self._like(gradients)
        n = like.shape[-1]
        drawn = torch.rand(*like.shape[:-2], n, device=like.device).argsort(-1)[..., :r]
        return torch.nn.functional.one_hot(drawn, n).float()


def _ours(label: str, rules: RulesGiven, first: float = 0.0, last: float = 0.0) -> Arm:
    like = "gradients" if first or last else ""
    return Arm(label, rules, goal="any", first=first, last=last, timed_as=like)


_COLD = "gradients:warmup=1"
"""What all arms here are variants of, whose first step alone is nearly exact."""
_EVERYWHERE = {
    **{
        name: Arm(f"warm-up of {count}", f"linear=gradients:warmup={count}", timed_as="warm")
        for name, count in (("warm", 5), ("warm-8", 8))
    },
    "gradients": _ours("gradient subspace, no warm-up", f"linear={_COLD}"),
    "every-5": _ours("no warm-up, T = 5", f"linear={_COLD}:every=5"),
    "every-20": _ours("no warm-up, T = 20", f"linear={_COLD}:every=20"),
    "rank-16": _ours("no warm-up, rank 1/16", f"linear={_COLD}:rank=0.0625"),
    "rank-4": _ours("no warm-up, rank 1/4", f"linear={_COLD}:rank=0.25"),
    "carried": _ours("no warm-up, T = 5, half carried", f"linear={_COLD}:every=5:carry=0.5"),
    "carried-16": _ours("the same, rank 1/16", f"linear={_COLD}:rank=0.0625:every=5:carry=0.5"),
    "ends": _ours("first and last tenth exact", f"linear={_COLD}", first=0.1, last=0.1),
    "first-tenth": _ours("first tenth exact", f"linear={_COLD}", first=0.1),
    "last-tenth": _ours("no warm-up, last tenth exact", f"linear={_COLD}", last=0.1),
    "attention": _ours("no warm-up, attention alone", f"attention={_COLD}"),
    "mlp": _ours("no warm-up, MLPs alone", f"mlp={_COLD}"),
    "mixed": _ours("no warm-up, MLPs rank 1/4", f"attention={_COLD}, mlp={_COLD}:rank=0.25"),
    "random": _ours("random directions, rank 1/8, T = 10", {"linear": RandomSubspace(warmup=1)}),
    "features": _ours("an eighth of the features, T = 10", {"linear": SomeFeatures(warmup=1)}),
    "drawn": _ours("Subspace, rank 1/8 of 1/4 drawn", "linear=subspace:candidates=2"),
    "subspace-4": _ours("Subspace, rank 1/4", "linear=subspace:0.25"),
    "subspace-16-8": _ours("Subspace, rank 1/16, 8 bits", "linear=subspace:0.0625:bits=8"),
}


def _exact_where(label: str, pattern: str) -> Arm:
    return _ours(label, {re.compile(pattern): None, "linear": GradientSubspace(warmup=1)})


_BY_NAME = {
    "encoder": {
        "stream": _exact_where("no warm-up, exact where outputs are added", r"output\.dense"),
        "last": _exact_where("no warm-up, last two layers exact", r"layer\.[45]\."),
        "first": _exact_where("no warm-up, first two layers exact", r"layer\.[01]\."),
    },
    "scratch": {
        "stream": _exact_where("no warm-up, exact where outputs are added", r"o_proj|down_proj")
    },
}
TASKS = {
    name: dataclasses.replace(task, arms={**task.arms, **_EVERYWHERE, **_BY_NAME[name]})
    for name, task in score.TASKS.items()
}


def main(arguments: list[str] | None = None) -> None:
    score.main(arguments, TASKS, __doc__)


if __name__ == "__main__":
    cli.run(main)
