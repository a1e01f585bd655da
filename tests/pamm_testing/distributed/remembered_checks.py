"""What every rank of the test of remembered directions runs, under DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from pamm_compile import Backend, GradientSubspace
from pamm_compile.remembering import TwoGraphs
from pamm_testing.distributed.fsdp_checks import MIXED, shard
from pamm_testing.distributed.tiny import (
    Model,
    Run,
    assert_matched,
    assert_only_matched_differ,
    build,
    mean,
    pamm,
    step,
    tokens,
)

METHOD = GradientSubspace(8, every=3, warmup=1)
STEPS = 5
WHOLE = (0, 3)
"""Of the steps, those whose weight gradients are nearly exact."""

Wrap = Callable[[Model, Any], nn.Module]


def main() -> None:
    """DDP, the compiled model around it and inside of it."""
    # DDPOptimizer splits no graph whose parameters fit the first bucket, a mebibyte else.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    check(_around, _alone)
    check(_inside, _alone)


def sharded() -> None:
    """FSDP2, block by block and the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharding(**options: Any) -> Wrap:
        return lambda model, backend: shard(model, backend, mesh, **options)

    check(sharding(), _block_by_block)
    # FSDP2's hooks break the graph, so that one rank alone has others.
    check(sharding(whole=True), None)
    # In 16 bits, gradients of the other side are rounded at other places.
    check(sharding(policy=MIXED), None)
    check(sharding(policy=MIXED, reshard=False), None)
    check(sharding(policy=MixedPrecisionPolicy(), reshard=False), _block_by_block)


def _around(model: Model, backend: Any) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend=backend)


def _inside(model: Model, backend: Any) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend=backend))


def _alone(model: Model, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def _block_by_block(model: Model, backend: Any) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def _backend() -> Backend:
    return pamm(rules={"linear": METHOD}, goal="any")


@contextmanager
def _watched() -> Iterator[list[bool]]:
    """Yield, of every call of two graphs, whether the one of whole gradients ran."""
    ran: list[bool] = []
    call = TwoGraphs.__call__

    def spy(graphs: TwoGraphs, *args: Any) -> Any:
        out = call(graphs, *args)
        ran.append(graphs._state(args).collects)
        return out

    with mock.patch.object(TwoGraphs, "__call__", spy):
        yield ran


def _steps(model: nn.Module) -> list[tuple[Run, list[bool]]]:
    """Return what this rank's steps give, and which graphs ran in each."""
    done = []
    with _watched() as ran:
        for number in range(STEPS):
            run = step(model, [tokens(100 * dist.get_rank() + number)])
            done.append((run, ran.copy()))
            ran.clear()
    return done


def check(together: Wrap, alone: Wrap | None) -> None:
    """Compare with exact steps, and with the means of what each rank makes of its own batches.

    Args:
        together: compiles a model and lets ranks share its gradients.
        alone: compiles the same graphs for one rank; None compares with exact steps only.
    """
    torch._dynamo.reset()
    exact = _steps(together(build(), "aot_eager"))
    torch._dynamo.reset()
    backend = _backend()
    ours = _steps(together(build(), backend))
    matched = {
        name
        for name, grad in exact[0][0].full.items()
        if not torch.equal(grad, ours[0][0].full[name])
    }
    remembered = [site for site in backend.report.compressed if site.remembered]
    assert {name.rpartition(".")[0] for name in matched} >= {
        f"layers.{i}.{part}" for i in range(2) for part in ("attention.wq", "feed_forward.w1")
    }
    assert remembered
    for number, ((run, ran), (wanted, none)) in enumerate(zip(ours, exact, strict=True)):
        assert not none
        assert set(ran) == {number in WHOLE}, (number, ran)
        _assert_all_ranks_have(ran)
        _assert_all_ranks_have([grad.double().sum().item() for grad in run.full.values()])
        assert_only_matched_differ(wanted, run, matched)
        errors = {name: _error(run, wanted, name) for name in matched}
        if number in WHOLE:
            assert max(errors.values()) < 0.03, (number, errors)
        else:
            assert max(errors.values()) > 0.1, (number, errors)
    if alone is None:
        return
    torch._dynamo.reset()
    for (own, own_ran), (run, ran) in zip(_steps(alone(build(), _backend())), ours, strict=True):
        assert set(own_ran) == set(ran)
        assert_matched(run, mean(own.full), 1e-4)


def _error(run: Run, wanted: Run, name: str) -> float:
    difference = run.full[name].double() - wanted.full[name].double()
    return float(difference.norm() / wanted.full[name].double().norm())


def _assert_all_ranks_have(mine: list[Any]) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    assert all(each == mine for each in every), every
