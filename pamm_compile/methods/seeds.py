"""`pamm::site_seeds`: a seed of its own for every site of a graph, from one content seed.

    pamm::site_seeds(Tensor seed, int count) -> Tensor[]

An operator only so that each seed is a buffer of its own: were they computed where they are used,
the generated code of every site would hold another constant, and no two sites could share a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pamm_compile.methods.sampling import site_seed
from pamm_compile.private import inductor

_LIBRARY = torch.library.Library("pamm", "FRAGMENT")
_LIBRARY.define(
    "site_seeds(Tensor seed, int count) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _kernel(seed: Tensor, count: int) -> list[Tensor]:
    numbers: Any = torch.arange(count, device=seed.device)
    # Outputs of an operator may not be views of one another.
    return [each.clone() for each in site_seed(seed, numbers).unbind()]


_LIBRARY.impl("site_seeds", _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("pamm::site_seeds", lib=_LIBRARY)
def _fake(seed: Tensor, count: int) -> list[Tensor]:
    return [seed.new_empty(()) for _ in range(count)]


site_seeds = torch.ops.pamm.site_seeds.default


def _lower(seed: Any, count: int) -> list[Any]:
    """Lower to `count` buffers, which Inductor computes in one kernel where launches cost time."""
    if not inductor.is_triton_device(seed.get_device()):
        # Inlined, a chain of hashes is as many operations as all other code of a few layers.
        call = inductor.fallback_handler(site_seeds, add_to_fallback_set=False)
        return list(call(seed, count))
    base: Any = inductor.Integers(seed)
    seeds: list[Any] = [site_seed(base, number) for number in range(count)]
    return [inductor.materialized(each.node) for each in seeds]


def register() -> None:
    """Register the lowering with Inductor."""
    inductor.register_operator_lowering(site_seeds, _lower)
