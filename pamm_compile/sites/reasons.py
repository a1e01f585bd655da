"""Why something stays exact: one table of reasons, sentences and the rooms that give them."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why projections stay exact: a sentence, and the rooms that give the reason.

    `str()` of one is the sentence. What to do about each is in docs/limitations.md.
    """

    NO_ATTENTION = (
        "the graph has no attention that we recognise",
        "sites/roles",
    )
    NO_WEIGHT_GRAD = (
        "the weight has no gradient (frozen)",
        "sites/decide",
        "sites/leftovers",
        "sites/roles",
    )
    SHARED_INPUT = (
        "the backward pass reads the input for something else too",
        "sites/decide",
    )
    RECOMPUTED = (
        "the input is recomputed in the backward pass (activation checkpointing)",
        "sites/decide",
    )
    TOO_FEW_TOKENS = (
        "fewer tokens than min_tokens",
        "sites/decide",
    )
    NOT_A_PROJECTION = (
        "attention reads something that is not a matmul with a parameter",
        "sites/leftovers",
        "sites/roles",
        "sites/targets",
    )
    PROJECTION_IN_ANOTHER_GRAPH = (
        "the projection is in another graph (graph break)",
        "sites/leftovers",
        "sites/roles",
    )
    NARROW_INPUT = (
        "the input is a low-rank factor, itself the output of a narrow projection",
        "sites/roles",
    )
    EXACT_BY_RULE = (
        "a rule leaves it exact",
        "sites/choose",
    )
    NO_SAVING = (
        "the stored tensors would take as many bytes as the input",
        "sites/decide",
    )
    UNPROFITABLE = (
        "the weight gradient would take longer than the exact one",
        "sites/decide",
    )
    UNKNOWN_TOKENS = (
        "the number of tokens is not known before the graph runs",
        "sites/decide",
    )
    NESTED_REGION = (
        "the weight is used in a region that is compiled on its own",
        "sites/nested",
    )
    OWN_GRADIENTS = (
        "the graph computes gradients itself, so it stays exact",
        "driver",
    )
    AMBIGUOUS_NAME = (
        "one graph runs for several modules, and its names are those of one of them",
        "driver",
    )
    UNSUPPORTED_LAYOUT = (
        "the weight gradient is not a plain matmul over all tokens",
        "sites/decide",
        "sites/leftovers",
        "sites/roles",
    )
    ROUNDED_INPUT = (
        "the weight gradient reads the input in another form than the forward pass",
        "sites/roles",
    )
    NOT_OVER_TOKENS = (
        "the weight mixes heads or tokens of a projection's output",
        "sites/roles",
    )
    LEARNED_INPUT = (
        "the input is computed from parameters alone",
        "sites/leftovers",
        "sites/roles",
    )
    COMPUTED_WEIGHT = (
        "the weight is computed from activations, whose gradients would change too",
        "sites/leftovers",
        "sites/roles",
    )
    UNCLEAR_TARGET = (
        "the graph does not tell which target the projection belongs to",
        "sites/choose",
    )

    def __init__(self, sentence: str, *rooms: str) -> None:
        self.sentence = sentence
        self.rooms = rooms

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Decline:
    """Something that stays exact, and why."""

    reason: Reason
    what: str
    """Parameter names, or the operator that was found instead of a projection."""
    detail: str = ""
