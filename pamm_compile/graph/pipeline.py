"""Passes over the joint graph, in order, as one pass of Inductor's.

    joint_custom_pre_pass ── [foreign passes] ── Pipeline ─┬─ pass 1 ── findings ─┐
                                                          └─ pass 2 ── findings ─┴─ report

A pass reads and rewrites one joint graph and says what it found. TORCH_LOGS="+pamm_compile.graph"
prints the graph before and after each; PAMM_COMPILE_DISABLE_PASSES="name,name" leaves passes out.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch.fx import Graph

from pamm_compile.graph.joint import JointGraph
from pamm_compile.private import inductor
from pamm_compile.report import GraphReport, State

log = logging.getLogger(__name__)

DISABLE = "PAMM_COMPILE_DISABLE_PASSES"
"""The environment variable that names passes to leave out, for debugging."""

_DONE = "pamm_compile_passes"


class GraphPass(Protocol):
    """One step over a joint graph."""

    @property
    def name(self) -> str:
        """What logs, reports and `PAMM_COMPILE_DISABLE_PASSES` call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Everything that changes what it does; part of Inductor's cache keys."""
        ...

    def __call__(self, joint: JointGraph, *, apply: bool) -> GraphReport:
        """Run over a joint graph.

        Args:
            joint: to read, and to rewrite in place through `joint.graph`.
            apply: False leaves the graph as it is and only reports.

        Returns:
            What was found; merged with that of the other passes.
        """
        ...


class Pipeline(inductor.CustomGraphPass):  # type: ignore[misc]
    """The passes for one graph that Dynamo captured.

    Args:
        passes: in the order to run them.
        parameter_names: name of every parameter, by its input key.
        names_matter: whether what the passes do depends on these names.
        left_alone: the report of the graph should it turn out to have no backward pass.
        apply: False only reports, and leaves the graph alone.
        cacheable: whether the fingerprints of the passes hold all that they do.
    """

    def __init__(
        self,
        passes: Sequence[GraphPass],
        parameter_names: dict[str, str],
        *,
        names_matter: bool = False,
        left_alone: GraphReport | None = None,
        apply: bool = True,
        cacheable: bool = True,
    ) -> None:
        disabled = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
        self.passes = tuple(each for each in passes if each.name not in disabled)
        self.parameter_names = parameter_names
        self.apply = apply
        self.report: GraphReport | None = None
        """Of the graph this ran on; None until then, or if a cache answered in its place."""
        self.left_alone = left_alone or GraphReport(state=State.INFERENCE)
        """The report of a graph without a backward pass, on which this need not run."""
        self.cacheable = cacheable
        self._names_matter = names_matter

    def __call__(self, graph: Graph) -> None:
        if not JointGraph.is_joint(graph):
            # A subgraph of a higher-order operator must not overwrite its parent's report.
            if self.report is None:
                self.report = self.left_alone
            return
        # A graph that comes by again, from a cache of torch's or a caller's, is left as it is.
        done = graph.output_node().meta.setdefault(_DONE, set())
        reports = []
        for each in self.passes:
            if each.name in done:
                continue
            _dump(graph, f"before {each.name}")
            reports.append(each(JointGraph(graph, self.parameter_names), apply=self.apply))
            if self.apply:
                done.add(each.name)
                _dump(graph, f"after {each.name}")
        if reports or self.report is None:
            self.report = GraphReport.merged(reports)

    def uuid(self) -> str | None:
        """Return what Inductor adds to its cache keys; None, which turns caching off."""
        return self.digest() if self.cacheable else None

    def digest(self) -> str:
        """Return a digest of every pass and all sources."""
        parts = [source_digest(), repr(self.apply)]
        parts += [f"{each.name}\n{each.fingerprint}" for each in self.passes]
        # Names decide only if the user selects by name; else they would split the cache in vain.
        if self._names_matter:
            parts += map(repr, sorted(self.parameter_names.items()))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class PassChain(inductor.CustomGraphPass):  # type: ignore[misc]
    """Several of Inductor's joint-graph passes as one, since torch 2.11 takes no list of them.

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


@functools.cache
def source_digest() -> str:
    """Return a digest of every source file of this package.

    Lowerings and templates count as much as the passes: Inductor's cache would otherwise return
    kernels made by their former versions.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".jinja", ".json")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _dump(graph: Graph, when: str) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug("joint graph %s:\n%s", when, str(graph))
    inductor.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"pamm_compile_joint_{when}", "encoding": "string"},
        payload_fn=lambda: str(graph),
    )
