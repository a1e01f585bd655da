"""The pass that compresses inputs of projections: choose → decide → rewrite → report."""

from __future__ import annotations

from dataclasses import dataclass

from pamm_compile.devices import DeviceFigures
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.vocabulary import attention_operators
from pamm_compile.options import Options
from pamm_compile.report import GraphReport, Note, SiteReport
from pamm_compile.sites.choose import Candidate, choose
from pamm_compile.sites.cost import saved_time
from pamm_compile.sites.decide import Decision, Plan, decide, is_returned
from pamm_compile.sites.nested import nested_declines
from pamm_compile.sites.reasons import Decline
from pamm_compile.sites.rewrite import rewrite


@dataclass(frozen=True)
class CompressInputs:
    """Store inputs of projections in another form, and make weight gradients from that.

    Attributes:
        options: rules, goal, siblings, min_tokens and seed are read.
        gpu: what reported times are of; None for the device at hand.
    """

    options: Options
    gpu: DeviceFigures | None = None

    @property
    def name(self) -> str:
        """What logs and reports call it."""
        return "compress-inputs"

    @property
    def fingerprint(self) -> str:
        """The options, and what counts as attention."""
        return "\n".join([self.options.fingerprint, *attention_operators()])

    def __call__(self, joint: JointGraph, *, apply: bool) -> GraphReport:
        """Run over a joint graph."""
        decision = self.decide(joint)
        decision.declines.extend((None, remark) for remark in nested_declines(joint))
        report = _report(joint, decision, self.gpu)
        if apply:
            rewrite(joint.graph, decision.accepted, self.options.seed)
        return report

    def decide(self, joint: JointGraph) -> Decision:
        """Return what it would do."""
        choice = choose(joint, self.options.rules, siblings=self.options.siblings)
        return decide(joint, choice, self.options)


def _report(joint: JointGraph, decision: Decision, gpu: DeviceFigures | None) -> GraphReport:
    order: list[tuple[Candidate, Decline | None]] = [(plan, None) for plan in decision.accepted]
    order += [(each, decline) for each, decline in decision.declines if each is not None]
    order.sort(key=lambda pair: pair[0].site.input)
    notes = [Note(d.reason.name, d.what, d.detail) for each, d in decision.declines if each is None]
    return GraphReport(tuple(_site(joint, *pair, gpu) for pair in order), tuple(notes))


def _site(
    joint: JointGraph, candidate: Candidate, decline: Decline | None, gpu: DeviceFigures | None
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
