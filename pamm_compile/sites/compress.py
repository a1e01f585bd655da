"""The pass that compresses inputs of projections: choose → decide → rewrite → report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from pamm_compile.devices import DeviceFigures
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.vocabulary import attention_operators
from pamm_compile.options import Options
from pamm_compile.private import aot
from pamm_compile.report import GraphReport, Note, Remembered, SiteReport, memories
from pamm_compile.sites.choose import Candidate, choose
from pamm_compile.sites.cost import saved_time
from pamm_compile.sites.decide import Decision, Plan, decide, is_returned
from pamm_compile.sites.nested import nested_declines
from pamm_compile.sites.reasons import Decline
from pamm_compile.sites.remembered import remembered
from pamm_compile.sites.rewrite import rewrite


@dataclass(frozen=True)
class CompressInputs:
    """Store inputs of projections in another form, and make weight gradients from that.

    Attributes:
        options: rules, goal, siblings, min_tokens and seed are read.
        gpu: what times are of, and decisions by them; None for the device at hand.
        memories: the input of Dynamo's graph from which on it takes what methods remember, in the
            order of `report.memories`; None where nothing is remembered yet.
    """

    options: Options
    gpu: DeviceFigures | None = None
    memories: int | None = None

    @property
    def name(self) -> str:
        """What logs and reports call it."""
        return "compress-inputs"

    @property
    def fingerprint(self) -> str:
        """The options, and what counts as attention."""
        return "\n".join([self.options.fingerprint, repr(self.memories), *attention_operators()])

    def __call__(self, joint: JointGraph, *, apply: bool) -> GraphReport:
        """Run over a joint graph."""
        decision = self.decide(joint)
        decision.declines.extend((None, remark) for remark in nested_declines(joint))
        known = {id(p): remembered(joint, p, self.options.rules) for p in decision.accepted}
        report = _report(joint, decision, known, self.gpu)
        if apply:
            along = {} if self.memories is None else self._memories(joint, known, report)
            rewrite(joint.graph, decision.accepted, self.options.seed, along)
        return report

    def _memories(
        self, joint: JointGraph, known: Mapping[int, Remembered | None], report: GraphReport
    ) -> dict[int, Node]:
        """Return the input that holds what is remembered of a plan, by `id` of the plan."""
        assert self.memories is not None
        order = memories(report)
        placeholders = joint.graph.find_nodes(op="placeholder")
        places = {aot.plain_position(n.meta.get("desc")): n for n in placeholders}
        return {
            plan: places[self.memories + order.index(each)]
            for plan, each in known.items()
            if each is not None
        }

    def decide(self, joint: JointGraph) -> Decision:
        """Return what it would do."""
        choice = choose(joint, self.options.rules, siblings=self.options.siblings)
        return decide(joint, choice, self.options, self.gpu)


def _report(
    joint: JointGraph,
    decision: Decision,
    known: Mapping[int, Remembered | None],
    gpu: DeviceFigures | None,
) -> GraphReport:
    order: list[tuple[Candidate, Decline | None]] = [(plan, None) for plan in decision.accepted]
    order += [(each, decline) for each, decline in decision.declines if each is not None]
    order.sort(key=lambda pair: pair[0].site.input)
    notes = [Note(d.reason.name, d.what, d.detail) for each, d in decision.declines if each is None]
    sites = (_site(joint, *pair, known.get(id(pair[0])), gpu) for pair in order)
    return GraphReport(tuple(sites), tuple(notes))


def _site(
    joint: JointGraph,
    candidate: Candidate,
    decline: Decline | None,
    known: Remembered | None,
    gpu: DeviceFigures | None,
) -> SiteReport:
    size, method = candidate.size, candidate.method
    stays = isinstance(candidate, Plan) and candidate.also_read_by
    stored = method.stored_bytes(size) + (size.bytes if stays else 0)
    return SiteReport(
        parameters=_parameters(candidate, trained_only=decline is None),
        shape=(size.tokens, size.features),
        dtype=str(size.dtype).removeprefix("torch."),
        method="" if decline else method.describe(size),
        generators=0 if decline else _generators(candidate),
        bytes_before=size.bytes,
        bytes_after=size.bytes if decline else stored,
        compressed=decline is None,
        reason=decline.reason.name if decline else None,
        detail=_detail(joint, candidate, decline),
        time=None if decline or not size.outputs else 1 - saved_time(method, size, gpu),
        remembered=known,
    )


def _generators(candidate: Candidate) -> int:
    # Methods that keep rows of X say how many; of others there is nothing to say.
    generators = getattr(candidate.method, "generators", None)
    return int(generators(candidate.size.tokens)) if callable(generators) else 0


def _parameters(candidate: Candidate, *, trained_only: bool) -> tuple[str, ...]:
    weights = (w for p in candidate.site.projections for w in p.parameters)
    names = (w.name for w in weights if w.gradient is not None or not trained_only)
    return tuple(dict.fromkeys(names))


def _detail(joint: JointGraph, candidate: Candidate, decline: Decline | None) -> str:
    if decline is not None:
        return decline.detail
    if isinstance(candidate, Plan) and candidate.also_read_by:
        return f"the input stays saved: also read by {candidate.also_read_by}"
    if is_returned(joint, candidate):
        return "also returned: freed only once the caller drops it"
    return ""
