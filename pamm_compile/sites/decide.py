"""Decide which candidates to compress, and say of the others why not.

For memory, a site is worth compressing only if the backward pass then no longer reads its input:
otherwise X stays saved, and what is stored comes on top. For speed, if making the weight gradients
from what is stored takes less time than making them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from pamm_compile.devices import DeviceFigures
from pamm_compile.graph.chains import value
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.vocabulary import op_name
from pamm_compile.methods.base import Method, Remembering
from pamm_compile.options import Options
from pamm_compile.private import aot
from pamm_compile.sites.choose import Candidate, Choice
from pamm_compile.sites.cost import saved_time
from pamm_compile.sites.reasons import Decline, Reason
from pamm_compile.size import Size

_MOST_TOKENS = 2**40
"""More than any tensor has; guards are compiled, and know no larger integers than 2⁶³."""


@dataclass(frozen=True)
class Plan(Candidate):
    """A site to rewrite."""

    also_read_by: str = ""
    """Who else reads X in the backward pass, so that it stays saved; empty if nobody does."""


@dataclass(frozen=True)
class Decision:
    """The sites to rewrite, and everything that stays exact."""

    accepted: list[Plan]
    """In graph order."""
    declines: list[tuple[Candidate | None, Decline]]
    """With the candidate it concerns, if one was formed."""


def decide(
    joint: JointGraph, choice: Choice, options: Options, gpu: DeviceFigures | None = None
) -> Decision:
    """Choose the sites to compress.

    Args:
        joint: the graph the candidates are in.
        choice: what the rules want.
        options: goal and min_tokens are read.
        gpu: whose time counts for the goal "speed"; None for the device that X is on.

    Returns:
        The decision; every candidate is in one of its two lists.
    """
    return _Judge(joint, options, gpu).decide(choice)


class _Judge:
    def __init__(self, joint: JointGraph, options: Options, gpu: DeviceFigures | None) -> None:
        self._joint = joint
        self._options = options
        self._gpu = gpu

    def decide(self, choice: Choice) -> Decision:
        declines = list(choice.declines)
        candidates = []
        for candidate in choice.candidates:
            found = self._own_reason(candidate)
            if found is None:
                candidates.append(candidate)
            else:
                declines.append((candidate, Decline(found[0], candidate.site.name, found[1])))

        # Dropping one site leaves its gradients as readers of an input it shared with another.
        while True:
            replaced = {n for each in candidates for g in each.site.gradients for n in g.nodes}
            read = [(each, self._other_readers(each, replaced)) for each in candidates]
            blocked = [(each, readers) for each, readers in read if readers]
            if self._options.goal == "speed" or not blocked:
                break
            # Comparing candidates by what they hold would take the square of their number.
            dropped = {id(candidate) for candidate, _ in blocked}
            candidates = [each for each in candidates if id(each) not in dropped]
            for candidate, readers in blocked:
                by = self._describe(readers)
                decline = Decline(Reason.SHARED_INPUT, candidate.site.name, by)
                declines.append((candidate, decline))
        return Decision(
            [
                Plan(each.site, each.method, each.size, self._describe(readers))
                for each, readers in read
            ],
            declines,
        )

    def _own_reason(self, candidate: Candidate) -> tuple[Reason, str] | None:
        site = candidate.site
        trained = [p for p in site.projections if p.is_trained]
        if not trained:
            return Reason.NO_WEIGHT_GRAD, ""
        if trained[0].reason is not None:
            # Open projections and others are candidates of their own.
            details = dict.fromkeys(p.detail for p in trained if p.detail)
            return trained[0].reason, ", ".join(details)
        val = value(site.input)
        if any(aot.size_hint(size) is None for size in val.shape):
            return Reason.UNKNOWN_TOKENS, ""
        if not (site.is_merged or _is_matrix(val)):
            return Reason.UNSUPPORTED_LAYOUT, ""
        closure, _ = self._joint.readers(site.chain.base)
        if any(aot.is_recomputed(node.meta.get("recompute")) for node in closure):
            return Reason.RECOMPUTED, ""
        # The last reasons, since what they depend on makes guards.
        if aot.guarded(site.shape[0] < min(self._options.min_tokens, _MOST_TOKENS)):
            return Reason.TOO_FEW_TOKENS, f"{candidate.size.tokens} < {self._options.min_tokens}"
        if not candidate.size.symbolic:
            return self._loss(candidate.method, candidate.size)
        least = _least_tokens(lambda size: self._loss(candidate.method, size) is None, candidate)
        if least is not None and aot.guarded(site.shape[0] >= least):
            return None
        at_hint = self._loss(candidate.method, candidate.size)
        in_time = self._options.goal == "speed"
        reason = Reason.UNPROFITABLE if in_time else Reason.NO_SAVING
        return at_hint or (reason, f"fewer than {least} tokens")

    def _loss(self, method: Method, size: Size) -> tuple[Reason, str] | None:
        if self._options.goal == "speed":
            share = 1 - saved_time(method, size, self._gpu)
            if share >= 1:
                return Reason.UNPROFITABLE, f"{share:.1f} × the exact time, by the cost model"
        elif self._options.goal == "memory":
            stored = method.stored_bytes(size)
            if isinstance(method, Remembering):
                stored += method.remembered_bytes(size)
            if stored >= size.bytes:
                return Reason.NO_SAVING, f"{stored} of {size.bytes} bytes"
        return None

    def _other_readers(self, candidate: Candidate, replaced: set[Node]) -> list[Node]:
        _, backward = self._joint.readers(candidate.site.chain.base)
        return sorted(backward - replaced)

    def _describe(self, readers: Iterable[Node]) -> str:
        """Name the readers of an input: by the weight whose gradient they make, or by operator."""
        owners = self._joint.owners
        names = (owners[node].name if node in owners else op_name(node) for node in readers)
        return ", ".join(dict.fromkeys(names))


def is_returned(joint: JointGraph, candidate: Candidate) -> bool:
    """Tell whether the graph returns a site's input, so that the caller may keep it alive.

    Such a site is compressed all the same: its matmuls go, and trainers drop what a model returns
    beside the loss before they run backward.
    """
    closure, _ = joint.readers(candidate.site.chain.base)
    return not closure.isdisjoint(joint.forward_outputs)


def _is_matrix(val: torch.Tensor) -> bool:
    # [b, n], or batched matmuls over a batch of one.
    return val.dim() == 2 or (val.dim() == 3 and aot.guarded(val.shape[0] == 1) is True)


def _least_tokens(is_worth: Callable[[Size], bool], candidate: Candidate) -> int | None:
    """Return from how many tokens on a site is worth compressing; None if it never is.

    Searched for without looking at the number that was compiled with, so that what a batch gets
    does not depend on the batches before it.
    """
    least, most = 1, _MOST_TOKENS
    if not is_worth(replace(candidate.size, tokens=most)):
        return None
    while least < most:
        middle = (least + most) // 2
        if is_worth(replace(candidate.size, tokens=middle)):
            most = middle
        else:
            least = middle + 1
    return least
