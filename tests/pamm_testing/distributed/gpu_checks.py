"""What every rank runs where there are GPUs: FSDP2 and tensor parallelism under Inductor and NCCL.

With NCCL and Inductor's kernels nothing is bitwise; what is asserted is what must hold there too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from pamm_testing.distributed.fsdp_checks import MIXED, SITE, shard
from pamm_testing.distributed.tiny import (
    MATCHED,
    Model,
    assert_ranks_agree,
    build,
    pamm,
    parallelize,
    step,
    tokens,
)

# A compressed gradient differs from the exact one by far more than rounding does.
_ROUNDING = 2e-2


def fsdp() -> None:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    _check(lambda backend: shard(build(device="cuda"), backend, mesh, policy=MIXED))


def sequence_parallel() -> None:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))

    def wrap(backend: Any) -> Model:
        model = build(device="cuda")
        parallelize(model, mesh, sequence=True)
        for layer in model.layers:
            layer.compile(backend=backend, fullgraph=True)
        return model

    _check(wrap)


def _check(wrap: Any) -> None:
    batch = [tokens(1).cuda()]
    backend = pamm(base="inductor")
    exact, model = wrap("inductor"), wrap(backend)
    before, after = step(exact, batch), step(model, batch)
    assert [site.parameters for site in backend.report.compressed] == [SITE]
    torch.testing.assert_close(before.losses, after.losses, rtol=1e-3, atol=1e-3)
    for name, grad in before.full.items():
        error = (after.full[name] - grad).norm() / grad.norm()
        assert (error > _ROUNDING) == (name in MATCHED), (name, error)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_ranks_agree(model)
