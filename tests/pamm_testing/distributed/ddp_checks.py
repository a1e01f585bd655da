"""What every rank of the DistributedDataParallel test runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pamm_compile
from pamm_testing.distributed.tiny import (
    LAYERS,
    MATCHED,
    Model,
    assert_matched,
    assert_only_matched_differ,
    assert_ranks_agree,
    build,
    expected,
    loss_of,
    mean,
    own_name,
    pamm,
    step,
    tokens,
    watching,
)


def main() -> None:
    # DDPOptimizer splits no graph whose parameters fit the first bucket, a mebibyte else.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    check(_outside, megabytes=25, graphs=2)
    check(_inside, megabytes=25, graphs=2)
    check_bucket_boundary_inside_a_site()
    check_accumulation(_outside)
    check_ranks_agree_after_clipped_steps()
    check_unequal_shapes()
    check_each_rank_decides_by_its_own_time()
    check_join()


def more() -> None:
    """What repeats these in smaller buckets, inside of DDP and in another precision."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    check(_outside, megabytes=0.02, graphs=4)
    check_accumulation(_inside)
    check_autocast()


def _outside(model: nn.Module, backend: Any, megabytes: float) -> nn.Module:
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=megabytes), backend=backend)


def _inside(model: nn.Module, backend: Any, megabytes: float) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend=backend), bucket_cap_mb=megabytes)


def _mine(count: int = 1) -> list[Tensor]:
    """Return batches that no other rank has."""
    return [tokens(100 * dist.get_rank() + i) for i in range(count)]


def _pair(wrap: Any, megabytes: float, **options: Any) -> tuple[Model, Model, Any]:
    """Return the same model compiled without and with PAMM, and our backend."""
    torch._dynamo.reset()
    backend = pamm(**options)
    return wrap(build(), "aot_eager", megabytes), wrap(build(), backend, megabytes), backend


def check(wrap: Any, *, megabytes: float, graphs: int) -> None:
    batches = _mine()
    reference = build()
    with watching(reference) as seen:
        step(reference, batches)
    exact, ours, backend = _pair(wrap, megabytes)
    run = step(ours, batches)
    assert len(backend.report.graphs) == graphs, str(backend.report)
    assert _sites(backend) == _all_sites(), str(backend.report)
    assert_only_matched_differ(step(exact, batches), run, MATCHED)
    # In small buckets every layer is a graph of its own, and samples by its own X.
    one_graph = graphs == 2
    assert_matched(run, mean(expected(seen, one_graph=one_graph)))


def _sites(backend: pamm_compile.Backend) -> set[tuple[str, ...]]:
    return {site.parameters for site in backend.report.compressed}


def _all_sites() -> set[tuple[str, ...]]:
    return {
        tuple(f"layers.{i}.attention.{p}.weight" for p in ("wq", "wk", "wv")) for i in range(LAYERS)
    }


def check_bucket_boundary_inside_a_site() -> None:
    """With a bucket per weight only v's projection is in one graph with the attention."""
    exact, ours, backend = _pair(_outside, 0.001)
    batches = _mine()
    matched = {f"layers.{i}.attention.wv.weight" for i in range(LAYERS)}
    assert_only_matched_differ(step(exact, batches), step(ours, batches), matched)
    assert _sites(backend) == {(name,) for name in matched}
    reasons = {note.reason for graph in backend.report.graphs for note in graph.notes}
    assert reasons == {"NO_ATTENTION", "PROJECTION_IN_ANOTHER_GRAPH"}


def check_accumulation(wrap: Any) -> None:
    """Two micro-batches, the first under no_sync: the mean over ranks of the sum of both."""
    first, second = _mine(2)

    def accumulated(model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        ddp = model if isinstance(model, DistributedDataParallel) else model._orig_mod
        with ddp.no_sync():
            losses = [loss_of(model, first)]
            losses[0].backward()
        losses.append(loss_of(model, second))
        losses[1].backward()
        grads = {name: p.grad for name, p in ddp.module.named_parameters()}
        return losses, {name.replace("_orig_mod.", ""): g for name, g in grads.items()}

    wanted: dict[str, Tensor] = {}
    reference = build()
    for batch in (first, second):
        with watching(reference) as seen:
            step(reference, [batch])
        for name, grad in expected(seen, one_graph=True).items():
            wanted[name] = wanted.get(name, 0) + grad
    exact, ours, _ = _pair(wrap, 25)
    losses, grads = accumulated(exact)
    our_losses, our_grads = accumulated(ours)
    assert all(map(torch.equal, losses, our_losses))
    for name, want in mean(wanted).items():
        error = (our_grads[name] - want).norm() / want.norm()
        assert error < 1e-5, (name, error)
    for name in grads.keys() - MATCHED:
        assert torch.equal(grads[name], our_grads[name]), name


def check_autocast() -> None:
    exact, ours, backend = _pair(_outside, 25)
    batches = _mine()
    with torch.autocast("cpu", torch.bfloat16):
        runs = [step(model, batches) for model in (exact, ours)]
    assert_only_matched_differ(*runs, MATCHED)
    assert {site.dtype for site in backend.report.compressed} == {"bfloat16"}


def check_ranks_agree_after_clipped_steps() -> None:
    _, ours, _ = _pair(_outside, 25)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    for seed in range(3):
        step(ours, [tokens(100 * dist.get_rank() + seed)])
        norm = nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
    assert_ranks_agree(ours)
    start = build()
    for name, parameter in ours.named_parameters():
        assert not torch.equal(parameter, start.get_parameter(own_name(name))), name


def check_unequal_shapes() -> None:
    """One rank compresses, the other has too few tokens: nobody waits for anybody."""
    length = 32 if dist.get_rank() == 0 else 8
    _, ours, backend = _pair(_outside, 25, min_tokens=100)
    for seed in range(2):
        step(ours, [tokens(seed, length=length)])
    long = dist.get_rank() == 0
    assert len(backend.report.compressed) == (LAYERS if long else 0)
    # The output layer is in a graph of its own, without attention to tell what it is.
    reasons = {site.reason for site in backend.report.declined} - {"UNCLEAR_TARGET"}
    assert reasons == (set() if long else {"TOO_FEW_TOKENS"})
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer.step()
    assert_ranks_agree(ours)


class Wide(nn.Module):
    """A linear layer in a frame of its own: Dynamo skips those of torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def check_each_rank_decides_by_its_own_time() -> None:
    """One rank gains time, the other has too few tokens for it: gradients are means of both."""
    long = dist.get_rank() == 0
    x = torch.randn(256 if long else 16, 64, generator=torch.Generator().manual_seed(1))

    def graded(wrap: Callable[[nn.Module, Any, float], nn.Module]) -> dict[str, Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        backend = pamm(ratio=64, targets="linear", goal="speed")
        model = wrap(Wide(), backend, 25)
        model(x).square().mean().backward()
        reasons = {site.reason for site in backend.report.sites}
        assert reasons == {None if long else "UNPROFITABLE"}, str(backend.report)
        return {own_name(name): p.grad for name, p in model.named_parameters()}

    alone = graded(lambda model, backend, _: torch.compile(model, backend=backend))
    together = graded(_outside)
    for name, want in mean(alone).items():
        torch.testing.assert_close(together[name], want)


def check_join() -> None:
    """Rank 1 runs out of batches before rank 0 does, and shadows its all-reduces."""
    _, ours, _ = _pair(_inside, 25)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    with ours.join():
        for batch in _mine(4 if dist.get_rank() == 0 else 2):
            loss_of(ours, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_ranks_agree(ours)
