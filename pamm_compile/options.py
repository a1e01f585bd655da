"""The options of the backend, validated and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pamm_compile import checks
from pamm_compile.checks import unknown_option
from pamm_compile.errors import InvalidOptionError
from pamm_compile.methods.pamm.method import Pamm
from pamm_compile.rules import Rule, Rules, check_target, make_rules

Base = Literal["inductor", "aot_eager"]
Goal = Literal["memory", "speed", "any"]

RECOMMENDED = "linear=gradients"
"""The rules where nobody names any, nor an option of one rule."""
RECOMMENDED_GOAL: Goal = "speed"
"""The goal of these rules; of all others it is "memory"."""

_SEED_LIMIT = 2**31

# Options that make the one rule of backend(ratio=…). Their defaults are those of Pamm.
_ORDER = ("ratio", "epsilon", "sampling", "min_generators", "targets")
ONE_RULE = frozenset(_ORDER)

_OTHER_GOAL: Goal = "memory"
# Of what nobody gave; no finished object holds it.
_ABSENT: Any = None


def without_absent(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without those that are None because nobody gave them."""
    may_be_absent = {*_ORDER, "rules", "goal"}
    return {n: v for n, v in given.items() if v is not None or n not in may_be_absent}


@dataclass(frozen=True)
class Options:
    """What the user chose; `pamm_compile.backend` documents each option.

    Without rules they are the recommended ones, and so is the goal, unless it is given.

    Raises:
        InvalidOptionError: a value is not allowed.
    """

    rules: Rules = _ABSENT
    goal: Goal = _ABSENT
    siblings: bool = False
    min_tokens: int = 256
    strict: bool = False
    seed: int = 0
    base: Base = "inductor"

    def __post_init__(self) -> None:
        recommended = self.rules is _ABSENT
        if self.goal is _ABSENT:
            object.__setattr__(self, "goal", RECOMMENDED_GOAL if recommended else _OTHER_GOAL)
        object.__setattr__(self, "rules", make_rules(RECOMMENDED if recommended else self.rules))
        checks.choice("goal", self.goal, get_args(Goal))
        checks.choice("base", self.base, get_args(Base))
        least = checks.integer("min_tokens", self.min_tokens, 1, "1 sets no lower bound.")
        object.__setattr__(self, "min_tokens", least)
        hint = "Another seed draws other generators from the same activations."
        seed = checks.integer("seed", self.seed, 0, hint, _SEED_LIMIT - 1)
        object.__setattr__(self, "seed", seed)
        hint = "True lets projections that no rule names join those that read the same input."
        checks.flag("siblings", self.siblings, hint)
        hint = "True raises when a training graph has no compressed site."
        checks.flag("strict", self.strict, hint)

    @property
    def fingerprint(self) -> str:
        """Everything that changes what is compiled, as text: for cache keys and for sharing."""
        rest = (self.goal, self.siblings, self.min_tokens, self.strict, self.seed, self.base)
        return "\n".join([*(rule.fingerprint for rule in self.rules), repr(rest)])

    @property
    def selects_by_name(self) -> bool:
        """Whether the names of parameters decide what is compressed."""
        return any(rule.selects_by_name for rule in self.rules)

    @property
    def is_cacheable(self) -> bool:
        """Whether the fingerprint holds all code of the methods, so that caches may be used."""
        return all(rule.is_cacheable for rule in self.rules)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the option names that `backend` and `options={"pamm.…": …}` take."""
        return (*_ORDER, *(field.name for field in fields(cls)))

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Options:
        """Build options from a mapping, naming the nearest option for an unknown one.

        Equivalent to: `Options(rules=…, …)`, with one rule made of `ratio`, `epsilon`, `sampling`,
        `min_generators` and `targets` where any of these is given.

        Args:
            given: option names and values; None, of these, `rules` and `goal`, is not given.

        Returns:
            The validated options.

        Raises:
            InvalidOptionError: an unknown name, a value that is not allowed, or `rules` together
                with `ratio` or another option of one rule.
        """
        allowed = cls.names()
        for name in given:
            if name not in allowed:
                raise unknown_option(name, allowed)
        rest = without_absent(given)
        single = {n: rest.pop(n) for n in _ORDER if n in rest}
        if not single:
            return cls(**rest)
        if "rules" in rest:
            names = ", ".join(single)
            raise InvalidOptionError(
                f"rules and {names} together are not allowed: rules name the method of every "
                f'target. Write for example rules={{"qkv": Pamm(ratio=64)}}, and leave out {names}.'
            )
        target = check_target(single.pop("targets", "qkv"))
        return cls(rules=(Rule(target, Pamm(**single)),), **rest)

    def __str__(self) -> str:
        # Beside rules, which are always shown.
        usual = {each.name: each.default for each in fields(self)} | {"goal": _OTHER_GOAL}
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, default in usual.items()
            if name != "rules" and getattr(self, name) != default
        ]
        return ", ".join([f"rules=[{', '.join(map(str, self.rules))}]", *changed])
