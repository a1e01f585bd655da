"""Bytes that a model of full size saves, read off the partitions of fake tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import pamm_compile
from examples.benchmarks.arms import ARMS, REFERENCE, Arm, variant
from examples.benchmarks.models import Case, make_model, precision
from pamm_compile.inspect.measure import saved_storages
from pamm_compile.options import Targets

TARGETS: dict[str, Targets] = {
    "Q, K, V": "qkv",
    "gate, up": re.compile(r"\b(gate|up)_proj\b"),
    "gate, up, down": re.compile(r"\b(gate|up|down)_proj\b"),
    "Q, K, V, gate, up": re.compile(r"\b(q|k|v|gate|up)_proj\b"),
    "Q, K, V, gate, up, down": re.compile(r"\b(q|k|v|gate|up|down)_proj\b"),
}


@contextmanager
def fake_model(case: Case) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yield a model and a batch without memory, within which everything is fake."""
    # Checkpointing saves the state of the real random-number generator.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(case)
        ids = torch.zeros(case.batch, case.shape.sequence, dtype=torch.long, device=case.device)
        with precision(case):
            yield model, {"input_ids": ids, "labels": ids.clone()}


def predict(
    arm: Arm, case: Case, model: nn.Module, batch: dict[str, Tensor]
) -> pamm_compile.Prediction:
    """Return what one arm saves of a fake model."""
    model = variant(arm, model)
    if not arm.compiled:
        saved = saved_storages(lambda: model(**batch).loss, model=model)
        return pamm_compile.Prediction(saved, pamm_compile.Report())
    using = backend(case, case.ratio) if arm.pamm else None
    with arm.settings():
        return pamm_compile.predict_saved(model, using=using, **batch)


def backend(case: Case, ratio: float) -> pamm_compile.Backend:
    """Return the backend of a ratio."""
    return pamm_compile.backend(ratio=ratio, min_tokens=case.min_tokens)


def frontier(case: Case, chosen: Sequence[Arm] = ARMS) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield, arm by arm, the bytes saved, and those of them that have the vocabulary as a size."""
    with fake_model(case) as (model, batch):
        for arm in chosen:
            found = predict(arm, case, model, batch)
            head = [each for each in found.saved if case.shape.vocabulary in each.shape]
            yield (
                arm.name,
                {
                    "saved_bytes": found.saved_bytes,
                    "head_bytes": sum(each.bytes for each in head),
                    "compressed_sites": len(found.report.compressed),
                },
            )


def qkv(case: Case, ratios: Sequence[float]) -> dict[str, Any]:
    """Return the bytes that the inputs of Q, K and V take, exactly and at each ratio.

    Everything is counted twice: by the report, and by the blocks that the partition saves. The two
    must agree.
    """
    size = torch.bfloat16.itemsize if case.dtype != "float32" else torch.float32.itemsize
    with fake_model(case) as (model, batch):
        exact = predict(next(arm for arm in ARMS if arm.name == REFERENCE), case, model, batch)
        rows = {}
        for ratio in ratios:
            found = pamm_compile.predict_saved(model, using=backend(case, ratio), **batch)
            report, sites = found.report, len(found.report.compressed)
            k = math.ceil(case.tokens / ratio)
            blocks = Counter(each.bytes for each in found.saved)
            blocks.subtract(Counter(each.bytes for each in exact.saved))
            rows[f"{ratio:g}"] = {
                "generators": k,
                "generator_bytes": sites * k * case.shape.width * size,
                "index_and_scale_bytes": report.bytes_after - sites * k * case.shape.width * size,
                "all_bytes": report.bytes_after,
                "exact_bytes": report.bytes_before,
                "partition_difference_bytes": exact.saved_bytes - found.saved_bytes,
                "partition_blocks": {str(n): count for n, count in blocks.items() if count},
                "compressed_sites": sites,
            }
            expected = report.bytes_before - report.bytes_after
            if exact.saved_bytes - found.saved_bytes != expected:
                raise SystemExit(
                    f"{case.cuts()}: the report says that ratio {ratio:g} saves {expected:,} bytes "
                    f"less, the partition says {exact.saved_bytes - found.saved_bytes:,}."
                )
    return rows


def targets(case: Case, budgets: Sequence[float]) -> dict[str, Any]:
    """Return what PAMM saves on each choice of projections: bytes by budget, and FLOPs."""
    rows: dict[str, Any] = {}
    with fake_model(case) as (model, batch):
        backends = {
            name: pamm_compile.backend(ratio=case.ratio, min_tokens=case.min_tokens, targets=chosen)
            for name, chosen in TARGETS.items()
        }
        for name, using in {REFERENCE: None, **backends}.items():
            row = rows[name] = {"saved_bytes": {}}
            for budget in budgets:
                with Arm("", budget=budget).settings():
                    found = pamm_compile.predict_saved(model, using=using, **batch)
                row["saved_bytes"][f"{budget:g}"] = found.saved_bytes
            row["compressed_sites"] = len(found.report.compressed)
            row["weight_flops"] = weight_flops(case, model)
            row["saved_flops"] = sum(saved_flops(site, model) for site in found.report.compressed)
    return rows


def weight_flops(case: Case, model: nn.Module) -> int:
    """Return the FLOPs of all matmuls with weights in a step: one forward, two backward."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(3 * 2 * case.tokens * each.in_features * each.out_features for each in linear)


def saved_flops(site: pamm_compile.SiteReport, model: nn.Module) -> int:
    """Return the FLOPs of a site's weight gradients, less those that PAMM takes in their place."""
    (b, n), k = site.shape, site.generators
    m = sum(model.get_parameter(name).shape[0] for name in site.parameters)
    exact = 2 * b * n * m
    # Cosines of all tokens with all generators; scaled sums of rows of dZ; their product with C.
    return exact - (2 * b * k * n + 2 * b * m + 2 * k * m * n)
