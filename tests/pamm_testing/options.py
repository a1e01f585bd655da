"""Options as the tests write them: with what makes a single rule beside the rest."""

from __future__ import annotations

from typing import Any

from pamm_compile.options import Options


def make_options(**given: Any) -> Options:
    """Return the options that `pamm_compile.backend(**given)` has."""
    return Options.from_mapping(given)
