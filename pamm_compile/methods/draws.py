"""Seeds and sampled rows as a graph holds them: on CPUs each is one operator, made eagerly.

    pamm::content_seed(Tensor x, int salt) -> Tensor
    pamm::site_seeds(Tensor seed, int count) -> Tensor[]
    pamm::sample_rows(SymInt tokens, SymInt k, Tensor seed, str sampling) -> Tensor

A hash is a few hundred integer operations. Inductor generates them anew in every kernel that reads
one, which on a CPU is a tenth of the time of compiling. On a GPU every operator would be a launch:
there a graph holds what `sampling` computes, to be fused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pamm_compile.methods import sampling
from pamm_compile.methods.sampling import Sampling, site_seed
from pamm_compile.private import inductor

_LIBRARY = torch.library.Library("pamm", "FRAGMENT")
_OPERATORS = torch.ops.pamm
for _schema in (
    "content_seed(Tensor x, int salt) -> Tensor",
    "site_seeds(Tensor seed, int count) -> Tensor[]",
    "sample_rows(SymInt tokens, SymInt k, Tensor seed, str sampling) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _site_seeds(seed: Tensor, count: int) -> list[Tensor]:
    numbers: Any = torch.arange(count, device=seed.device)
    # Outputs of an operator may not be views of one another.
    return [each.clone() for each in site_seed(seed, numbers).unbind()]


_LIBRARY.impl("content_seed", sampling.content_seed, "CompositeExplicitAutograd")
_LIBRARY.impl("site_seeds", _site_seeds, "CompositeExplicitAutograd")
_LIBRARY.impl("sample_rows", sampling.sample_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("pamm::content_seed", lib=_LIBRARY)
def _fake_content_seed(x: Tensor, salt: int) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.register_fake("pamm::site_seeds", lib=_LIBRARY)
def _fake_site_seeds(seed: Tensor, count: int) -> list[Tensor]:
    return [seed.new_empty(()) for _ in range(count)]


@torch.library.register_fake("pamm::sample_rows", lib=_LIBRARY)
def _fake_sample_rows(tokens: int, k: int, seed: Tensor, how: Sampling) -> Tensor:
    return seed.new_empty((k,))


def content_seed(x: Tensor, salt: int) -> Tensor:
    """Return `sampling.content_seed(x, salt)`, on CPUs as one operator of a graph."""
    if x.device.type != "cpu":
        return sampling.content_seed(x, salt)
    return cast(Tensor, _OPERATORS.content_seed.default(x, salt))


site_seeds = _OPERATORS.site_seeds.default
"""Return a seed for each of `count` sites that share a content seed, `site_seed(seed, number)`.

An operator on every device, so that each seed is a buffer of its own: were they computed where they
are used, the code of every site would hold another constant, and no two could share a kernel.
"""


def sample_rows(
    tokens: int | torch.SymInt, k: int | torch.SymInt, seed: Tensor, how: Sampling
) -> Tensor:
    """Return `sampling.sample_rows(tokens, k, seed, how)`, on CPUs as one operator of a graph."""
    if seed.device.type != "cpu":
        return sampling.sample_rows(tokens, k, seed, how)
    return cast(Tensor, _OPERATORS.sample_rows.default(tokens, k, seed, how))


def _lower_content_seed(x: Any, salt: int) -> Any:
    call = inductor.fallback_handler(_OPERATORS.content_seed.default, add_to_fallback_set=False)
    return call(x, salt)


def _lower_site_seeds(seed: Any, count: int) -> list[Any]:
    """Lower to `count` buffers, which Inductor computes in one kernel where launches cost time."""
    if not inductor.is_triton_device(seed.get_device()):
        call = inductor.fallback_handler(site_seeds, add_to_fallback_set=False)
        return list(call(seed, count))
    base: Any = inductor.Integers(seed)
    seeds: list[Any] = [site_seed(base, number) for number in range(count)]
    return [inductor.materialized(each.node) for each in seeds]


def register() -> None:
    """Register the lowerings with Inductor."""
    # Without one, X would be copied wherever its strides are not those of eager code.
    inductor.register_operator_lowering(_OPERATORS.content_seed.default, _lower_content_seed)
    inductor.register_operator_lowering(site_seeds, _lower_site_seeds)
