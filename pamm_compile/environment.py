"""Options from environment variables, for launchers that pass on a backend's name and no more."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from pamm_compile import checks
from pamm_compile.checks import unknown_option
from pamm_compile.errors import InvalidOptionError
from pamm_compile.graph.pipeline import DISABLE
from pamm_compile.options import Options
from pamm_compile.targets import TARGETS

PREFIX = "PAMM_COMPILE_"


def environment_variables() -> dict[str, str]:
    """Return the option that each environment variable stands for, by the variable's name."""
    return {PREFIX + name.upper(): name for name in Options.names()}


def options_from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the options that are set in the environment.

    Equivalent to `{"ratio": 64}` where PAMM_COMPILE_RATIO=64 is set, and so on for every option.
    Only `backend="pamm"` reads them; `backend()` does not.

    Args:
        environment: variables and their values.

    Returns:
        Option names and valid values; what is not set is left out.

    Raises:
        InvalidOptionError: a value is not allowed, or no option has a variable's name.
    """
    variables = environment_variables()
    found: dict[str, Any] = {}
    for variable in sorted(n for n in environment if n.startswith(PREFIX) and n != DISABLE):
        if variable not in variables:
            raise unknown_option(variable, tuple(variables))
        name, text = variables[variable], environment[variable]
        try:
            value = _PARSERS.get(name, _number)(text)
            # Checked one by one: the error of a whole would not name the variable to blame.
            Options.from_mapping({name: value})
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{variable}={checks.shortened(text)}: {error}") from None
        found[name] = value
    return found


def _number(text: str) -> int | float | str:
    """Read a number; other text stays, for the option's own check to accept or to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _flag(text: str) -> bool | str:
    return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)


def _targets(text: str) -> re.Pattern[str] | str:
    # An empty expression matches every name, which nobody means by an empty variable.
    if text in (*TARGETS, ""):
        return text
    named = " or ".join(map(repr, TARGETS))
    hint = f"Write {named}, or a regular expression that parameter names are searched for."
    return checks.pattern("targets", text, hint)


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "strict": _flag,
    "siblings": _flag,
    "targets": _targets,
    "rules": str,
}
