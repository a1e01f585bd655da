"""Which method for which projection: rules applied to a joint graph, one site a method.

rules          qkv = A,  linear = B
site of X      {q, k, v: A}  {gate: B}        two candidates, each storing X in its own way
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from pamm_compile.graph.joint import JointGraph
from pamm_compile.methods.base import Method
from pamm_compile.rules import Rules
from pamm_compile.sites.cost import size_of
from pamm_compile.sites.projections import Projection, Site, group
from pamm_compile.sites.reasons import Decline, Reason
from pamm_compile.sites.targets import Match, classify, holds
from pamm_compile.size import Size


@dataclass(frozen=True)
class Candidate:
    """A site, and the method that the rules choose for it."""

    site: Site
    method: Method
    size: Size


@dataclass
class Choice:
    """What the rules make of one joint graph."""

    candidates: list[Candidate]
    """In graph order."""
    declines: list[tuple[Candidate | None, Decline]]
    """What stays exact already now."""


def choose(joint: JointGraph, rules: Rules, *, siblings: bool) -> Choice:
    """Apply rules to a joint graph.

    Args:
        joint: the graph to read.
        rules: the first whose target holds a projection decides about it.
        siblings: whether projections that no rule names join those that read the same input.

    Returns:
        The candidates, and what rules or the search leave exact.
    """
    match = classify(joint)
    chosen: dict[Node, tuple[Projection, Method | None]] = {}
    declines: list[Decline] = []
    for rule in rules:
        for projection in match.projections:
            if holds(rule.target, projection):
                chosen.setdefault(projection.node, (projection, rule.method))
        found = match.declines_of(rule.target)
        declines += [decline for decline in found if decline not in declines]
    if siblings:
        for node, both in _siblings(joint, match, chosen):
            chosen.setdefault(node, both)
    exact = [projection for projection, method in chosen.values() if method is None]
    declines += [Decline(Reason.EXACT_BY_RULE, projection.name) for projection in exact]
    return Choice(
        _counted(_candidates(joint, chosen)),
        [*_unclear(joint, match, rules, chosen), *((None, decline) for decline in declines)],
    )


def _siblings(
    joint: JointGraph, match: Match, chosen: dict[Node, tuple[Projection, Method | None]]
) -> Iterator[tuple[Node, tuple[Projection, Method | None]]]:
    for site in group(joint, match.projections):
        methods = [chosen[p.node][1] for p in site.projections if p.node in chosen]
        method = next((each for each in methods if each is not None), None)
        if method is not None:
            yield from ((p.node, (p, method)) for p in site.projections if p.node not in chosen)


def _unclear(
    joint: JointGraph,
    match: Match,
    rules: Rules,
    chosen: dict[Node, tuple[Projection, Method | None]],
) -> Iterator[tuple[Candidate, Decline]]:
    """Yield what may be meant by a named target, as far as the graph tells, and is not chosen."""
    method = next((r.method for r in rules if isinstance(r.target, str) and r.method), None)
    if method is None:
        return
    unclear = (p for p in match.projections if p.unclear is not None and p.node not in chosen)
    for site in group(joint, unclear):
        details = dict.fromkeys(p.unclear for p in site.projections if p.unclear is not None)
        decline = Decline(Reason.UNCLEAR_TARGET, site.name, ", ".join(details))
        yield Candidate(site, method, size_of(site)), decline


def _candidates(
    joint: JointGraph, chosen: dict[Node, tuple[Projection, Method | None]]
) -> list[Candidate]:
    candidates = []
    for site in group(joint, (projection for projection, _ in chosen.values())):
        # Equal methods are one, wherever the rules name them.
        methods = {chosen[p.node][1] for p in site.projections}
        for method in sorted(methods - {None}, key=repr):
            assert method is not None
            named = [p for p in site.projections if chosen[p.node][1] == method]
            # What cannot be compressed has a reason of its own.
            for reason in dict.fromkeys(p.reason for p in named if p.is_trained):
                own = _part(site, {p.node for p in named if p.reason is reason})
                candidates.append(Candidate(own, method, size_of(own)))
            if not any(p.is_trained for p in named):
                own = _part(site, {p.node for p in named})
                candidates.append(Candidate(own, method, size_of(own)))
    return candidates


def _counted(candidates: list[Candidate]) -> list[Candidate]:
    """Let every candidate know of how many that are alike it is one."""
    kinds = Counter((each.method, each.size) for each in candidates)
    return [
        replace(each, size=replace(each.size, alike=kinds[each.method, each.size]))
        for each in candidates
    ]


def _part(site: Site, nodes: set[Node]) -> Site:
    """Return a site with only some of its projections."""
    return replace(
        site,
        projections=[p for p in site.projections if p.node in nodes],
        gradients=[g for g in site.gradients if g.projection.node in nodes],
    )
