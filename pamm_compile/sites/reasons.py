"""Why something stays exact."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why projections stay exact. `str()` of one is the sentence that a report prints."""

    NO_ATTENTION = "the graph has no attention that we recognise"
    NO_WEIGHT_GRAD = "the weight has no gradient (frozen)"
    SHARED_INPUT = "the backward pass reads the input for something else too"
    RECOMPUTED = "the input is recomputed in the backward pass (activation checkpointing)"
    TOO_FEW_TOKENS = "fewer tokens than min_tokens"
    NOT_A_PROJECTION = "attention reads something that is not a matmul with a parameter"
    PROJECTION_IN_ANOTHER_GRAPH = "the projection is in another graph (graph break)"
    NARROW_INPUT = "the input is a low-rank factor, itself the output of a narrow projection"
    EXACT_BY_RULE = "a rule leaves it exact"
    NO_SAVING = "what is stored would take as many bytes as the input"
    UNPROFITABLE = "making the weight gradient from what is stored would take longer than exactly"
    UNKNOWN_TOKENS = "the number of tokens is not known before the graph runs"
    NESTED_REGION = "the weight is used in a region that is compiled on its own"
    OWN_GRADIENTS = "the graph computes gradients itself, and is left alone"
    AMBIGUOUS_NAME = "one graph runs for several modules, and its names are those of one of them"
    UNSUPPORTED_LAYOUT = "the weight gradient is not a plain matmul over all tokens"
    NOT_OVER_TOKENS = "the weight mixes heads or tokens of a projection's output"
    LEARNED_INPUT = "the input is computed from parameters alone"
    COMPUTED_WEIGHT = "the weight is computed from activations, whose gradients would change too"
    UNCLEAR_TARGET = "the graph does not tell which target the projection belongs to"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Decline:
    """Something that stays exact, and why."""

    reason: Reason
    what: str
    """Parameter names, or the operator that was found instead of a projection."""
    detail: str = ""
