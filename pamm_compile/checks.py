"""Checks of values that users pass; every refusal says what was given and what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import reprlib
from collections.abc import Sequence

from pamm_compile.errors import InvalidOptionError

MOST = 2**63 - 1
"""The largest integer that an option may be, as that of a size is."""

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxlong = _shown.maxother = 200


def shown(given: object) -> str:
    """Return how a value is written, its middle left out where that is long."""
    if isinstance(given, int) and abs(given) >= 10**_shown.maxlong:
        # Python refuses to write out the longest.
        return f"an integer of {given.bit_length()} bits"
    return _shown.repr(given)


def shortened(text: str) -> str:
    """Return text, its middle left out where it is long."""
    return text if len(text) <= _shown.maxstring else shown(text)[1:-1]


def refusal(name: str, given: object, allowed: str, hint: str) -> InvalidOptionError:
    """Return the error for a value that is not allowed, to be raised."""
    return InvalidOptionError(
        f"{name}={shown(given)} is not allowed: {name} must be {allowed}. {hint}"
    )


def number(name: str, given: object, allowed: str, hint: str) -> float:
    """Return a real number that is not NaN, or raise."""
    # bool is an int to Python, and NaN passes every "not less than": both are mistakes here.
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise refusal(name, given, allowed, hint)
    try:
        value = float(given)
    except OverflowError:
        raise refusal(name, given, allowed, hint) from None
    if math.isnan(value):
        raise refusal(name, given, allowed, hint)
    return value


def integer(name: str, given: object, least: int, hint: str, most: int = MOST) -> int:
    """Return an integer in [least, most], or raise."""
    allowed = f"an integer of at least {least}" + (f" and at most {most}" if most < MOST else "")
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise refusal(name, given, allowed, hint)
    whole = int(given)
    if whole > most:
        allowed = f"an integer of at least {least} and at most {most}"
    if not least <= whole <= most:
        raise refusal(name, given, allowed, hint)
    return whole


def share(name: str, given: object, hint: str) -> float:
    """Return a number in [0, 1], or raise."""
    allowed = "a number in [0, 1]"
    value = number(name, given, allowed, hint)
    if not 0 <= value <= 1:
        raise refusal(name, given, allowed, hint)
    return value


def flag(name: str, given: object, hint: str) -> bool:
    """Return True or False, or raise."""
    if not isinstance(given, bool):
        raise refusal(name, given, "True or False", hint)
    return given


def choice(name: str, given: object, allowed: Sequence[str], more: str = "") -> None:
    """Raise if a value is none of the words allowed, naming the nearest."""
    if isinstance(given, str) and given in allowed:
        return
    near = nearest(given, allowed) if isinstance(given, str) else None
    hint = f"Did you mean {near!r}?" if near else "Choose one of these."
    words = " or ".join(map(repr, allowed)) + (f", {more}" if more else "")
    raise refusal(name, given, words, hint)


def pattern(name: str, given: str, hint: str) -> re.Pattern[str]:
    """Return a compiled regular expression, or raise."""
    try:
        return re.compile(given)
    except (re.error, OverflowError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidOptionError(
            f"{name}={shown(given)} is no regular expression: {why}. {hint}"
        ) from None


def nearest(word: str, allowed: Sequence[str]) -> str | None:
    """Return the allowed word that looks most like one that was given, if any does."""
    return next(iter(difflib.get_close_matches(word, allowed, n=1)), None)


def unknown_option(name: object, allowed: Sequence[str]) -> InvalidOptionError:
    """Return the error for an option that does not exist, with the nearest that does.

    Args:
        name: what was given.
        allowed: every name that is accepted.

    Returns:
        The error, to be raised.
    """
    near = nearest(name, allowed) if isinstance(name, str) else None
    hint = f" Did you mean {near!r}?" if near else ""
    # Inductor alone has hundreds of options; a list of them would hide the hint.
    listing = f" Allowed: {', '.join(allowed)}." if len(allowed) <= 20 else ""
    return InvalidOptionError(f"{shown(name)} is not an option.{hint}{listing}")
