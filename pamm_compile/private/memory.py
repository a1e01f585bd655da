"""Measuring memory: the partitioner's budget, subclasses and the storages of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from pamm_compile.private.aot import functorch_config
from pamm_compile.private.symbols import resolve

T = TypeVar("T")

fake_mode: Callable[[], AbstractContextManager[Any]] = resolve(
    "torch._subclasses.fake_tensor:FakeTensorMode"
)
_FakeTensor: Any = resolve("torch._subclasses.fake_tensor:FakeTensor")
_is_traceable_wrapper_subclass: Any = resolve(
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass"
)
_tree_leaves: Any = resolve("torch.utils._pytree:tree_leaves")
_tree_map_only: Any = resolve("torch.utils._pytree:tree_map_only")
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


def tensors_in(structure: object) -> list[torch.Tensor]:
    """Return the tensors in any structure that torch knows to be one."""
    return [each for each in _tree_leaves(structure) if isinstance(each, torch.Tensor)]


def with_tensors(structure: T, function: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """Return a structure with a function of each of its tensors in the tensor's place."""
    changed: T = _tree_map_only(torch.Tensor, function, structure)
    return changed


def has_values(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is neither fake nor on the meta device."""
    return not isinstance(tensor, _FakeTensor) and tensor.device.type != "meta"


def attributes(module: torch.nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the mappings in which a module holds parameters, buffers and anything else."""
    return module._parameters, module._buffers, vars(module)


def gradient_hooks(tensor: torch.Tensor) -> dict[int, Any] | None:
    """Return the hooks that run when the gradient of a tensor is made, as torch keeps them."""
    hooks: dict[int, Any] | None = tensor._backward_hooks
    return hooks


def storage_address(tensor: torch.Tensor) -> int:
    """Return a number that two tensors alive at once share iff they share memory."""
    storage = tensor.untyped_storage()
    if not has_values(tensor):
        # These have no memory; those that alias each other have one storage object.
        return int(storage._cdata)
    return int(storage.data_ptr())
