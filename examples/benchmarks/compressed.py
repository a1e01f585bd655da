"""What an arm compresses, and whether that is what it is named after."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pamm_compile
from examples.benchmarks import full_size
from examples.benchmarks.arms import Arm, backend_of, variant
from examples.benchmarks.models import Case

WRONG = "not compressed as named: "
"""What `wrong` begins with."""
_LAYER = re.compile(r"\.(\d+)\.")


def by_projection(report: pamm_compile.Report) -> dict[str, set[int]]:
    """Return the layers in which the input of a projection is compressed, by its name.

    Args:
        report: of a LLaMA. What is outside of the layers, as "lm_head", is in layer 0.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for site in report.compressed:
        for parameter in site.parameters:
            layer = _LAYER.search(parameter)
            found[parameter.split(".")[-2]].add(int(layer[1]) if layer else 0)
    return dict(found)


def wrong(arm: Arm, case: Case, report: pamm_compile.Report) -> str:
    """Return a sentence if an arm does not compress what it is named after, and else nothing.

    Args:
        arm: any; of an exact one nothing is asked.
        case: the model.
        report: of what was compiled.
    """
    if not arm.approximates:
        return ""
    if not report.compressed:
        return f"{WRONG}{arm.name}, nothing\n{report}"
    if not arm.compresses:
        return ""
    found, layers = by_projection(report), set(range(case.shape.layers))
    missing = sorted(name for name in arm.compresses if found.get(name) != layers)
    further = sorted(found.keys() - arm.compresses - arm.may_compress)
    if not (missing or further):
        return ""
    parts = [
        f"{word} {', '.join(names)}"
        for word, names in (("without", missing), ("with", further))
        if names
    ]
    return f"{WRONG}{arm.name}, {' and '.join(parts)}\n{report}"


def predicted(case: Case, chosen: Sequence[Arm], device: str) -> Iterator[tuple[Arm, str, str]]:
    """Yield what arms would compress on a device that need not be there, and what is wrong of it.

    Args:
        case: the model; on the CPU, without memory.
        chosen: arms.
        device: as in `pamm_compile.devices.DEVICES`.

    Yields:
        The arm, the projections whose inputs it compresses, and what `wrong` says.
    """
    case = replace(case, device="cpu")
    for arm in chosen:
        if not arm.approximates:
            continue
        with full_size.fake_model(case) as (model, batch):
            report = pamm_compile.explain(
                variant(arm, model), using=backend_of(arm, case), device=device, **batch
            )
        yield arm, ", ".join(by_projection(report)), wrong(arm, case, report)
