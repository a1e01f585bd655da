"""What the report of an architecture says, against what happened in a step of it."""

from __future__ import annotations

import re
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import pamm_compile
from pamm_compile.report import Report
from pamm_testing.sweep.reads import Reads, compiled_parameters
from pamm_testing.sweep.steps import Architecture, Marked, Step, run

RULES = ("qkv", "linear")

Row = dict[str, Any]


def check(architecture: Architecture) -> Row:
    """Train steps of an architecture and return its row.

    Where the model itself does not train or compile exactly, the row says so: nothing of ours ran.
    """
    start = time.monotonic()
    row: Row = {"name": architecture.name}
    stage = "eager"
    try:
        reads, leaves = _eager(architecture)
        stage = "exact"
        seen: set[str] = set()
        exact = _exact(architecture, seen, leaves=leaves)
        trained = {name for name in reads.found if name in exact.weights}
        row |= {"status": "trained", "weights": len(trained), "outside": _brief(trained - seen)}
        row["parameters"] = len(exact.classes)
        for rules in RULES:
            stage = rules
            row[rules] = _under(architecture, rules, exact, trained & seen, leaves)
    except Exception as error:  # noqa: BLE001 - a row, whatever went wrong
        ours = stage in RULES
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "pamm_compile" in f.filename]
        row |= {
            "status": "crashed" if ours else "skipped",
            "stage": stage,
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "at": f"{where.filename.split('site-packages/')[-1]}:{where.lineno}",
        }
        if ours and own:
            row["own"] = f"{own[-1].filename.split('pamm_compile/')[-1]}:{own[-1].lineno}"
    return row | {"seconds": round(time.monotonic() - start, 1)}


def _eager(architecture: Architecture) -> tuple[Reads, bool]:
    """Return what products read, and whether inputs can have gradients."""
    reads: list[Reads] = []

    def recording(model: torch.nn.Module, inputs: Any) -> Reads:
        reads.append(Reads(model, inputs))
        return reads[-1]

    try:
        run(architecture, around=recording)
    except RuntimeError:
        # Some models write to their inputs, or set themselves what these require.
        run(architecture, around=recording, leaves=False)
        return reads[-1], False
    return reads[-1], True


def _exact(architecture: Architecture, seen: set[str], *, leaves: bool) -> Step:
    inner = torch._dynamo.lookup_backend("aot_eager")
    return run(
        architecture,
        lambda model: torch.compile(model, backend=compiled_parameters(model, inner, seen)),
        leaves=leaves,
    )


def _under(
    architecture: Architecture, rules: str, exact: Step, weights: set[str], leaves: bool
) -> Row:
    backend = pamm_compile.backend(
        rules={rules: Marked()}, goal="any", min_tokens=1, base="aot_eager"
    )
    backend.report.clear()
    ours = run(architecture, lambda model: torch.compile(model, backend=backend), leaves=leaves)

    def again() -> Step:
        return _exact(architecture, set(), leaves=leaves)

    return verdict(exact, ours, backend.report, weights, again)


def verdict(
    exact: Step,
    ours: Step,
    report: Report,
    weights: set[str],
    again: Callable[[], Step] | None = None,
) -> Row:
    """Return what a report says and what it should have said.

    Args:
        exact: the step without us.
        ours: with the marked method.
        report: of the second.
        weights: trained parameters that products of compiled graphs read.
        again: repeats the exact step; what it does not repeat is held against nobody.
    """
    compressed = {name for site in report.compressed for name in site.parameters}
    declined: dict[str, set[str]] = defaultdict(set)
    for site in report.declined:
        declined[str(site.reason)].update(site.parameters)
    listed = compressed.union(*declined.values())
    for note in report.notes:
        listed.update(names_in(note.what))

    changed = _differences(exact.weights, ours.weights)
    told = {
        n for note in report.notes if note.reason == "AMBIGUOUS_NAME" for n in names_in(note.what)
    }
    unlisted = changed - compressed - told
    unchanged = (compressed & exact.weights.keys()) - changed
    silent = weights - listed
    inputs = _differences(exact.inputs, ours.inputs)
    row: Row = {
        "graphs": len(report.graphs),
        "compressed": _brief(compressed),
        "declined": {reason: _brief(names) for reason, names in sorted(declined.items())},
        "notes": sorted({f"{note.reason}: {note.what[:80]}" for note in report.notes}),
    }
    wrong: Row = {
        "unlisted": unlisted,
        "unchanged": unchanged,
        "silent": silent,
        "unknown names": compressed - ours.classes.keys(),
        "inputs": inputs,
        "loss": set() if _same(exact.loss, ours.loss) else {"loss"},
    }
    if (unlisted or inputs or wrong["loss"]) and again is not None:
        other = again()
        wrong["unlisted"] = unlisted - _differences(exact.weights, other.weights)
        wrong["inputs"] = inputs - _differences(exact.inputs, other.inputs)
        if not _same(exact.loss, other.loss):
            wrong["loss"] = set()
            row["reference"] = "does not repeat itself"
    return row | {kind: _brief(names) for kind, names in wrong.items() if names}


def names_in(text: str) -> set[str]:
    """Return the names that a note lists, as "a.weight, layers.{0,1}.b + c"."""
    return {
        name for part in re.split(r"(?:, | \+ )(?![^{]*})", text) for name in _spelled_out(part)
    }


def _spelled_out(name: str) -> list[str]:
    match = re.fullmatch(r"(.*?){(.*?)}(.*)", name)
    if match is None:
        return [name]
    before, choices, behind = match.groups()
    return [before + one + rest for one in choices.split(",") for rest in _spelled_out(behind)]


def _differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    both = one.keys() & other.keys()
    return (one.keys() ^ other.keys()) | {n for n in both if not _same(one[n], other[n])}


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.to_dense(), other.to_dense()
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _brief(names: Iterable[str]) -> list[str]:
    """Return names with the numbers of layers left out, each once, with how many it stands for."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += 1
    return [name if n == 1 else f"{name} ({n})" for name, n in sorted(counts.items())]
