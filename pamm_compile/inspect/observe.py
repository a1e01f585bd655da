"""A pass that shows inputs and output gradients of projections while a graph runs, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pamm_compile.graph.joint import JointGraph
from pamm_compile.methods.base import Method
from pamm_compile.report import GraphReport
from pamm_compile.rules import Rules
from pamm_compile.sites.choose import Candidate, choose
from pamm_compile.sites.projections import WeightGradient
from pamm_compile.size import Size
from pamm_compile.targets import narrowest


@dataclass(frozen=True)
class Observation:
    """What one site's weight gradients are made from."""

    place: int
    """Of the site in its graph."""
    parameters: tuple[str, ...]
    target: str
    """The first named target that holds all its projections."""
    method: Method
    """That the rules choose."""
    size: Size
    x: Tensor
    """[b, n]."""
    gradients: tuple[Tensor, ...]
    """dZ of every projection, [b, m_p]."""


@dataclass
class _Site:
    place: int
    candidate: Candidate
    target: str
    x: Tensor | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def observation(self) -> Observation:
        assert self.x is not None
        weights = [w for p in self.candidate.site.projections for w in p.parameters]
        return Observation(
            self.place,
            tuple(dict.fromkeys(w.name for w in weights if w.gradient is not None)),
            self.target,
            self.candidate.method,
            self.candidate.size,
            self.x,
            tuple(self.gradients[number] for number in sorted(self.gradients)),
        )


class ObserveSites:
    """Hands over X and dZ of every site as soon as the backward pass has all of them.

    The matmuls that make weight gradients are replaced by functions that compute the same and look
    at their operands, so that the graph has to run operator by operator.

    Args:
        rules: the sites.
        observer: gets every one.
    """

    def __init__(self, rules: Rules, observer: Callable[[Observation], None]) -> None:
        self.rules = rules
        self.observer = observer
        self.sites = 0

    @property
    def name(self) -> str:
        """What logs and reports call it."""
        return "observe-sites"

    @property
    def fingerprint(self) -> str:
        """Of the rules; nothing that this compiles is kept."""
        return "\n".join(rule.fingerprint for rule in self.rules)

    def __call__(self, joint: JointGraph, *, apply: bool) -> GraphReport:
        """Replace the matmuls of a joint graph."""
        for candidate in choose(joint, self.rules, siblings=False).candidates:
            gradients = candidate.site.gradients
            if not gradients or not apply:
                continue
            uses = frozenset.intersection(*(g.projection.uses for g in gradients))
            site = _Site(self.sites, candidate, narrowest(uses))
            self.sites += 1
            for number, gradient in enumerate(gradients):
                gradient.node.target = self._looking(site, number, gradient)
        return GraphReport()

    def _looking(self, site: _Site, number: int, gradient: WeightGradient) -> Callable[..., Any]:
        multiply: Any = gradient.node.target
        flip = gradient.transposed
        expected = len(site.candidate.site.gradients)

        def observed_matmul(left: Tensor, right: Tensor) -> Any:
            # dZᵀ X, or Xᵀ dZ where transposed.
            dz, x = (right, left) if flip else (left, right)
            site.x = _matrix(x).T if flip else _matrix(x)
            site.gradients[number] = _matrix(dz) if flip else _matrix(dz).T
            if len(site.gradients) == expected:
                with torch.no_grad():
                    self.observer(site.observation())
                site.x = None
                site.gradients.clear()
            return multiply(left, right)

        return observed_matmul


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.squeeze(0)
