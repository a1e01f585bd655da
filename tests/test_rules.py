"""Rules as objects and as text: what they mean, and how a mistake is pointed at."""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pamm_compile
from pamm_compile import InvalidOptionError, Pamm, Quantized
from pamm_compile.rules import Rule, make_rules, parse_rules
from pamm_compile.targets import TARGETS


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("qkv=pamm:256", [Rule("qkv", Pamm(256))]),
        ("qkv=pamm", [Rule("qkv", Pamm())]),
        (" qkv = pamm : 64 , mlp=exact ,", [Rule("qkv", Pamm(64)), Rule("mlp", None)]),
        ("linear=pamm:1.5:epsilon=0.5", [Rule("linear", Pamm(1.5, epsilon=0.5))]),
        ("qkv=pamm:sampling=uniform", [Rule("qkv", Pamm(sampling="uniform"))]),
        ("qkv=pamm:epsilon=None", [Rule("qkv", Pamm())]),
        ("linear=quantized", [Rule("linear", Quantized(8))]),
        ("linear=quantized:4", [Rule("linear", Quantized(4))]),
        ("linear=quantized:8:float8=False", [Rule("linear", Quantized(float8=False))]),
        ("/a{1,2}=b/=pamm:8", [Rule(re.compile("a{1,2}=b"), Pamm(8))]),
        (r"/a\/b/=exact,qkv=pamm:2", [Rule(re.compile(r"a\/b"), None), Rule("qkv", Pamm(2))]),
    ],
)
def test_what_text_means(text: str, rules: list[Rule]) -> None:
    assert list(parse_rules(text)) == rules
    assert make_rules({rule.target: rule.method for rule in rules}) == tuple(rules)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "message", "pointed_at"),
    [
        ("", "is not allowed", None),
        ("qkv", "is not a rule: write TARGET=METHOD", "qkv"),
        ("qvk=pamm", r"targets='qvk' is not allowed.*mean 'qkv'", "qvk=pamm"),
        ("qkv=pamm:2, mlp=pam:3", r"'pam' is not a method. Did you mean 'pamm'", "mlp=pam:3"),
        ("qkv=pamm:many", "ratio='many' is not allowed", "qkv=pamm:many"),
        ("qkv=pamm:0", "ratio=0 is not allowed", "qkv=pamm:0"),
        ("qkv=pamm:ratoi=3", r"ratoi", "qkv=pamm:ratoi=3"),
        ("qkv=exact:3", "exact takes no options", "qkv=exact:3"),
        ("qkv=pamm:2, qkv=exact", "'qkv' has two rules", None),
        ("/a/=pamm:2, /b/=exact, /a/=exact", "'/a/' has two rules", None),
        ("qkv=subspace:rank=3:rank=64", "rank is given twice", "qkv=subspace:rank=3:rank=64"),
        ("qkv=pamm:2:ratio=3", "multiple values for argument 'ratio'", "qkv=pamm:2:ratio=3"),
        ("qkv=subspace:rnk=3", "Did you mean 'rank'", "qkv=subspace:rnk=3"),
        ("qkv=subspace:" + "9" * 400, "rank=an integer of 1329 bits is not allowed", None),
        ("qkv=subspace:" + "9" * 5000, "rank='9999.* is not allowed", None),
        ("qkv=subspace:" + "-" * 5000 + "1", "rank='---.* is not allowed", None),
        ("qkv=subspace:" + "[" * 5000, "rank='.* is not allowed", None),
        ("qkv=subspace:{[]:1}", "is not an option|rank=", None),
        ("qkv=subspace:1e9999", "rank=inf is not allowed", "qkv=subspace:1e9999"),
        ("qkv=subspace:1e300", f"at most {2**63 - 1}", "qkv=subspace:1e300"),
        ("qkv=subspace:8:candidates=1e308", "at most 1024", None),
        ("qkv=subspace:8:iterations=1000000000", "at most 32", None),
        ("qkv=subspace:8:rows=1e400", "rows=inf is not allowed", None),
        ("qkv=pamm:min_generators=" + "9" * 30, "min_generators=999", None),
        ("qkv=pamm:True", "ratio=True is not allowed", "qkv=pamm:True"),
        ("/a{99999999999}/=exact", "is no regular expression", "/a{99999999999}/=exact"),
        ("/" + "(" * 5000 + ")" * 5000 + "/=exact", "nested too deeply", None),
        ("/(/=pamm", "is no regular expression", "/(/=pamm"),
        ("//=pamm", "empty one would match every name", "//=pamm"),
        ("qkv=pamm, (/=pamm", r"targets='\(|is not a rule", None),
    ],
)
def test_a_mistake_is_pointed_at(text: str, message: str, pointed_at: str | None) -> None:
    with pytest.raises(InvalidOptionError, match=message) as caught:
        parse_rules(text)
    if pointed_at is not None:
        *_, line, pointer = str(caught.value).splitlines()
        begin = pointer.index("^")
        assert line[begin : begin + pointer.count("^")] == pointed_at


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "non-empty mapping"),
        (3, "non-empty mapping"),
        ({"qkv": Pamm}, r"is not a method.*Did you mean Pamm\(\)"),
        ({"qkv": 64}, "64 is not a method"),
        ({"mpl": Pamm()}, "targets='mpl' is not allowed.*'mlp'"),
        ({re.compile(b"q"): Pamm()}, "a pattern of text"),
    ],
)
def test_what_is_refused(rules: Any, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        make_rules(rules)


def test_a_backslash_that_is_escaped_ends_a_pattern_like_any_letter() -> None:
    first, second = parse_rules(r"/a\\/=exact, qkv=pamm:256")
    assert first.target == re.compile(r"a\\")
    assert second.target == "qkv"


_PIECES = st.sampled_from(
    ["qkv", "linear", "/a/", "/(", "=", ":", ",", "pamm", "subspace", "exact", "rank=", "ratio",
     "9" * 400, "1e9999", "nan", "-1", "0.5", "[[", "\\", "\0", " "]
)  # fmt: skip


@given(st.lists(st.one_of(_PIECES, st.text(max_size=3)), max_size=9).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidOptionError), warnings.catch_warnings():
        # Of what a pattern may mean one day.
        warnings.simplefilter("ignore")
        assert parse_rules(text)


_PATTERNS = st.text(alphabet="abc.|[]^$+*,=:é", min_size=1, max_size=12)


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(list(TARGETS)), _PATTERNS.filter(_compiles).map(re.compile)),
            st.one_of(st.none(), st.integers(1, 4096).map(Pamm)),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda pair: pair[0],
    )
)
def test_rules_written_as_text_read_as_they_were(pairs: list[tuple[Any, Pamm | None]]) -> None:
    parts = []
    for target, method in pairs:
        left = target if isinstance(target, str) else f"/{target.pattern}/"
        parts.append(f"{left}={'exact' if method is None else f'pamm:{method.ratio}'}")
    assert list(parse_rules(", ".join(parts))) == [Rule(*pair) for pair in pairs]


def test_long_patterns_with_one_beginning_are_two() -> None:
    """repr() of a compiled pattern ends after 200 characters."""
    first, second = (re.compile("|".join(f"layers.{i}.weight" for i in range(n))) for n in (12, 16))
    assert repr(first)[:200] == repr(second)[:200]
    backends = [pamm_compile.backend(targets=each) for each in (first, second)]
    assert backends[0] != backends[1]
    assert backends[0].options.fingerprint != backends[1].options.fingerprint
    flags = [re.compile("q", flag) for flag in (0, re.IGNORECASE)]
    assert pamm_compile.backend(targets=flags[0]) != pamm_compile.backend(targets=flags[1])


def test_one_rule_and_rules_are_the_same_choice() -> None:
    one = pamm_compile.backend(ratio=64, targets="qkv", min_generators=2)
    assert pamm_compile.backend(rules={"qkv": Pamm(64, min_generators=2)}) == one
    assert pamm_compile.backend(rules="qkv=pamm:64:min_generators=2") == one
    with pytest.raises(InvalidOptionError, match="rules and ratio together are not allowed"):
        pamm_compile.backend(ratio=64, rules="qkv=pamm:64")
