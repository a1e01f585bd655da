"""Run a model, and restore it afterwards."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pamm_compile.errors import MeasurementError
from pamm_compile.private import memory

_CONTAINERS = (dict, OrderedDict, set, list)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module, inputs: object = ()) -> Iterator[None]:
    """Restore afterwards everything that a call of a model, forward and backward, may change.

    That is: all attributes of all modules, such as buffers that are assigned, added or deleted, and
    whether they train; the values of buffers and inputs; gradients of parameters and inputs;
    random-number generators, of every device, Python and NumPy. Hooks on gradients of parameters
    and inputs do not run meanwhile; those of modules do.

    Args:
        model: runs meanwhile.
        inputs: tensors that it is called with, in any structure.
    """
    model = getattr(model, "_orig_mod", model)
    tensors = memory.tensors_in(inputs)
    with contextlib.ExitStack() as stack:
        # Undone in reverse: values last but one, when modules hold again what they held.
        stack.enter_context(_generators())
        stack.enter_context(_gradients([*model.parameters(), *tensors]))
        stack.enter_context(_values([*_own_tensors(model), *tensors]))
        stack.enter_context(_attributes(model))
        yield


def refuse_without_values(what: str, model: torch.nn.Module, inputs: object) -> None:
    """Raise if a model or its inputs are fake or on the meta device, where values are needed.

    Args:
        what: is to be done, for the message.
        model: any.
        inputs: tensors that it is called with, in any structure.

    Raises:
        MeasurementError: a tensor has no values.
    """
    for tensor in (*model.parameters(), *model.buffers(), *memory.tensors_in(inputs)):
        if not memory.has_values(tensor):
            raise MeasurementError(
                f"{what} needs values, and a tensor of the model or its inputs has none: it is "
                "fake or on the meta device. Make the model and its inputs on a device, or use "
                "explain() and predict_saved(), which need no values."
            )


@contextlib.contextmanager
def _attributes(model: torch.nn.Module) -> Iterator[None]:
    modules = [(module, dict(vars(module))) for module in model.modules()]
    containers: list[tuple[Any, Any]] = [
        (value, value.copy())
        for _, before in modules
        for value in before.values()
        if type(value) in _CONTAINERS
    ]
    try:
        yield
    finally:
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)
        # What holds them may be assigned anew, or changed in place.
        for container, before in containers:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)


def _own_tensors(model: torch.nn.Module) -> list[Tensor]:
    """Return buffers, and tensors that modules hold as plain attributes."""
    plain = [each for module in model.modules() for each in vars(module).values()]
    return [*model.buffers(), *(each for each in plain if isinstance(each, Tensor))]


@contextlib.contextmanager
def _values(tensors: list[Tensor]) -> Iterator[None]:
    kept = [
        (tensor, tensor.detach().clone())
        for tensor in {id(tensor): tensor for tensor in tensors}.values()
        if memory.has_values(tensor) and not is_lazy(tensor)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                if _may_differ(tensor, before):
                    tensor.copy_(before)


def _may_differ(tensor: Tensor, before: Tensor) -> bool:
    # A write where none is needed fails on expanded tensors, and on those saved for a backward pass
    # to come it makes that fail.
    plain = type(tensor) is Tensor and tensor.layout == torch.strided
    return not plain or not torch.equal(tensor, before)


@contextlib.contextmanager
def _gradients(tensors: list[Tensor]) -> Iterator[None]:
    leaves = [each for each in tensors if each.is_leaf and each.requires_grad]
    gradients = [(leaf, leaf.grad) for leaf in leaves]
    hooks = [(found, found.copy()) for leaf in leaves if (found := memory.gradient_hooks(leaf))]
    for leaf in leaves:
        # Out of reach: what is made meanwhile must not add to it.
        leaf.grad = None
    for found, _ in hooks:
        found.clear()
    try:
        yield
    finally:
        for leaf, gradient in gradients:
            leaf.grad = gradient
        for found, before in hooks:
            found.update(before)


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    of_python = random.getstate()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind, devices = "cuda", 0
    if accelerator is not None:
        module: Any = torch.get_device_module(accelerator)
        # One that nobody has used has no state yet, and asking for it would start the device.
        is_used = getattr(module, "is_initialized", lambda: False)()
        kind, devices = accelerator.type, module.device_count() if is_used else 0
    try:
        with torch.random.fork_rng(range(devices), device_type=kind):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
