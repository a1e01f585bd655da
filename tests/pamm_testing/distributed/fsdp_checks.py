"""What every rank of the FSDP2 test runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pamm_compile.methods.base import Method
from pamm_testing.distributed.tiny import (
    BATCH,
    LENGTH,
    MATCHED,
    SUBSPACE,
    Model,
    Run,
    assert_matched,
    assert_only_matched_differ,
    assert_ranks_agree,
    backend_with,
    build,
    collect,
    expected,
    loss_of,
    mean,
    pamm,
    step,
    tokens,
    watching,
)

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SITE = ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")


def main() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check(mesh, whole=False, policy=MixedPrecisionPolicy(), reshard=True)
    check(mesh, whole=False, policy=MIXED, reshard=False)
    check(mesh, whole=True, policy=MIXED, reshard=True)
    check(mesh, whole=False, policy=MixedPrecisionPolicy(), reshard=True, method=SUBSPACE)
    check_accumulation(mesh)
    check_ranks_agree_after_clipped_steps(mesh)
    check_unequal_shapes(mesh)


def shard(
    model: Model,
    backend: Any,
    mesh: DeviceMesh,
    *,
    whole: bool = False,
    policy: MixedPrecisionPolicy | None = None,
    reshard: bool = True,
) -> Model:
    """Compile and shard as torchtitan does: every block, then what is left."""
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in model.layers:
        if backend is not None and not whole:
            layer.compile(backend=backend, fullgraph=True)
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    if whole:
        # Not as one graph: FSDP2's hooks are outside of what Dynamo traces.
        model.compile(backend=backend)
    return model


def _mine(seed: int = 0, length: int = LENGTH) -> Tensor:
    return tokens(100 * dist.get_rank() + seed, length=length)


def _pair(mesh: DeviceMesh, backend: Any, **options: Any) -> tuple[Model, Model]:
    """Return the same model compiled without and with PAMM."""
    torch._dynamo.reset()
    return shard(build(), "aot_eager", mesh, **options), shard(build(), backend, mesh, **options)


def check(
    mesh: DeviceMesh,
    *,
    whole: bool,
    policy: MixedPrecisionPolicy,
    reshard: bool,
    method: Method | None = None,
) -> None:
    reference = shard(build(), None, mesh, policy=policy)
    with watching(reference) as seen:
        step(reference, [_mine()])
    backend = backend_with(method)
    exact, ours = _pair(mesh, backend, whole=whole, policy=policy, reshard=reshard)
    run = step(ours, [_mine()])
    # The blocks share one compiled graph; compiled as a whole, the model's names are of the first.
    (site,) = backend.report.compressed
    assert site.parameters == tuple(("layers.0." if whole else "") + name for name in SITE)
    assert site.dtype == str(policy.param_dtype or torch.float32).removeprefix("torch.")
    assert site.shape[0] == BATCH * LENGTH
    assert not backend.report.declined
    assert_only_matched_differ(step(exact, [_mine()]), run, MATCHED)
    # bf16 gradients are rounded before the reduction, ours and the reference's at other places.
    tolerance = 1e-5 if policy.param_dtype is None else 1e-2
    assert_matched(run, mean(expected(seen, one_graph=False, method=method)), tolerance)


def _accumulate(model: Model, batches: list[Tensor]) -> Run:
    model.zero_grad(set_to_none=True)
    losses = []
    for number, batch in enumerate(batches):
        model.set_requires_gradient_sync(number == len(batches) - 1)
        losses.append(loss_of(model, batch))
        losses[-1].backward()
    return collect(model, losses)


def check_accumulation(mesh: DeviceMesh) -> None:
    """Two micro-batches, reduced once: the mean over ranks of the sum of both."""
    batches = [_mine(1), _mine(2)]
    wanted: dict[str, Tensor] = {}
    reference = shard(build(), None, mesh)
    for batch in batches:
        with watching(reference) as seen:
            step(reference, [batch])
        for name, grad in expected(seen, one_graph=False).items():
            wanted[name] = wanted.get(name, 0) + grad
    exact, ours = _pair(mesh, pamm())
    run = _accumulate(ours, batches)
    assert_only_matched_differ(_accumulate(exact, batches), run, MATCHED)
    assert_matched(run, mean(wanted))


def check_ranks_agree_after_clipped_steps(mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    ours = shard(build(), pamm(), mesh, policy=MIXED)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    for seed in range(3):
        run = step(ours, [_mine(seed)])
        norm = nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        # Over all shards of all ranks, whose gradients `collect` has gathered.
        whole = torch.stack([grad.norm() for grad in run.full.values()]).norm()
        assert isinstance(norm, DTensor)
        torch.testing.assert_close(norm.full_tensor(), whole)
        optimizer.step()
    assert_ranks_agree(ours)
    start = build()
    for name, parameter in ours.named_parameters():
        assert not torch.equal(parameter.full_tensor(), start.get_parameter(name)), name


def check_unequal_shapes(mesh: DeviceMesh) -> None:
    """One rank compresses, the other has too few tokens: nobody waits for anybody."""
    long = dist.get_rank() == 0
    batch = _mine(length=LENGTH if long else 8)
    backend = pamm(min_tokens=100)
    exact, ours = _pair(mesh, backend)
    assert_only_matched_differ(step(exact, [batch]), step(ours, [batch]), MATCHED)
    assert len(backend.report.compressed) == (1 if long else 0)
    assert {site.reason for site in backend.report.declined} == (
        set() if long else {"TOO_FEW_TOKENS"}
    )
