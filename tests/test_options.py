"""Options: what is refused, and how the refusal reads."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import pytest
from pamm_testing.options import make_options

import pamm_compile
from pamm_compile import Pamm


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0}, r"ratio=0 is not allowed: ratio must be a finite number of at least 1"),
        ({"ratio": -4}, r"ratio=-4 is not allowed"),
        ({"ratio": 0.5}, r"ratio=0\.5 is not allowed"),
        ({"ratio": math.nan}, r"ratio=nan is not allowed"),
        ({"ratio": math.inf}, r"ratio=inf is not allowed"),
        ({"ratio": "256"}, r"ratio='256' is not allowed"),
        ({"ratio": True}, r"ratio=True is not allowed"),
        ({"epsilon": -0.1}, r"epsilon=-0\.1 is not allowed: epsilon must be None"),
        ({"epsilon": math.nan}, r"epsilon=nan is not allowed"),
        ({"epsilon": "0"}, r"epsilon='0' is not allowed"),
        ({"epsilon": False}, r"epsilon=False is not allowed"),
        ({"sampling": "stratifed"}, r"'stratified' or 'uniform'.*Did you mean 'stratified'\?"),
        ({"sampling": 3}, r"sampling=3 is not allowed"),
        ({"base": "eager"}, r"base='eager' is not allowed.*'aot_eager'"),
        (
            {"targets": "mpl"},
            r"targets='mpl' is not allowed.*'qkv' or .*'linear'.*regular.*mean 'mlp'",
        ),
        ({"min_generators": 0}, r"min_generators=0 is not allowed: .* at least 1"),
        ({"min_generators": 2.5}, r"min_generators=2\.5 is not allowed"),
        ({"min_tokens": True}, r"min_tokens=True is not allowed"),
        ({"seed": -1}, r"seed=-1 is not allowed"),
        ({"seed": 2**31}, r"seed=2147483648 is not allowed: .* at most 2147483647"),
        ({"strict": 1}, r"strict=1 is not allowed: strict must be True or False"),
        ({"ratoi": 256}, r"'ratoi' is not an option\. Did you mean 'ratio'\?"),
        ({"nonsense": 1}, r"'nonsense' is not an option\..*Allowed: ratio, epsilon"),
        ({"options": {"max_autotun": True}}, r"'max_autotun' is not an option\. Did you mean 'max"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(pamm_compile.InvalidOptionError, match=message) as error:
        pamm_compile.backend(**given)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, pamm_compile.PammError)


def test_ratio_means_the_decimal_that_was_written() -> None:
    assert Pamm(ratio=1.1).exact_ratio == Fraction(11, 10)
    assert Pamm(ratio=256).exact_ratio == 256
    assert Pamm(ratio=Fraction(1, 1)).exact_ratio == 1


def test_equal_options_are_equal() -> None:
    assert make_options(ratio=256) == make_options(ratio=256.0)
    # From 1 on, the gate lets every token through.
    assert make_options(epsilon=math.inf) == make_options(epsilon=1) == make_options(ratio=256)
    assert make_options(epsilon=0.5) != make_options(ratio=256)


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        make_options().seed = 2  # type: ignore[misc]


def test_a_pattern_selects_by_name() -> None:
    pattern = re.compile(r"mlp")
    assert make_options(targets=pattern).rules[0].target is pattern
