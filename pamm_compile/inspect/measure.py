"""Measure what a training step keeps in memory: eager, compiled, and with PAMM."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from pamm_compile.errors import MeasurementError
from pamm_compile.private import memory

PEAK_ACCELERATOR = "allocator of the accelerator: max_memory_allocated"
PEAK_CPU = "torch's CPU allocator: memory events of torch.profiler"


_KINETO_LEVEL = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class SavedStorage:
    """One block of memory that is held for backward."""

    bytes: int
    """Of the whole block, however small the view of it that is saved."""
    shape: tuple[int, ...]
    """Of the first tensor found in it."""
    dtype: str


@dataclass(frozen=True)
class MemoryUse:
    """What `measure_memory` found."""

    saved: tuple[SavedStorage, ...]
    """Largest first."""
    peak_bytes: int
    """High-water mark of forward and backward together, above what was allocated before."""
    peak_source: str
    """What was read to get `peak_bytes`."""

    @property
    def saved_bytes(self) -> int:
        """Bytes held for backward when forward has ended."""
        return sum(storage.bytes for storage in self.saved)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"saved_bytes": self.saved_bytes, **dataclasses.asdict(self)}

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def measure_memory(
    fn: Callable[[], Any], *, model: nn.Module | None = None, warmup: int = 1
) -> MemoryUse:
    """Measure the bytes that a forward pass saves for backward, and the peak of both.

    Equivalent to counting, after `out = fn()`, every storage that the autograd graph of `out`
    keeps alive, parameters aside, and then watching the allocator during a second `out = fn()` and
    its backward:

        measure_memory(lambda: model(x).sum(), model=model)

    Eager and compiled functions are measured alike. Inputs count if they are saved. Tensors that
    `fn`'s own saved-tensor hooks replace (offloading, say) are not seen. `fn` runs `warmup` + 2
    times; gradients are computed, and never accumulated into `.grad`.

    Args:
        fn: runs forward; returns a tensor, or a structure of mappings, sequences and dataclasses
            of them.
        model: its parameters and buffers do not count as saved, nor do trainable parameters that
            backward reaches, with or without it.
        warmup: forward and backward passes before measuring; 1 compiles what is to be compiled.

    Returns:
        Bytes saved, block by block, and peak in bytes.

    Raises:
        MeasurementError: a tensor is saved whose layout is neither strided nor sparse COO.
    """
    for _ in range(warmup):
        differentiate(fn())
    # Eager graphs may be cyclic: what they hold must not be freed in the midst of a measurement.
    gc.collect()
    saved = saved_storages(fn, model=model)
    peak, source = _peak(fn)
    return MemoryUse(saved, peak, source)


def saved_storages(
    fn: Callable[[], Any], *, model: nn.Module | None = None
) -> tuple[SavedStorage, ...]:
    """Return the blocks of memory that a forward pass holds for backward, largest first.

    Equivalent to the first half of `measure_memory`.

    Args:
        fn: runs forward.
        model: its parameters and buffers do not count.

    Returns:
        One entry per storage.

    Raises:
        MeasurementError: a tensor is saved whose layout is neither strided nor sparse COO.
    """
    held: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        # A weak reference tells what the graph still holds at the end; also, a strong one would
        # keep a storage alive whose address could then not be told from another's.
        handle = _Held(tensor.detach())
        held.append(weakref.ref(handle))
        return handle

    with saved_tensors_hooks(pack, lambda handle: handle.tensor):
        outputs = fn()
    nodes = list(_graph_nodes(outputs))
    tensors = [handle.tensor for ref in held if (handle := ref()) is not None]
    # An autograd.Function may keep tensors as attributes of its ctx, past all hooks; compiled code
    # does so with what such functions within it keep.
    tensors += [tensor for node in nodes for tensor in _tensors(getattr(node, "__dict__", {}))]

    ours = {_address(inner) for tensor in _permanent(nodes, model) for inner in _plain(tensor)}
    found: dict[tuple[torch.device, int], SavedStorage] = {}
    for tensor in tensors:
        for inner in _plain(tensor):
            if _address(inner) not in ours:
                size = inner.untyped_storage().nbytes()
                dtype = str(inner.dtype).removeprefix("torch.")
                found.setdefault(_address(inner), SavedStorage(size, tuple(inner.shape), dtype))
    return tuple(sorted(found.values(), key=lambda each: -each.bytes))


class _Held:
    """What stands in the autograd graph in a saved tensor's place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors with memory of their own that a tensor consists of."""
    parts = []
    for inner in memory.inner_tensors(tensor):
        if inner.layout == torch.strided:
            parts.append(inner)
        elif inner.layout == torch.sparse_coo:
            parts += [inner._indices(), inner._values()]
        else:
            raise MeasurementError(
                f"a tensor of layout {inner.layout} is saved for backward. Only strided and sparse "
                "COO tensors can be measured."
            )
    return [part for part in parts if part.untyped_storage().nbytes() > 0]


def _address(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, memory.storage_address(tensor)


def _permanent(nodes: list[Node], model: nn.Module | None) -> Iterator[Tensor]:
    """Yield parameters and buffers, which exist with or without a backward pass."""
    if model is not None:
        yield from model.parameters()
        yield from model.buffers()
    yield from (leaf for leaf in _leaves(nodes) if isinstance(leaf, nn.Parameter))


def _leaves(nodes: list[Node]) -> list[Tensor]:
    # Only the nodes that accumulate into .grad have this attribute, which is public.
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _graph_nodes(outputs: Any) -> Iterator[Node]:
    stack = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions if following is not None]


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from _tensors(value)
    elif isinstance(structure, list | tuple):
        for value in structure:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(structure):
        for each in dataclasses.fields(structure):
            yield from _tensors(getattr(structure, each.name))


def differentiate(outputs: Any) -> tuple[Tensor, ...]:
    """Run backward from all outputs, leaving `.grad` alone.

    Equivalent to `torch.autograd.grad` of the sum of all outputs for every leaf.

    Args:
        outputs: a tensor, or a structure of mappings, sequences and dataclasses of them.

    Returns:
        The gradients of the leaves that have one.
    """
    roots = [tensor for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    leaves = _leaves(list(_graph_nodes(outputs)))
    if not leaves:
        return ()
    ones = [torch.ones_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, leaves, ones, allow_unused=True)
    return tuple(gradient for gradient in gradients if gradient is not None)


def _peak(fn: Callable[[], Any]) -> tuple[int, str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    with _cpu_memory_events() as events:
        if accelerator is not None:
            torch.accelerator.synchronize()
            torch.accelerator.reset_peak_memory_stats()
            before = torch.accelerator.memory_allocated()
        outputs = fn()
        on_accelerator = any(tensor.device.type != "cpu" for tensor in _tensors(outputs))
        differentiate(outputs)
    if accelerator is not None and on_accelerator:
        return torch.accelerator.max_memory_allocated() - before, PEAK_ACCELERATOR
    return _high_water(events), PEAK_CPU


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep Kineto's messages on starting and stopping off the terminal, if the user set nothing."""
    is_set = _KINETO_LEVEL in os.environ
    os.environ.setdefault(_KINETO_LEVEL, "99")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[_KINETO_LEVEL]


@contextlib.contextmanager
def _cpu_memory_events() -> Iterator[list[int]]:
    """Yield a list that, once the context is left, holds the bytes of every (de)allocation."""
    sizes: list[int] = []
    with (
        _quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        yield sizes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    on_cpu = [event for event in events if event["args"]["Device Type"] == 0]
    on_cpu.sort(key=lambda event: event["args"]["Ev Idx"])
    sizes.extend(event["args"]["Bytes"] for event in on_cpu)


def _high_water(sizes: list[int]) -> int:
    now = most = 0
    for size in sizes:
        now += size
        most = max(most, now)
    return most
