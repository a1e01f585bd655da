"""Decide which sites to compress, and say of the others why not.

A site is worth compressing only if the backward pass then no longer reads its input: otherwise X
stays saved, and the compressed form comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from pamm_compile.graph.joint import JointGraph, value
from pamm_compile.graph.vocabulary import op_name
from pamm_compile.methods.pamm import index_dtype
from pamm_compile.methods.pamm.compression import num_generators
from pamm_compile.options import Options
from pamm_compile.private import aot
from pamm_compile.sites.projections import Site
from pamm_compile.sites.reasons import Decline, Reason
from pamm_compile.sites.targets import Match


@dataclass(frozen=True)
class Decision:
    """The sites to rewrite, and everything that stays exact."""

    accepted: list[Site]
    declines: list[tuple[Site | None, Decline]]
    """With the site it concerns, if one was formed."""


@dataclass(frozen=True)
class Size:
    """What a site saves for the backward pass, before and after, in bytes."""

    tokens: int
    features: int
    generators: int
    bytes_before: int
    bytes_after: int


def size_of(site: Site, options: Options) -> Size:
    """Count the bytes of a site's input and of what replaces it, the index and scale included.

    Args:
        site: any.
        options: ratio and min_generators are read.

    Returns:
        Sizes; of a symbolic shape, those of the shape that was compiled with.
    """
    val = value(site.input)
    tokens, features = aot.size_hint(val.shape[-2]), aot.size_hint(val.shape[-1])
    symbolic = not isinstance(val.shape[-2], int)
    k = int(num_generators(tokens, options.exact_ratio, options.min_generators))
    index = torch.int32 if symbolic else index_dtype(k)
    after = k * features * val.element_size() + tokens * (index.itemsize + val.element_size())
    return Size(tokens, features, k, tokens * features * val.element_size(), after)


def decide(joint: JointGraph, match: Match, options: Options) -> Decision:
    """Choose the sites to compress.

    Args:
        joint: the graph the sites are in.
        match: the sites found.
        options: min_tokens, ratio and min_generators are read.

    Returns:
        The decision; every site is in one of its two lists.
    """
    declines: list[tuple[Site | None, Decline]] = [(None, d) for d in match.declines]
    candidates: list[Site] = []
    for site in match.sites:
        found = _own_reason(joint, site, options)
        if found is None:
            candidates.append(site)
        else:
            declines.append((site, Decline(found[0], site.name, found[1])))

    # Dropping one site leaves its gradients as readers of an input it shared with another chain.
    while True:
        replaced = {g.node for site in candidates for g in site.gradients}
        blocked = [(site, _other_readers(joint, site, replaced)) for site in candidates]
        blocked = [(site, readers) for site, readers in blocked if readers]
        if not blocked:
            return Decision(candidates, declines)
        for site, readers in blocked:
            candidates.remove(site)
            by = _describe(joint, readers)
            declines.append((site, Decline(Reason.SHARED_INPUT, site.name, by)))


def _own_reason(joint: JointGraph, site: Site, options: Options) -> tuple[Reason, str] | None:
    trained = [p for p in site.projections if any(w.gradient is not None for w in p.parameters)]
    if not trained:
        return Reason.NO_WEIGHT_GRAD, ""
    if all(p.narrow_of is not None for p in trained):
        factors = dict.fromkeys(p.narrow_of.name for p in trained if p.narrow_of is not None)
        return Reason.NARROW_INPUT, "output of " + ", ".join(factors)
    # By parameter: projections that share one have their gradients listed under the first.
    covered = {w.node for g in site.gradients for w in g.projection.parameters}
    missing = [p.name for p in trained if covered.isdisjoint(w.node for w in p.parameters)]
    val = value(site.input)
    if missing or not _is_matrix(val):
        return Reason.UNSUPPORTED_LAYOUT, ", ".join(missing)
    closure, _ = joint.readers(site.chain.base)
    if any(aot.is_recomputed(node.meta.get("recompute")) for node in closure):
        return Reason.RECOMPUTED, ""
    size = size_of(site, options)
    if size.tokens < options.min_tokens:
        return Reason.TOO_FEW_TOKENS, f"{size.tokens} < {options.min_tokens}"
    return None


def is_returned(joint: JointGraph, site: Site) -> bool:
    """Tell whether the graph returns a site's input, so that the caller may keep it alive.

    Such a site is compressed all the same: its matmuls go, and trainers drop what a model returns
    beside the loss before they run backward.
    """
    closure, _ = joint.readers(site.chain.base)
    return not closure.isdisjoint(joint.forward_outputs)


def _is_matrix(val: torch.Tensor) -> bool:
    # [b, n], or batched matmuls over a batch of one.
    return val.dim() == 2 or (val.dim() == 3 and aot.size_hint(val.shape[0]) == 1)


def _other_readers(joint: JointGraph, site: Site, replaced: set[Node]) -> list[Node]:
    _, backward = joint.readers(site.chain.base)
    return sorted(backward - replaced)


def _describe(joint: JointGraph, readers: Iterable[Node]) -> str:
    """Name the readers of an input: by the weight whose gradient they make, else by operator."""
    owners: Mapping[Node, str] = {
        node: parameter.name
        for parameter in joint.parameters.values()
        for node in joint.gradient_matmuls(parameter)
    }
    return ", ".join(dict.fromkeys(owners.get(node, op_name(node)) for node in readers))
