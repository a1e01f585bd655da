"""What every rank of the tests of tensor, sequence and two-dimensional parallelism runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.experimental import implicit_replication

from pamm_compile.methods.base import Method
from pamm_compile.methods.sampling import content_seed
from pamm_testing.distributed.fsdp_checks import MIXED, SITE, shard
from pamm_testing.distributed.tiny import (
    BATCH,
    LAYERS,
    LENGTH,
    MATCHED,
    RATIO,
    SUBSPACE,
    WIDTH,
    Model,
    assert_matched,
    assert_only_matched_differ,
    assert_ranks_agree,
    backend_with,
    build,
    expected,
    gathered,
    mean,
    pamm,
    parallelize,
    step,
    tokens,
    watching,
)
from pamm_testing.graphs import Captured, capturing_backend, memory_budget, operators
from pamm_testing.options import make_options


def tensor_parallel() -> None:
    _check_all(sequence=False)


def sequence_parallel() -> None:
    _check_all(sequence=True)
    check_graphs(init_device_mesh("cpu", (dist.get_world_size(),)))


def _check_all(*, sequence: bool) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check(mesh, sequence=sequence, whole=False)
    check(mesh, sequence=sequence, whole=True)
    check(mesh, sequence=sequence, whole=True, method=SUBSPACE)
    check_ranks_agree_after_clipped_steps(mesh, sequence=sequence)


def _wrap(model: Model, backend: Any, mesh: DeviceMesh, *, sequence: bool, whole: bool) -> Model:
    parallelize(model, mesh, sequence=sequence)
    for each in [model] if whole else model.layers:
        if backend is not None:
            each.compile(backend=backend, fullgraph=True)
    return model


def check(mesh: DeviceMesh, *, sequence: bool, whole: bool, method: Method | None = None) -> None:
    torch._dynamo.reset()
    batch = [tokens(1)]
    options = {"sequence": sequence, "whole": whole}
    reference = _wrap(build(), None, mesh, **options)
    with watching(reference) as seen:
        step(reference, batch)
    _assert_same_seed(seen["layers.1.attention.wq.weight"].x)
    backend = backend_with(method)
    exact = step(_wrap(build(), "aot_eager", mesh, **options), batch)
    ours = step(_wrap(build(), backend, mesh, **options), batch)
    prefixes = [f"layers.{i}." for i in range(LAYERS)] if whole else [""]
    found = [site.parameters for site in backend.report.compressed]
    assert found == [tuple(prefix + name for name in SITE) for prefix in prefixes]
    assert all(site.shape == (BATCH * LENGTH, WIDTH) for site in backend.report.compressed)
    assert_only_matched_differ(exact, ours, MATCHED)
    assert_matched(ours, gathered(expected(seen, one_graph=whole, method=method)))


def _assert_same_seed(x: torch.Tensor) -> None:
    """Check that all ranks hold the same X, so that they draw the same generators."""
    seeds = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(seeds, content_seed(x, 0))
    assert len({int(seed) for seed in seeds}) == 1


def check_ranks_agree_after_clipped_steps(mesh: DeviceMesh, *, sequence: bool) -> None:
    torch._dynamo.reset()
    ours = _wrap(build(), pamm(), mesh, sequence=sequence, whole=False)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, foreach=False)
    for seed in range(2):
        step(ours, [tokens(seed)])
        # Without sequence parallelism norms are no DTensors, and clipping multiplies by one.
        with implicit_replication():
            nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        optimizer.step()
    assert_ranks_agree(ours)


# ---------------------------------------------------------------------------------------------
# What is saved, and what is gathered again
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Of one compiled block, on one rank."""

    saved_bytes: int
    """Parameters included, which exist with or without a backward pass."""
    gathers: tuple[int, int]
    """All-gathers in the forward and in the backward graph."""
    collectives: int
    """In the joint graph."""


def count(mesh: DeviceMesh, *, apply: bool, budget: float) -> Counts:
    torch._dynamo.reset()
    captured = Captured()
    options = make_options(ratio=RATIO, min_tokens=1)
    backend = capturing_backend(captured, options, decompose=True, apply=apply)
    model = _wrap(build(), backend, mesh, sequence=True, whole=False)
    # A block's graph has the mesh among its inputs, and torch refuses to weigh it otherwise.
    unweighed = {"unsafe_treat_script_objects_as_zero_size": True}
    known = {k: v for k, v in unweighed.items() if hasattr(functorch_config, k)}
    with memory_budget(budget), functorch_config.patch(known):
        step(model, [tokens(1)])
    gathers = [
        sum("all_gather_into_tensor" in name for name in operators(graph))
        for graph in (captured.forward, captured.backward)
    ]
    collectives = sum("_c10d_functional" in name for name in operators(captured.joint))
    return Counts(captured.saved_bytes(), tuple(gathers), collectives)


def check_graphs(mesh: DeviceMesh) -> None:
    rows = BATCH * LENGTH
    saving = rows * WIDTH * 4 - (rows // RATIO * WIDTH * 4 + rows * (1 + 4))
    for budget in (1.0, 0.99):
        exact, ours = (count(mesh, apply=apply, budget=budget) for apply in (False, True))
        assert ours.collectives == exact.collectives, "none is inserted, so that none is waited for"
        # The partitioner recomputes no collective, and keeps the gathered X at any budget.
        assert exact.gathers == ours.gathers == (2, 2)
        assert exact.saved_bytes - ours.saved_bytes == saving


def main_2d() -> None:
    """Run with four ranks, two by two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    check_2d(mesh, sequence=False, policy=None)
    check_2d(mesh, sequence=True, policy=MIXED)


def check_2d(mesh: DeviceMesh, *, sequence: bool, policy: MixedPrecisionPolicy | None) -> None:
    torch._dynamo.reset()

    def wrap(backend: Any) -> Model:
        model = build()
        parallelize(model, mesh["tp"], sequence=sequence)
        return shard(model, backend, mesh["dp"], policy=policy)

    batch = [tokens(100 * mesh["dp"].get_local_rank())]
    reference = wrap(None)
    with watching(reference) as seen:
        step(reference, batch)
    backend = pamm()
    exact, ours = step(wrap("aot_eager"), batch), step(wrap(backend), batch)
    assert [site.parameters for site in backend.report.compressed] == [SITE]
    assert_only_matched_differ(exact, ours, MATCHED)
    wanted = mean(expected(seen, one_graph=False), mesh["dp"].get_group())
    tolerance = 1e-5 if policy is None else 1e-2
    assert_matched(ours, gathered(wanted, mesh["tp"].get_group()), tolerance)
