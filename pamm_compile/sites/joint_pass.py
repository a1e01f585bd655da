"""The pass that Inductor runs on every joint graph: match → decide → rewrite → report."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch.fx import Graph

import pamm_compile
from pamm_compile.errors import NothingMatchedError
from pamm_compile.graph.joint import JointGraph, value
from pamm_compile.graph.vocabulary import attention_operators
from pamm_compile.options import Options
from pamm_compile.private import inductor
from pamm_compile.report import GraphReport, Note, SiteReport
from pamm_compile.sites.decide import Decision, decide, is_returned, size_of
from pamm_compile.sites.projections import Site
from pamm_compile.sites.reasons import Decline
from pamm_compile.sites.rewrite import is_rewritten, rewrite
from pamm_compile.sites.targets import find_sites


@functools.cache
def source_digest() -> str:
    """Return a digest of every source file of this package.

    Lowerings and templates count as much as this pass: Inductor's cache would otherwise return
    kernels made by their former versions.
    """
    root = Path(pamm_compile.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".jinja")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class JointPass(inductor.CustomGraphPass):  # type: ignore[misc]
    """The pass for one graph that Dynamo captured.

    Args:
        options: what the user chose.
        parameter_names: name of every parameter, by its input key.
        apply: False only reports, and leaves the graph alone.
    """

    def __init__(
        self, options: Options, parameter_names: dict[str, str], *, apply: bool = True
    ) -> None:
        self.options = options
        self.parameter_names = parameter_names
        self.apply = apply
        self.report: GraphReport | None = None
        """Of the graph this pass ran on; None until then, or if a cache answered in its place."""

    def __call__(self, graph: Graph) -> None:
        if not JointGraph.is_joint(graph):
            # A subgraph of a higher-order operator must not overwrite its parent's report.
            if self.report is None:
                self.report = GraphReport(training=False)
            return
        if is_rewritten(graph):
            return
        joint = JointGraph(graph, self.parameter_names)
        decision = decide(joint, find_sites(joint, self.options.targets), self.options)
        self.report = _report(joint, decision, self.options)
        if self.apply:
            rewrite(graph, decision.accepted, self.options)

    def uuid(self) -> str:
        """Return what Inductor adds to its cache keys: the options and all sources."""
        parts = [source_digest(), repr(self.options), repr(self.apply), *attention_operators()]
        # Names decide only if the user selects by name; else they would split the cache in vain.
        if not isinstance(self.options.targets, str):
            parts += map(repr, sorted(self.parameter_names.items()))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class PassChain(inductor.CustomGraphPass):  # type: ignore[misc]
    """Several joint-graph passes as one, since torch 2.11 takes no list of them.

    Args:
        passes: in the order to run them.
    """

    def __init__(self, passes: Sequence[object]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)  # type: ignore[operator]

    def uuid(self) -> list[object] | None:
        """Return the passes' own; None, which turns caching off, if one has none."""
        found = [each.uuid() if hasattr(each, "uuid") else None for each in self.passes]
        return None if None in found else found


def check_strict(report: GraphReport) -> None:
    """Raise if a training graph has no compressed site.

    Args:
        report: of the graph.

    Raises:
        NothingMatchedError: listing why every candidate was declined.
    """
    if not report.training or any(site.compressed for site in report.sites):
        return
    reasons = [(", ".join(s.parameters), s.reason, s.detail) for s in report.sites]
    reasons += [(n.what, n.reason, n.detail) for n in report.notes]
    listing = "".join(
        f"\n  {what}: {reason}{f' ({detail})' if detail else ''}"
        for what, reason, detail in reasons
    )
    raise NothingMatchedError(
        "strict=True, and no projection of this training graph could be compressed:"
        f"{listing or ' nothing was found in it'}\n"
        "Run pamm_compile.explain(model, ...) for the whole table, or pass strict=False."
    )


def _report(joint: JointGraph, decision: Decision, options: Options) -> GraphReport:
    order = [*((site, None) for site in decision.accepted), *decision.declines]
    sites = [(site, decline) for site, decline in order if site is not None]
    sites.sort(key=lambda pair: pair[0].input)
    notes = [Note(d.reason.name, d.what, d.detail) for site, d in decision.declines if site is None]
    return GraphReport(tuple(_site(joint, s, d, options) for s, d in sites), tuple(notes))


def _site(joint: JointGraph, site: Site, decline: Decline | None, options: Options) -> SiteReport:
    size = size_of(site, options)
    val = value(site.input)
    return SiteReport(
        parameters=_parameters(site, trained_only=decline is None),
        shape=(size.tokens, size.features),
        dtype=str(val.dtype).removeprefix("torch."),
        generators=0 if decline else size.generators,
        bytes_before=size.bytes_before,
        bytes_after=size.bytes_before if decline else size.bytes_after,
        compressed=decline is None,
        reason=decline.reason.name if decline else None,
        detail=_detail(joint, site, decline),
    )


def _parameters(site: Site, *, trained_only: bool) -> tuple[str, ...]:
    weights = (w for p in site.projections for w in p.parameters)
    names = (w.name for w in weights if w.gradient is not None or not trained_only)
    return tuple(dict.fromkeys(names))


def _detail(joint: JointGraph, site: Site, decline: Decline | None) -> str:
    if decline is not None:
        return decline.detail
    return "also returned: freed only once the caller drops it" if is_returned(joint, site) else ""
