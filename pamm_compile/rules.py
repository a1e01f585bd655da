"""Rules: which method for which target, as objects and as text.

    {"qkv": Pamm(ratio=256), "mlp": Pamm(ratio=64)}
    "qkv=pamm:256, mlp=pamm:64:min_generators=32, /lm_head/=exact"

For each projection, the first rule whose target holds it decides.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pamm_compile import checks
from pamm_compile.errors import InvalidOptionError
from pamm_compile.methods import METHODS
from pamm_compile.methods.base import Method
from pamm_compile.methods.identity import identity
from pamm_compile.targets import TARGETS

Target = str | re.Pattern[str]
Rules = tuple["Rule", ...]

_EXACT = "exact"
_LINE = 400
"""Longer text is not shown again below its error."""


@dataclass(frozen=True)
class Rule:
    """A target, and the method for its projections; None leaves them exact."""

    target: Target
    method: Method | None

    @property
    def selects_by_name(self) -> bool:
        """Whether the names of parameters decide."""
        return isinstance(self.target, re.Pattern)

    @property
    def fingerprint(self) -> str:
        """Everything that changes what the rule does."""
        method = _EXACT if self.method is None else identity(self.method).text
        if isinstance(self.target, re.Pattern):
            # repr() of a pattern ends after 200 characters.
            return f"/{self.target.pattern!r}/{self.target.flags} {method}"
        return f"{self.target} {method}"

    @property
    def is_cacheable(self) -> bool:
        """Whether the fingerprint holds all of the method's code."""
        return self.method is None or identity(self.method).is_known

    def __str__(self) -> str:
        target = self.target if isinstance(self.target, str) else f"/{self.target.pattern}/"
        return f"{target}={_EXACT if self.method is None else self.method}"


def make_rules(given: object) -> Rules:
    """Read rules from a mapping, from text, or from rules that are read already.

    Args:
        given: {target: method}, where a target is a name in `targets.TARGETS` or a compiled regular
            expression over parameter names, and a method has the protocol of
            `pamm_compile.methods.base.Method`, or is None for exact; or the same as text.

    Returns:
        The rules in order.

    Raises:
        InvalidOptionError: a part is wrong; the message names it.
    """
    if isinstance(given, str):
        return parse_rules(given)
    if isinstance(given, tuple) and given and all(isinstance(each, Rule) for each in given):
        return _each_once(given)
    if not isinstance(given, Mapping) or not given:
        raise InvalidOptionError(
            f"rules={given!r} is not allowed: rules must be a non-empty mapping of targets to "
            'methods, or text. For example {"qkv": Pamm(ratio=256)} or "qkv=pamm:256".'
        )
    return tuple(Rule(check_target(target), _method(m)) for target, m in given.items())


def check_target(target: object) -> Target:
    """Return a target, or raise if it is none."""
    if isinstance(target, re.Pattern):
        if not isinstance(target.pattern, str):
            raise checks.refusal("targets", target, "a pattern of text", "Parameter names are str.")
        return target
    more = "or a compiled regular expression over parameter names"
    checks.choice("targets", target, tuple(TARGETS), more)
    return str(target)


def _method(given: object) -> Method | None:
    if given is None or (isinstance(given, Method) and not isinstance(given, type)):
        return given
    called = f" Did you mean {given.__name__}()?" if isinstance(given, type) else ""
    raise InvalidOptionError(
        f"{given!r} is not a method: rules need an object with store, weight_gradients, "
        "stored_bytes, cost, describe and fingerprint, such as pamm_compile.Pamm(ratio=256), or "
        f"None for exact.{called}"
    )


def parse_rules(text: str) -> Rules:
    """Read rules from text: "TARGET=METHOD[:VALUE][:NAME=VALUE]…", separated by commas.

    Args:
        text: a target is a name in `targets.TARGETS`, or a regular expression between slashes; a
            method is a name in `pamm_compile.methods.METHODS`, or "exact".

    Returns:
        The rules in order.

    Raises:
        InvalidOptionError: a part is wrong; the message points at it.
    """
    rules = []
    for start, part in _parts(text):
        try:
            rules.append(_parse_rule(part))
        except InvalidOptionError as error:
            if len(text) > _LINE:
                raise
            pointer = " " * start + "^" * max(1, len(part))
            raise InvalidOptionError(f"{error}\n  {text}\n  {pointer}") from None
    if not rules:
        raise InvalidOptionError('rules="" is not allowed: write for example "qkv=pamm:256".')
    return _each_once(rules)


def _each_once(rules: Sequence[Rule]) -> Rules:
    targets: set[Target] = set()
    for rule in rules:
        if rule.target in targets:
            named = rule.target if isinstance(rule.target, str) else f"/{rule.target.pattern}/"
            raise InvalidOptionError(
                f"{checks.shown(named)} has two rules: the first decides, so leave the other out."
            )
        targets.add(rule.target)
    return tuple(rules)


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Yield what commas separate, those within slashes set aside, and where each begins."""
    begin, quoted, escaped = 0, False, False
    for place, letter in enumerate(f"{text},"):
        if letter == "/" and not escaped:
            quoted = not quoted
        # A backslash that is escaped itself escapes nothing.
        escaped = letter == "\\" and not escaped
        if letter == "," and (not quoted or place == len(text)):
            part = text[begin:place]
            if part.strip():
                yield begin + len(part) - len(part.lstrip()), part.strip()
            begin = place + 1


def _parse_rule(part: str) -> Rule:
    # The pattern may itself hold "=".
    pattern, name = r"/(?P<pattern>(?:[^/\\]|\\.)*)/", r"(?P<name>[^/=]*)"
    match = re.fullmatch(rf"({pattern}|{name})\s*=\s*(?P<how>.*)", part)
    if match is None:
        raise InvalidOptionError(
            f"{checks.shown(part)} is not a rule: write TARGET=METHOD, such as qkv=pamm:256 or "
            "/lm_head/=exact, with patterns between slashes."
        )
    if match["pattern"] is not None:
        target: Target = _pattern(match["pattern"])
    else:
        target = check_target(match["name"].strip())
    return Rule(target, _parse_method(match["how"].strip()))


def _pattern(text: str) -> re.Pattern[str]:
    if not text:
        raise InvalidOptionError("// is no pattern: an empty one would match every name.")
    return checks.pattern("target", text, "Write one that parameter names are searched for.")


def _parse_method(text: str) -> Method | None:
    name, *values = (value.strip() for value in text.split(":"))
    if name == _EXACT:
        if values:
            given = checks.shortened(text)
            raise InvalidOptionError(f"{given} is not allowed: {_EXACT} takes no options.")
        return None
    if name not in METHODS:
        allowed = (*METHODS, _EXACT)
        near = checks.nearest(name, allowed)
        hint = f"Did you mean {near!r}? " if near else ""
        raise InvalidOptionError(
            f"{checks.shown(name)} is not a method. {hint}Allowed: {', '.join(allowed)}; "
            "pamm_compile.methods.register_method adds to these."
        )
    positional = [_value(v) for v in values if "=" not in v]
    named: dict[str, object] = {}
    for option, _, value in (v.partition("=") for v in values if "=" in v):
        if option.strip() in named:
            raise InvalidOptionError(f"{option.strip()} is given twice: leave one of them out.")
        named[option.strip()] = _value(value)
    _check_options(METHODS[name], named)
    try:
        return METHODS[name](*positional, **named)
    except TypeError as error:
        raise InvalidOptionError(f"{checks.shown(text)}: {error}.") from None


def _check_options(make: Callable[..., Method], named: Iterable[str]) -> None:
    parameters = inspect.signature(make).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    allowed = tuple(each.name for each in parameters)
    for option in named:
        if option not in allowed:
            raise checks.unknown_option(option, allowed)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        # Whatever it is, the option's own check refuses it by what it says.
        return text.strip()
