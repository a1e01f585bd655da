"""docs/extending.md names the places that its tests touch, and no more than two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pamm_compile

PACKAGE = Path(pamm_compile.__file__).parent
CHECKOUT = Path(__file__).parents[1]
TABLE = re.findall(
    r"^\| (?!add |---)(.*?) \| (.*) \| `(.*?)` \|$",
    (CHECKOUT / "docs" / "extending.md").read_text(),
    re.M,
)
THROUGH = {
    "an attention operator": "register_attention(",
    "a method": "register_method(",
    "a named target": "patch.dict(TARGETS",
    "a pass": "passes=[",
    "a reason to decline": "Reason",
    "a device to the model of times": "(DEVICES,",
}
"""By addition, the place that its test adds through."""


@pytest.mark.parametrize(("what", "touched", "test"), TABLE, ids=[row[0] for row in TABLE])
def test_an_addition_touches_two_files_at_most_and_has_a_test(
    what: str, touched: str, test: str
) -> None:
    files = re.findall(r"`([\w/]+\.py)`", touched)
    assert len(files) <= 2
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
    assert THROUGH[what] in (CHECKOUT / test).read_text()


def test_no_addition_is_forgotten() -> None:
    assert [row[0] for row in TABLE] == list(THROUGH)
