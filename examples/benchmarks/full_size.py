"""Bytes that a model of full size saves, read off the partitions of fake tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import pamm_compile
from examples.benchmarks.arms import ARMS, REFERENCE, WHOLE, Arm, backend_of, by_name, variant
from examples.benchmarks.models import Case, make_model, precision
from pamm_compile.inspect.measure import saved_storages
from pamm_compile.rules import parse_rules
from pamm_compile.size import Size, exact_cost

RULES = {
    "PAMM on Q, K, V": "qkv=pamm:{ratio:g}",
    "PAMM on gate, up": r"/\b(gate|up)_proj\b/=pamm:{ratio:g}",
    "PAMM on gate, up, down": r"/\b(gate|up|down)_proj\b/=pamm:{ratio:g}",
    "PAMM on Q, K, V, gate, up": r"/\b(q|k|v|gate|up)_proj\b/=pamm:{ratio:g}",
    "PAMM on Q, K, V, gate, up, down": r"/\b(q|k|v|gate|up|down)_proj\b/=pamm:{ratio:g}",
    "whole model": WHOLE,
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
    using = backend_of(arm, case) if arm.approximates else "exact"
    with arm.settings():
        return pamm_compile.predict_saved(model, using=using, **batch)


def frontier(case: Case, chosen: Sequence[Arm] = ARMS) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield, arm by arm, the bytes saved, and of what: logits, and inputs that are compressed."""
    with fake_model(case) as (model, batch):
        for arm in chosen:
            found = predict(arm, case, model, batch)
            head = [each for each in found.saved if case.shape.vocabulary in each.shape]
            compressed = found.report.compressed
            yield (
                arm.name,
                {
                    "saved_bytes": found.saved_bytes,
                    "head_bytes": sum(each.bytes for each in head),
                    "compressed_sites": len(compressed),
                    "inputs_bytes_before": sum(site.bytes_before for site in compressed),
                    "inputs_bytes_after": sum(site.bytes_after for site in compressed),
                },
            )


def qkv(case: Case, ratios: Sequence[float]) -> dict[str, Any]:
    """Return the bytes that the inputs of Q, K and V take, exactly and at each ratio.

    Everything is counted twice: by the report, and by the blocks that the partition saves. The two
    must agree.
    """
    size = torch.bfloat16.itemsize if case.dtype != "float32" else torch.float32.itemsize
    with fake_model(case) as (model, batch):
        exact = predict(by_name(REFERENCE), case, model, batch)
        rows = {}
        for ratio in ratios:
            found = pamm_compile.predict_saved(
                model, using=backend_of(by_name("PAMM"), replace(case, ratio=ratio)), **batch
            )
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
    """Return what each of RULES saves: bytes by budget, and FLOPs."""
    rows: dict[str, Any] = {}
    with fake_model(case) as (model, batch):
        for name, rules in {REFERENCE: "", **RULES}.items():
            row = rows[name] = {"saved_bytes": {}}
            for budget in budgets:
                found = predict(Arm(name, rules=rules, budget=budget), case, model, batch)
                row["saved_bytes"][f"{budget:g}"] = found.saved_bytes
            row["compressed_sites"] = len(found.report.compressed)
            row["weight_flops"] = weight_flops(case, model)
            row["saved_flops"] = sum(
                saved_flops(site, model, rules.format(ratio=case.ratio))
                for site in found.report.compressed
            )
    return rows


def weight_flops(case: Case, model: nn.Module) -> int:
    """Return the FLOPs of all matmuls with weights in a step: one forward, two backward."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(3 * 2 * case.tokens * each.in_features * each.out_features for each in linear)


def saved_flops(site: pamm_compile.SiteReport, model: nn.Module, rules: str) -> int:
    """Return the FLOPs of a site's weight gradients, less those that take their place."""
    (rule,) = parse_rules(rules)
    assert rule.method is not None
    outputs = tuple(model.get_parameter(name).shape[0] for name in site.parameters)
    size = Size(*site.shape, outputs, getattr(torch, site.dtype))
    return exact_cost(size).flops - rule.method.cost(size).flops
