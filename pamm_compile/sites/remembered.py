"""What of a site's weight gradients can be remembered: where they arrive, whole, outside the graph.

    mm(dZᵀ, X) ── [transposes, casts, sums over sites] ── gradient of an input of Dynamo's graph

A weight that is computed, cut or merged in the graph has no gradient of its own outside of it.
"""

from __future__ import annotations

from torch.fx import Node

from pamm_compile.graph.chains import is_chain_step, is_transpose, shape_of
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.vocabulary import TRANSPOSES, op_name
from pamm_compile.methods.base import Method, Remembering
from pamm_compile.private import aot
from pamm_compile.report import Remembered
from pamm_compile.rules import Rules
from pamm_compile.sites.choose import Candidate
from pamm_compile.sites.projections import WeightGradient


def remembered(joint: JointGraph, candidate: Candidate, rules: Rules) -> Remembered | None:
    """Return what is remembered of a site; None where every step is alike.

    Args:
        joint: the graph, not yet rewritten.
        candidate: an accepted site.
        rules: of which one has its method.
    """
    method, size = candidate.method, candidate.size
    if not isinstance(method, Remembering) or not method.directions(size.features, size.outputs):
        return None
    weights = [_weight(joint, gradient) for gradient in candidate.site.gradients]
    known = tuple(each for each in weights if each is not None)
    if len(known) < len(weights) or len({place for place, _ in known}) < len(known):
        return None
    held = method.remembered_bytes(size)
    return Remembered(_rule(rules, method), known, size.outputs, held)


def _rule(rules: Rules, method: Method) -> int:
    return next(number for number, rule in enumerate(rules) if rule.method == method)


def _weight(joint: JointGraph, gradient: WeightGradient) -> tuple[int, bool] | None:
    if len(gradient.projection.parameters) != 1:
        return None
    parameter = gradient.projection.parameters[0]
    place = aot.plain_position(parameter.node.meta.get("desc"))
    if place is None or parameter.gradient is None:
        return None
    odd = _turned(gradient.node, parameter.gradient)
    return None if odd is None else (place, odd != gradient.transposed)


def _turned(node: Node, end: Node) -> bool | None:
    """Tell whether the way from a matmul to a gradient transposes; None if it does more."""
    seen: set[Node] = set()
    stack = [(node, False)]
    while stack:
        here, odd = stack.pop()
        if here is end:
            return odd
        if here in seen:
            continue
        seen.add(here)
        for user in here.users:
            if is_transpose(user):
                stack.append((user, not odd))
            elif _keeps_places(user, here):
                stack.append((user, odd))
    return None


def _keeps_places(user: Node, of: Node) -> bool:
    """Tell whether a step leaves rows and columns where they are, whatever dimensions it adds."""
    mine, its = shape_of(user), shape_of(of)
    if mine is None or its is None or mine[-2:] != its[-2:]:
        return False
    name = op_name(user)
    return name == "aten::add" or (is_chain_step(user) and name not in TRANSPOSES)
