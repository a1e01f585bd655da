"""Measuring memory: the partitioner's budget, subclasses and the storages of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pamm_compile.private.aot import functorch_config
from pamm_compile.private.symbols import resolve

fake_mode: Callable[[], AbstractContextManager[Any]] = resolve(
    "torch._subclasses.fake_tensor:FakeTensorMode"
)
_FakeTensor: Any = resolve("torch._subclasses.fake_tensor:FakeTensor")
_is_traceable_wrapper_subclass: Any = resolve(
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass"
)
resolve("torch._functorch.config:activation_memory_budget")


def memory_budget(budget: float) -> AbstractContextManager[None]:
    """Return a context in which the partitioner keeps this fraction of activation memory.

    Args:
        budget: from 0 (recompute all) to 1 (torch's default).
    """
    context: AbstractContextManager[None] = functorch_config.patch(activation_memory_budget=budget)
    return context


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor is made of: itself, or those of a subclass."""
    if not _is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    # On torch 2.13, unlike 2.11, a DTensor lists its mesh as well.
    parts = [part for name in names if isinstance(part := getattr(tensor, name), torch.Tensor)]
    return [inner for part in parts for inner in inner_tensors(part)]


def storage_address(tensor: torch.Tensor) -> int:
    """Return a number that two tensors alive at once share iff they share memory."""
    storage = tensor.untyped_storage()
    if isinstance(tensor, _FakeTensor):
        # Fake tensors have no memory; those that alias each other have one storage object.
        return int(storage._cdata)
    return int(storage.data_ptr())
