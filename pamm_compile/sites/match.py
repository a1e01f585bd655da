"""Find attention sites in a joint graph: anchors → projections → sites. Never changes the graph.

    X ─┬─ mm(X, Wqᵀ) ── view ── rotary ──┐
       ├─ mm(X, Wkᵀ) ── view ── rotary ──┤ attention          ← anchor
       └─ mm(X, Wvᵀ) ── view ────────────┘
       └ the site: one compressed input, shared by three projections

An anchor is an attention operator, or hand-written attention recognised by its shape: a matmul
whose left factor comes from an exponential over a matmul of two activations. From the anchor's
query, key and value we walk back to the matmuls with parameters. Projections that read the same
elements in the same order (same base, same chain) form one site.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from pamm_compile.graph.joint import (
    Chain,
    JointGraph,
    Parameter,
    is_convolution,
    is_matmul,
    matmul_operands,
    op_name,
    strip_transposes,
    value,
)
from pamm_compile.options import Targets

_ATEN_ATTENTION = re.compile(
    r"aten::(_scaled_dot_product_\w*attention\w*|_(flash|efficient|cudnn)_attention_forward)$"
)
# Libraries whose forward takes (q, k, v, …); `register_attention` adds to these.
_LIBRARY_ATTENTION = {
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "torch_attn::_varlen_attn",
    "higher_order::flex_attention",
}
_EXPONENTIALS = {"aten::exp", "aten::_softmax", "aten::_safe_softmax", "aten::softmax"}
_EMBEDDINGS = {"aten::embedding", "aten::_embedding_bag"}
_ACTIVATION_SUMS = {"aten::add", "aten::sub"}


def register_attention(operator: str) -> None:
    """Declare an operator to be attention, so that its projections are found.

    Args:
        operator: "namespace::name" of a forward operator whose first three arguments are the
            query, key and value.
    """
    _LIBRARY_ATTENTION.add(operator)


def attention_operators() -> tuple[str, ...]:
    """Return the library operators taken for attention, sorted."""
    return tuple(sorted(_LIBRARY_ATTENTION))


class Reason(enum.Enum):
    """Why projections stay exact. The value is what the report prints."""

    NO_ATTENTION = "the graph has no attention that we recognise"
    NO_WEIGHT_GRAD = "the weight has no gradient (frozen)"
    SHARED_INPUT = "the backward pass reads the input for something else too"
    RECOMPUTED = "the input is recomputed in the backward pass (activation checkpointing)"
    TOO_FEW_TOKENS = "fewer tokens than min_tokens"
    NOT_A_PROJECTION = "attention reads something that is not a matmul with a parameter"
    PROJECTION_IN_ANOTHER_GRAPH = "the projection is in another graph (graph break)"
    NARROW_INPUT = "the input is a low-rank factor, itself the output of a narrow projection"
    UNSUPPORTED_LAYOUT = "the weight gradient is not a plain matmul over all tokens"


@dataclass(frozen=True)
class Decline:
    """Something that stays exact, and why."""

    reason: Reason
    what: str
    """Parameter names, or the operator that was found instead of a projection."""
    detail: str = ""


@dataclass(frozen=True)
class Projection:
    """A matmul of an activation with parameters, in the forward pass."""

    node: Node
    input: Node
    """The factor that is an activation, as the matmul reads it."""
    parameters: tuple[Parameter, ...]
    narrow_of: Projection | None = None
    """The narrow projection whose output this one reads (LoRA's B reads A's), if any."""

    @property
    def name(self) -> str:
        """The parameters' names, joined."""
        return " + ".join(p.name for p in self.parameters)


@dataclass(frozen=True)
class WeightGradient:
    """A backward matmul over tokens: dZᵀ·X, or Xᵀ·dZ where `transposed`."""

    node: Node
    output_gradient: Node
    """The factor that is not X: [m, b] (so dZᵀ), or [b, m] where `transposed`."""
    transposed: bool
    projection: Projection


@dataclass
class Site:
    """Projections that read one input, and the weight gradients made from it."""

    chain: Chain
    input: Node
    """X as the projections read it: [b, n], or [1, b, n] for batched matmuls."""
    projections: list[Projection] = field(default_factory=list)
    gradients: list[WeightGradient] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The names of all parameters, in the order the forward pass uses them."""
        return ", ".join(p.name for p in self.projections)


@dataclass
class Match:
    """Everything found in one joint graph."""

    sites: list[Site]
    declines: list[Decline]


def find_sites(joint: JointGraph, targets: Targets) -> Match:
    """Find the sites of a joint graph.

    Args:
        joint: the graph to read.
        targets: "qkv" for the projections that feed attention; "linear" for every matmul of an
            activation with a parameter; a regular expression for those of them whose parameter
            names it matches.

    Returns:
        The sites in graph order, and what was declined already while matching.
    """
    finder = _Finder(joint)
    if targets == "qkv":
        finder.search_attention()
    else:
        finder.search_linear(None if targets == "linear" else targets)
    return Match(finder.sites(), finder.declines)


class _Finder:
    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.declines: list[Decline] = []
        self._projections: dict[Node, Projection] = {}

    # Anchors ---------------------------------------------------------------------------------

    def search_attention(self) -> None:
        anchors = 0
        for node in self.joint.nodes:
            if node in self.joint.backward:
                continue
            operands = self._attention_operands(node)
            if operands:
                anchors += 1
                self._collect(operands)
        if not anchors:
            self.declines.append(Decline(Reason.NO_ATTENTION, "attention"))

    def _attention_operands(self, node: Node) -> list[Node]:
        name = op_name(node)
        aten_attention = _ATEN_ATTENTION.match(name) and "backward" not in name
        if aten_attention or name in _LIBRARY_ATTENTION:
            return [arg for arg in node.args[:3] if isinstance(arg, Node)]
        if is_matmul(node) and self._projection_operands(node) is None:
            left, right = matmul_operands(node)
            for weights, values in ((left, right), (right, left)):
                scores = self._scores(weights)
                if scores:
                    return [*(op for s in scores for op in matmul_operands(s)), values]
        return []

    def _scores(self, weights: Node) -> list[Node]:
        """Return the score matmuls under an attention probability; [] if it is none."""
        visited = list(self.joint.walk_back([weights], self._ends_scores))
        if not any(op_name(node) in _EXPONENTIALS for node in visited):
            return []
        return [n for n in visited if is_matmul(n) and self._projection_operands(n) is None]

    def _ends_scores(self, node: Node) -> bool:
        return is_matmul(node) or is_convolution(node) or op_name(node) in _EMBEDDINGS

    # Projections -----------------------------------------------------------------------------

    def search_linear(self, pattern: re.Pattern[str] | None) -> None:
        for node in self.joint.nodes:
            if node in self.joint.backward or not is_matmul(node):
                continue
            projection = self._projection(node)
            if projection is None:
                continue
            if pattern is None or any(pattern.search(p.name) for p in projection.parameters):
                self._projections[node] = projection
        if not self._projections:
            self.declines.append(Decline(Reason.NOT_A_PROJECTION, "targets", "no matmul matches"))

    def _collect(self, operands: Iterable[Node]) -> None:
        for node in self.joint.walk_back(operands, self._ends_projection):
            if is_matmul(node):
                projection = self._projection(node)
                if projection is not None:
                    self._add(projection)
            elif is_convolution(node):
                self._decline_once(Reason.NOT_A_PROJECTION, op_name(node))
            elif node.op == "placeholder" and self._is_activation_input(node):
                detail = f"graph input {node.name}"
                self._decline_once(Reason.PROJECTION_IN_ANOTHER_GRAPH, "attention", detail)

    def _add(self, projection: Projection) -> None:
        self._projections[projection.node] = projection
        if projection.narrow_of is not None:
            self._add(projection.narrow_of)

    def _decline_once(self, reason: Reason, what: str, detail: str = "") -> None:
        decline = Decline(reason, what, detail)
        if decline not in self.declines:
            self.declines.append(decline)

    def _ends_projection(self, node: Node) -> bool:
        name = op_name(node)
        return (
            is_matmul(node)
            or is_convolution(node)
            or name in _EMBEDDINGS
            or name in _LIBRARY_ATTENTION
            or _ATEN_ATTENTION.match(name) is not None
        )

    def _is_activation_input(self, node: Node) -> bool:
        # Rotary tables and masks may be inputs too, but nothing differentiates them.
        return node not in self.joint.parameters and self.joint.gradient_of(node) is not None

    def _projection_operands(self, node: Node) -> tuple[Node, list[Parameter]] | None:
        left, right = matmul_operands(node)
        for activation, weight in ((left, right), (right, left)):
            parameters = self.joint.parameters_of(weight)
            if parameters and not self.joint.parameters_of(activation):
                return activation, parameters
        return None

    def _projection(self, node: Node) -> Projection | None:
        operands = self._projection_operands(node)
        if operands is None:
            return None
        activation, parameters = operands
        return Projection(node, activation, tuple(parameters), self._narrow(activation))

    def _narrow(self, activation: Node) -> Projection | None:
        """Return the projection whose narrow output an activation is, if it is a low-rank factor.

        x ── A (n → r) ── B                    a factor, as in LoRA
        x ── A (n → r) ─┬─ norm ── B ── … ─ add     the stream itself, as behind a
                        └───────────────────┘       projection of patches
        """
        for node in self.joint.walk_back([activation], self._ends_narrow):
            if not is_matmul(node):
                continue
            operands = self._projection_operands(node)
            if operands is None:
                continue
            wide, narrow = value(operands[0]).shape[-1], value(node).shape[-1]
            is_narrow = isinstance(wide, int) and isinstance(narrow, int) and 2 * narrow <= wide
            if is_narrow and not self._is_residual_stream(node):
                return Projection(node, operands[0], tuple(operands[1]))
        return None

    def _ends_narrow(self, node: Node) -> bool:
        if self._ends_projection(node):
            return True
        if op_name(node) not in _ACTIVATION_SUMS:
            return False
        full = [n for n in node.all_input_nodes if self._spans(n, node)]
        return len(full) > 1

    def _is_residual_stream(self, node: Node) -> bool:
        """Tell whether something behind a matmul or attention is added to a node's elements."""
        own, stack = {node}, [node]
        while stack:
            for user in stack.pop().users:
                ends = user in self.joint.backward or self._ends_projection(user)
                if user not in own and user.op != "output" and not ends:
                    own.add(user)
                    stack.append(user)
        return any(
            op_name(total) in _ACTIVATION_SUMS
            and any(n not in own and self._spans(n, total) for n in total.all_input_nodes)
            for total in own
        )

    def _spans(self, operand: Node, result: Node) -> bool:
        a, b = value(operand), value(result)
        return isinstance(a, torch.Tensor) and a.shape == b.shape

    # Sites -----------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        sites: dict[Chain, Site] = {}
        for node in sorted(self._projections):
            projection = self._projections[node]
            stripped, _ = strip_transposes(projection.input)
            chain = self.joint.chain_of(stripped)
            site = sites.setdefault(chain, Site(chain, stripped))
            site.projections.append(projection)
            for gradient in self._weight_gradients(projection, site.chain):
                if all(gradient.node is not g.node for g in site.gradients):
                    site.gradients.append(gradient)
        return list(sites.values())

    def _weight_gradients(self, projection: Projection, chain: Chain) -> list[WeightGradient]:
        found = []
        for parameter in projection.parameters:
            for node in self.joint.gradient_matmuls(parameter):
                left, right = matmul_operands(node)
                for factor, other, is_left in ((left, right, True), (right, left, False)):
                    stripped, odd = strip_transposes(factor)
                    # Xᵀ on the left or X on the right; else the sum is not over tokens.
                    if odd == is_left and self.joint.chain_of(stripped) == chain:
                        found.append(WeightGradient(node, other, is_left, projection))
        return found
