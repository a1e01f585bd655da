"""A number of directions, as a share of what there is or as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pamm_compile import checks

_MULTIPLE = 8


def checked_rank(given: object) -> float:
    """Return a rank: a share in (0, 1), or an integer of at least 1.

    Raises:
        InvalidOptionError: it is neither.
    """
    allowed = f"a share in (0, 1) or an integer of at least 1 and at most {checks.MOST}"
    hint = "0.1 keeps a tenth of the directions, 64 keeps 64."
    rank = checks.number("rank", given, allowed, hint)
    if not (0 < rank < 1 or (1 <= rank <= checks.MOST and rank.is_integer())):
        raise checks.refusal("rank", given, allowed, hint)
    return int(rank) if rank >= 1 else rank


def directions(rank: float, features: int, outputs: Sequence[int]) -> int:
    """Return r for an input and its projections, at most the number of features.

    A share is of min(features, outputs of all projections), rounded up to a multiple of 8.
    """
    if rank >= 1:
        return min(int(rank), features)
    wanted = math.ceil(rank * min(features, sum(outputs)))
    return min(features, -(-wanted // _MULTIPLE) * _MULTIPLE)
