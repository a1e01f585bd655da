"""What every projection of a joint graph is for, read off the flow of activations.

    FEEDS_ATTENTION    through anything but another product
    READS_ATTENTION    or is a gate beside the output of attention
    WRITES_STREAM      to the residual stream, by itself or through other projections
    MAKES_OUTPUT       leaves the graph, behind a residual stream

`targets.TARGETS` gives them names.

A projection between attention and the one that reads the residual stream is no input of tokens: a
low-rank factor (LoRA's B), or a weight that mixes heads or tokens. It stays exact, and the one
behind it is what feeds attention.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.fx import Node

from pamm_compile.graph.chains import matmul_operands
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.operands import Factors, Kind, Operands
from pamm_compile.graph.vocabulary import is_convolution, is_embedding, is_foreign, is_scan, op_name
from pamm_compile.sites.anchors import Anchors
from pamm_compile.sites.flow import Flow
from pamm_compile.sites.leftovers import NO_GRADIENT, is_differentiated, leftovers
from pamm_compile.sites.lowrank import LowRank
from pamm_compile.sites.projections import Projection, Sizes, Unmatched, factor_of, group, sizes_of
from pamm_compile.sites.reasons import Decline, Reason
from pamm_compile.targets import Use


class Roles:
    """The projections of a joint graph, with what each is for.

    Args:
        joint: the graph to read.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.operands = Operands(joint)
        self.flow = Flow(joint, self.operands, Anchors(joint, self.operands))
        self.notes: list[Decline] = []
        self.unmatched: list[Unmatched] = []
        self._found: dict[Node, Projection] = {}
        self._sizes: dict[Node, Sizes] = {}
        self._known_gradients: set[Node] = set()
        self._lowrank = LowRank(self.flow)
        self._factors: dict[Node, list[Node]] = defaultdict(list)
        self._weights_over: dict[Any, int] = defaultdict(int)
        self._leads_to = self._destinations()
        self._streams = self._find_streams()

        for node, factors in self.flow.projections.items():
            self._found[node] = Projection(node, factors.activation, factors.parameters)
            sizes = self._sizes[node] = sizes_of(node, factors)
            self._weights_over[sizes.rows] += sizes.weights
        for node, factors in self.flow.learned.items():
            self._add_learned(node, factors)
        for node in self.flow.projections:
            self._decline_narrow(node)
        self._qkv: set[Node] = set()
        self._search_attention()
        for node in self._found:
            self._set_uses(node)
        self._find_unmatched()
        self.projections = [self._found[node] for node in sorted(self._found)]
        self._decline_what_has_no_gradient()
        self.unmatched += leftovers(self.flow, self.projections, self.unmatched)

    def _add_learned(self, node: Node, factors: Factors) -> None:
        # The product of two factors of a weight is no projection: the weight's own matmul is.
        used = {p for f in self.flow.projections.values() for p in f.parameters}
        if not used.issuperset(self.operands.parameters(node)):
            projection = Projection(node, factors.activation, factors.parameters)
            projection.decline(Reason.LEARNED_INPUT)
            self._found[node] = projection

    # What stands between projections and attention ---------------------------------------------

    def _before(self, node: Node) -> list[Node]:
        """Return the projections whose output another reads, streams left out.

        Not those that scale or shift many tokens at once: conditioning has rows of its own, and
        takes no part in what a weight mixes.
        """
        read = self.flow.through(self._found[node].input)
        return sorted(n for n in read if n in self._sizes and n not in self.flow.starts)

    def _decline_narrow(self, node: Node, *, normed: bool = False) -> None:
        """Decline what reads a low-rank factor: the output of a projection that narrows.

        Args:
            node: a projection.
            normed: whether a norm may stand between, as in latent attention, if the factor is one
                of the residual stream.
        """
        value = factor_of(self.joint, self._found[node]).node
        sources = self._lowrank.sources(value, normed=normed)
        if not all(n in self._sizes and self._sizes[n].is_narrow for n in sources):
            # A sum or a product with something wide is not narrow.
            return
        weights = self._weights_over[self._sizes[node].rows]
        for other in sorted(sources - self.flow.starts):
            # What combines parallel streams runs over features, not over tokens.
            over_tokens = self._weights_over[self._sizes[other].rows] >= weights
            if over_tokens and (not normed or self._lowrank.reads_stream(other)):
                self._factors[node].append(other)
        if self._factors[node]:
            detail = f"output of {self._found[self._factors[node][0]].name}"
            self._found[node].decline(Reason.NARROW_INPUT, detail)

    def _mixed(self, node: Node) -> list[Node]:
        """Return the projections whose heads or tokens a matmul mixes; none if it does not.

        It has other rows than they, and few weights have: rows are those of tokens elsewhere.
        """
        rows = self._sizes[node].rows
        return [
            other
            for other in self._before(node)
            if self._sizes[other].rows != rows
            and self._weights_over[self._sizes[other].rows] > self._weights_over[rows]
        ]

    # Attention -------------------------------------------------------------------------------

    def _search_attention(self) -> None:
        anchors = self.flow.anchors.operands
        for operands in anchors.values():
            for node in self.joint.walk_back(operands, self._ends_search, self.flow.followed):
                self._visit(node)
        if not anchors:
            self.notes.append(Decline(Reason.NO_ATTENTION, "attention"))

    def _ends_search(self, node: Node) -> bool:
        return self.flow.is_stop(node) or (is_convolution(node) and not self._stands_between(node))

    def _stands_between(self, convolution: Node) -> bool:
        """Tell whether a convolution works on the output of a projection."""
        behind = {n for s in self.flow.followed(convolution) for n in self.flow.behind(s)}
        return any(n in self._sizes and n not in self.flow.starts for n in behind)

    def _visit(self, node: Node) -> None:
        if node in self._found:
            self._take(node)
        elif node in self.flow.opaque:
            self._qkv.add(node)
        elif is_convolution(node):
            weight = node.args[1]
            assert isinstance(weight, Node)
            names = [p.name for p in self.operands.parameters(weight)]
            self._note(Reason.NOT_A_PROJECTION, ", ".join(names) or "attention", op_name(node))
        elif node.op == "placeholder" and self.operands.kind(node) is Kind.ACTIVATION:
            detail = f"graph input {node.name}"
            self._note(Reason.PROJECTION_IN_ANOTHER_GRAPH, "attention", detail)

    def _take(self, node: Node) -> None:
        if node in self._qkv:
            return
        self._qkv.add(node)
        if node not in self._sizes:
            return
        mixed = self._mixed(node)
        if mixed:
            names = ", ".join(self._found[other].name for other in mixed)
            self._found[node].decline(Reason.NOT_OVER_TOKENS, f"output of {names}")
        if not self._factors[node]:
            self._decline_narrow(node, normed=True)
        for other in mixed or self._factors[node]:
            self._take(other)

    def _note(self, reason: Reason, what: str, detail: str = "") -> None:
        decline = Decline(reason, what, detail)
        if decline not in self.notes:
            self.notes.append(decline)

    # Uses ------------------------------------------------------------------------------------

    def _destinations(self) -> dict[Node, frozenset[str]]:
        """Return where the output of every stop goes, on through further projections."""
        flow = self.flow
        found: dict[Node, frozenset[str]] = {}
        stops = {*flow.successors, *flow.projections, *flow.opaque, *flow.mixers}
        for stop in sorted(stops, reverse=True):
            reached: set[str] = set()
            for user in flow.successors.get(stop, ()):
                if user is self.joint.output:
                    reached |= {"output", "returned"} if stop in flow.returned else {"output"}
                elif user in flow.residual:
                    reached.add("stream")
                elif flow.is_attention(user):
                    reached.add("attention")
                elif self._attends(user):
                    reached.add(op_name(user))
                else:
                    reached |= found.get(user, frozenset())
                    # What is multiplied to the result of such a mixer is part of it.
                    beside = {s for i in flow.inputs(user) for s in flow.through(i)}
                    reached |= {op_name(s) for s in beside if s is not stop and self._attends(s)}
            found[stop] = frozenset(reached)
        return found

    def _attends(self, mixer: Node) -> bool:
        """Tell whether what mixes activations may be attention, if none that we recognise.

        A matmul of two activations is, if another one is next to it; one alone combines experts, or
        compares embeddings.
        """
        if mixer not in self.flow.mixers:
            return False
        if is_foreign(mixer) or is_scan(mixer):
            return True
        behind = {stop for s in self.flow.inputs(mixer) for stop in self.flow.behind(s)}
        users = self.flow.successors.get(mixer, set())
        return bool((behind | users) & self.flow.mixers)

    def _set_uses(self, node: Node) -> None:
        projection = self._found[node]
        projection.uses, unclear = self._uses_of(node, projection.input)
        if projection.is_trained:
            projection.unclear = unclear

    def _uses_of(self, node: Node, *inputs: Node) -> tuple[frozenset[Use], str | None]:
        """Return what a product is for, and if nothing why the graph does not tell."""
        if node in self._qkv:
            return frozenset({Use.FEEDS_ATTENTION}), None
        nothing: frozenset[Use] = frozenset()
        flow = self.flow
        leads_to = self._leads_to.get(node, frozenset())
        if self._reads_attention(node, inputs) or self._gates(node):
            return frozenset({Use.READS_ATTENTION}), None
        if node in flow.starts:
            return nothing, None
        others = leads_to - {"output", "returned", "stream", "attention"}
        if others:
            return nothing, f"feeds {', '.join(sorted(others))}"
        if "attention" in leads_to:
            return nothing, None
        if "stream" in leads_to:
            return frozenset({Use.WRITES_STREAM}), None
        if "output" not in leads_to:
            return nothing, None
        # Queries of attention in another graph leave this one as the logits do.
        away = "its output leaves the graph" if "returned" in leads_to else None
        if any(self._has_stream(value) for value in inputs):
            return frozenset({Use.MAKES_OUTPUT}), None if flow.anchors.operands else away
        return nothing, away

    def _has_stream(self, value: Node) -> bool:
        return any(stop in self._streams for stop in self.flow.behind(value))

    def _find_streams(self) -> set[Node]:
        """Return the stops that read a residual stream or tokens, if through projections."""
        found: set[Node] = set()
        flow = self.flow
        for node in self.joint.nodes:
            if node in flow.residual or is_embedding(node) or node in flow.anchors.operands:
                found.add(node)
            elif node in flow.projections or node in flow.opaque:
                behind = {stop for value in flow.inputs(node) for stop in flow.behind(value)}
                if not behind.isdisjoint(found):
                    found.add(node)
        return found

    def _reads_attention(self, node: Node, inputs: tuple[Node, ...]) -> bool:
        """Tell whether a product reads the output of attention, if need be through a factor."""
        behind = {stop for value in inputs for stop in self.flow.through(value)}
        if not behind.isdisjoint(self.flow.anchors.operands):
            return True
        return any(
            self._reads_attention(other, (self._found[other].input,))
            for other in self._factors[node]
        )

    def _gates(self, node: Node) -> bool:
        """Tell whether a projection's output is multiplied with that of attention."""
        anchors = self.flow.anchors.operands
        for user in self.flow.successors.get(node, ()):
            if user not in self.flow.projections:
                continue
            activation = self.flow.projections[user].activation
            if self.flow.behind(activation).isdisjoint(anchors):
                continue
            for step in self.flow.segment([activation]):
                if op_name(step) == "aten::mul":
                    factors = [self.flow.behind(s) for s in self.flow.followed(step)]
                    if any(node in f for f in factors) and any(
                        not f.isdisjoint(anchors) for f in factors
                    ):
                        return True
        return False

    # What is left ----------------------------------------------------------------------------

    def _find_unmatched(self) -> None:
        for node, weights in self.flow.opaque.items():
            parameters = tuple(
                p for w in weights for p in self.operands.parameters(w) if p.gradient is not None
            )
            if not parameters:
                continue
            uses, unclear = self._uses_of(node, *self.flow.inputs(node))
            names = ", ".join(dict.fromkeys(p.name for p in parameters))
            if unclear is not None:
                uses = frozenset(Use)
            decline = Decline(Reason.NOT_A_PROJECTION, names, op_name(node))
            self.unmatched.append(Unmatched(parameters, uses, decline))

    def _decline_what_has_no_gradient(self) -> None:
        """Give a reason to every trained projection whose weight gradient was not found."""
        sites = group(self.joint, self.projections, every=True)
        self._known_gradients = {n for s in sites for g in s.gradients for n in g.nodes}
        for site in sites:
            covered = {w for g in site.gradients for w in g.projection.parameters}
            for projection in site.projections:
                trained = [w for w in projection.parameters if w.gradient is not None]
                if not trained or not covered.isdisjoint(trained):
                    continue
                if projection.reason in (None, Reason.NARROW_INPUT, Reason.NOT_OVER_TOKENS):
                    self._decline_uncovered(projection)

    def _decline_uncovered(self, projection: Projection) -> None:
        factors = self.flow.projections.get(projection.node)
        if not is_differentiated(self.joint, projection):
            # What it reads does not matter then.
            other = self._reads_another_form(projection)
            detail = "" if other else NO_GRADIENT
            reason = Reason.ROUNDED_INPUT if other else Reason.NO_WEIGHT_GRAD
            projection.reason, projection.detail = reason, detail
        elif factors is not None and factors.active:
            projection.decline(Reason.COMPUTED_WEIGHT)
        elif factor_of(self.joint, projection).rounding is not None:
            projection.decline(Reason.ROUNDED_INPUT)
        else:
            projection.decline(Reason.UNSUPPORTED_LAYOUT)

    def _reads_another_form(self, projection: Projection) -> bool:
        """Tell whether a weight's gradient is a product with what the input is made of, too.

        A form of the input may be rounded in blocks, or to integers, and the gradient be made by
        hand of the input itself, or of another form.
        """
        made_of = self._made_of(projection.input)
        gradients = {g for w in projection.parameters for g in self.joint.gradient_matmuls(w)}
        forward = (
            factor
            for matmul in gradients - self._known_gradients
            for factor in matmul_operands(matmul)
            if factor not in self.joint.backward
        )
        return any(self._made_of(factor) & made_of for factor in forward)

    def _made_of(self, value: Node) -> set[Node]:
        """Return what a value is made of since the last product, weights and constants left out."""
        kinds = (Kind.ACTIVATION, Kind.MIXED)
        return {
            node
            for node in self.flow.segment([value])
            if self.operands.kind(node) in kinds or self.operands.is_fed(node)
        }
