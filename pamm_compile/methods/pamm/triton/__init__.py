"""How Inductor compiles the two operators: Triton templates on GPUs, the eager kernel elsewhere."""

from __future__ import annotations

import functools

from pamm_compile.methods.pamm import operators
from pamm_compile.methods.pamm.triton import assign, contract
from pamm_compile.private import inductor

__all__ = ["register"]


@functools.cache
def register() -> None:
    """Register the lowerings of `pamm::assign` and `pamm::contract` with Inductor.

    Equivalent to nothing: results are the eager kernels', up to rounding. Calling it again does
    nothing.

    Raises:
        UnsupportedTorchError: this torch lacks a symbol that the lowerings use.
    """
    for operator, lowering in (
        (operators.assign, assign.lower),
        (operators.contract, contract.lower),
    ):
        inductor.register_operator_lowering(operator, lowering)
