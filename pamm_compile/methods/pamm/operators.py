"""`pamm::assign` and `pamm::contract`: signatures, shape functions, eager kernels.

    pamm::assign(Tensor x, Tensor generators, ScalarType index_dtype)
        -> (Tensor index, Tensor scale, Tensor cosine)
    pamm::contract(Tensor index, Tensor scale, Tensor[] grads, SymInt num_generators) -> Tensor

What each computes is stated once, in `eager`. Sampling, the ε gate, β and the finishing matmul
are compositions around these two and belong to the graph, not here. `assign` returns the cosine
because every known variant follows from it and α without another pass over X: the ε gate is
cosine² ≥ 1 − ε², a norm-keeping scale is α/|cosine|, an unshrunk one α/cosine², and
‖X_i‖ = |α|·‖C_f‖/|cosine|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pamm_compile.methods.pamm import eager

_LIBRARY = torch.library.Library("pamm", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)

_LIBRARY.define(
    "assign(Tensor x, Tensor generators, ScalarType index_dtype) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "contract(Tensor index, Tensor scale, Tensor[] grads, SymInt num_generators) -> Tensor",
    tags=_TAGS,
)


def _check_assign(x: Tensor, generators: Tensor, index_dtype: torch.dtype) -> None:
    torch._check(x.dim() == 2, lambda: f"pamm::assign: x must be [b, n], got {list(x.shape)}")
    torch._check(
        generators.dim() == 2 and generators.dtype == x.dtype,
        lambda: (
            f"pamm::assign: generators must be [k, n] of dtype {x.dtype}, "
            f"got {list(generators.shape)} of dtype {generators.dtype}"
        ),
    )
    torch._check(
        generators.shape[1] == x.shape[1],
        lambda: f"pamm::assign: generators have {generators.shape[1]} features, x has {x.shape[1]}",
    )
    torch._check(
        index_dtype in _INDEX_DTYPES,
        lambda: f"pamm::assign: index_dtype must be one of {_INDEX_DTYPES}, got {index_dtype}",
    )


def _check_contract(index: Tensor, scale: Tensor, grads: Sequence[Tensor]) -> None:
    torch._check(
        index.dim() == 1 and index.dtype in _INDEX_DTYPES,
        lambda: (
            f"pamm::contract: index must be [b] of one of {_INDEX_DTYPES}, "
            f"got {list(index.shape)} of dtype {index.dtype}"
        ),
    )
    torch._check(
        scale.dim() == 1 and scale.shape[0] == index.shape[0],
        lambda: (
            f"pamm::contract: scale must be [b] as index is, got {list(scale.shape)} "
            f"for {list(index.shape)}"
        ),
    )
    torch._check(len(grads) > 0, lambda: "pamm::contract: grads must not be empty")
    for grad in grads:
        torch._check(
            grad.dim() == 2 and grad.dtype == grads[0].dtype,
            lambda: (
                "pamm::contract: grads must be matrices [b, m] of one dtype, "
                f"got {[(list(g.shape), g.dtype) for g in grads]}"
            ),
        )
        torch._check(
            grad.shape[0] == index.shape[0],
            lambda: (
                f"pamm::contract: grads have {[g.shape[0] for g in grads]} rows, "
                f"index has {index.shape[0]}"
            ),
        )


def _assign_kernel(
    x: Tensor, generators: Tensor, index_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check_assign(x, generators, index_dtype)
    return eager.assign(x, generators, index_dtype)


def _contract_kernel(
    index: Tensor, scale: Tensor, grads: Sequence[Tensor], num_generators: int
) -> Tensor:
    _check_contract(index, scale, grads)
    return eager.contract(index, scale, grads, num_generators)


_LIBRARY.impl("assign", _assign_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("contract", _contract_kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("pamm::assign", lib=_LIBRARY)
def _assign_fake(
    x: Tensor, generators: Tensor, index_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check_assign(x, generators, index_dtype)
    rows = x.shape[0]
    return (
        x.new_empty(rows, dtype=index_dtype),
        x.new_empty(rows),
        x.new_empty(rows, dtype=eager.accumulation_dtype(x.dtype)),
    )


@torch.library.register_fake("pamm::contract", lib=_LIBRARY)
def _contract_fake(
    index: Tensor, scale: Tensor, grads: Sequence[Tensor], num_generators: int
) -> Tensor:
    _check_contract(index, scale, grads)
    return grads[0].new_empty(
        (num_generators, sum(grad.shape[1] for grad in grads)),
        dtype=eager.accumulation_dtype(grads[0].dtype),
    )


assign = torch.ops.pamm.assign.default
contract = torch.ops.pamm.contract.default


def index_dtype(num_generators: int | torch.SymInt) -> torch.dtype:
    """Return the smallest dtype that indexes `num_generators` generators.

    Equivalent to: uint8 up to 256, int16 up to 32768, else int32. A symbolic number gives int32,
    since choosing by its value would fix the value into the compiled graph.

    Args:
        num_generators: k.

    Returns:
        An integer dtype.
    """
    if not isinstance(num_generators, int):
        return torch.int32
    if num_generators <= 256:
        return torch.uint8
    return torch.int16 if num_generators <= 32768 else torch.int32
