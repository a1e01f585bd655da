"""The options of the backend, validated and frozen."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

from pamm_compile.errors import InvalidOptionError
from pamm_compile.methods.pamm.compression import Sampling

Base = Literal["inductor", "aot_eager"]
Targets = Literal["qkv", "linear"] | re.Pattern[str]

_SEED_LIMIT = 2**31


def _reject(name: str, given: object, allowed: str, hint: str) -> InvalidOptionError:
    return InvalidOptionError(f"{name}={given!r} is not allowed: {name} must be {allowed}. {hint}")


def _number(name: str, given: object, allowed: str, hint: str) -> float:
    # bool is an int to Python, and NaN passes every "not less than": both are mistakes here.
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or math.isnan(given):
        raise _reject(name, given, allowed, hint)
    return float(given)


def _integer(name: str, given: object, least: int, hint: str, most: int | None = None) -> int:
    allowed = f"an integer of at least {least}" + (f" and at most {most}" if most else "")
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise _reject(name, given, allowed, hint)
    number = int(given)
    if number < least or (most is not None and number > most):
        raise _reject(name, given, allowed, hint)
    return number


@dataclass(frozen=True)
class Options:
    """What the user chose; `pamm_compile.backend` documents each option.

    Raises:
        InvalidOptionError: a value is not allowed.
    """

    ratio: float = 256
    epsilon: float | None = None
    sampling: Sampling = "stratified"
    min_generators: int = 1
    min_tokens: int = 256
    targets: Targets = "qkv"
    strict: bool = False
    seed: int = 0
    base: Base = "inductor"
    exact_ratio: Fraction = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        hint = "It is b / k, tokens per generator: 256 keeps one row of the input in 256."
        ratio = _number("ratio", self.ratio, "a finite number of at least 1", hint)
        if not 1 <= ratio < math.inf:
            raise _reject("ratio", self.ratio, "a finite number of at least 1", hint)
        # repr gives the decimal the user wrote: 1.1 means 11/10, not its binary neighbour.
        object.__setattr__(self, "ratio", int(ratio) if ratio.is_integer() else ratio)
        object.__setattr__(self, "exact_ratio", Fraction(repr(ratio)))
        self._check_epsilon()
        self._check_choice("sampling", self.sampling, get_args(Sampling))
        self._check_choice("base", self.base, get_args(Base))
        if not isinstance(self.targets, re.Pattern):
            self._check_choice(
                "targets", self.targets, ("qkv", "linear"), "or a compiled regular expression"
            )
        for name in ("min_generators", "min_tokens"):
            hint = "1 sets no lower bound."
            object.__setattr__(self, name, _integer(name, getattr(self, name), 1, hint))
        hint = "Another seed draws other generators from the same activations."
        object.__setattr__(self, "seed", _integer("seed", self.seed, 0, hint, _SEED_LIMIT - 1))
        strict: object = self.strict
        if not isinstance(strict, bool):
            hint = "True raises when a training graph has no compressed site."
            raise _reject("strict", strict, "True or False", hint)

    def _check_epsilon(self) -> None:
        if self.epsilon is None:
            return
        allowed = "None (keep every token) or a number of at least 0"
        hint = "0 keeps only the generators themselves; 1 and above keep every token."
        epsilon = _number("epsilon", self.epsilon, allowed, hint)
        if epsilon < 0:
            raise _reject("epsilon", self.epsilon, allowed, hint)
        # cosine² ≥ 1 − ε² holds for every token once ε ≥ 1, so these are one configuration.
        object.__setattr__(self, "epsilon", epsilon if epsilon < 1 else None)

    @staticmethod
    def _check_choice(name: str, given: object, allowed: tuple[str, ...], more: str = "") -> None:
        if isinstance(given, str) and given in allowed:
            return
        near = difflib.get_close_matches(given, allowed, n=1) if isinstance(given, str) else []
        hint = f"Did you mean {near[0]!r}?" if near else "Choose one of these."
        words = " or ".join(map(repr, allowed)) + (f", {more}" if more else "")
        raise _reject(name, given, words, hint)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the option names that `backend` and `options={"pamm.…": …}` take."""
        return tuple(f.name for f in cls.__dataclass_fields__.values() if f.init)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Options:
        """Build options from a mapping, naming the nearest option for an unknown one.

        Equivalent to: `Options(**given)`.

        Args:
            given: option names and values.

        Returns:
            The validated options.

        Raises:
            InvalidOptionError: an unknown name, or a value that is not allowed.
        """
        allowed = cls.names()
        for name in given:
            if name not in allowed:
                raise unknown_option(name, allowed)
        return cls(**given)


def unknown_option(name: str, allowed: tuple[str, ...] | list[str]) -> InvalidOptionError:
    """Return the error for an option that does not exist, with the nearest that does.

    Args:
        name: what was given.
        allowed: every name that is accepted.

    Returns:
        The error, to be raised.
    """
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    # Inductor alone has hundreds of options; a list of them would hide the hint.
    listing = f" Allowed: {', '.join(allowed)}." if len(allowed) <= 20 else ""
    return InvalidOptionError(f"{name!r} is not an option. {hint}{listing}".strip())
