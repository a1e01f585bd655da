"""`pamm::buffer`: a value in memory of its own, in place of computing it wherever it is read.

    pamm::buffer(Tensor value) -> Tensor

Inductor computes small things anew in every kernel that reads them. That saves launches on a GPU,
where this operator is therefore nothing at all. On a CPU it saves no time, but code is then
generated again for every reader, and a sampled row is a hundred integer operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pamm_compile.private import inductor

_LIBRARY = torch.library.Library("pamm", "FRAGMENT")
_LIBRARY.define("buffer(Tensor value) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("buffer", torch.clone, "CompositeExplicitAutograd")


@torch.library.register_fake("pamm::buffer", lib=_LIBRARY)
def _fake(value: Tensor) -> Tensor:
    return torch.empty_like(value)


buffer = torch.ops.pamm.buffer.default
"""Return a copy of a tensor of any shape and dtype."""


def _lower(value: Any) -> Any:
    if inductor.is_triton_device(value.get_device()):
        return value
    return inductor.materialized(value)


def register() -> None:
    """Register the lowering with Inductor."""
    inductor.register_operator_lowering(buffer, _lower)
