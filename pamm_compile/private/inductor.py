"""Inductor: compiling, its passes and settings, and what the lowerings build on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pamm_compile.private import aot
from pamm_compile.private.symbols import resolve

compile_fx: Any = resolve("torch._inductor.compile_fx:compile_fx")
config: Any = resolve("torch._inductor:config")
CustomGraphPass: type = resolve("torch._inductor.custom_graph_pass:CustomGraphPass")
cache_artifacts: Any = resolve("torch.compiler._cache:CacheArtifactManager")
cache_dir: Callable[[], str] = resolve("torch._inductor.runtime.runtime_utils:cache_dir")
trace_structured: Any = resolve("torch._logging:trace_structured")

ExternKernelChoice: Any = resolve("torch._inductor.select_algorithm:ExternKernelChoice")
FixedLayout: Any = resolve("torch._inductor.ir:FixedLayout")
SymbolicGridFn: Any = resolve("torch._inductor.select_algorithm:SymbolicGridFn")
TritonTemplate: Any = resolve("torch._inductor.select_algorithm:TritonTemplate")
empty_strided: Any = resolve("torch._inductor.lowering:empty_strided")
fallback_handler: Any = resolve("torch._inductor.lowering:fallback_handler")
to_dtype: Any = resolve("torch._inductor.lowering:to_dtype")

_DeviceProperties: Any = resolve("torch._inductor.runtime.hints:DeviceProperties")
_ExternKernel: Any = resolve("torch._inductor.ir:ExternKernel")
_InductorWrapper: Any = resolve("torch:_TorchCompileInductorWrapper")
_TritonTemplateBuffer: Any = resolve("torch._inductor.ir:TritonTemplateBuffer")
_V: Any = resolve("torch._inductor.virtualized:V")
_add_layout_constraint: Any = resolve("torch._inductor.lowering:add_layout_constraint")
_autotune_select_algorithm: Any = resolve(
    "torch._inductor.select_algorithm:autotune_select_algorithm"
)
_get_interface_for_device: Any = resolve("torch._dynamo.device_interface:get_interface_for_device")
_has_triton_package: Any = resolve("torch.utils._triton:has_triton_package")
_is_triton: Any = resolve("torch._inductor.ir:is_triton")
_lowerings: Any = resolve("torch._inductor.lowering:lowerings")
_register_lowering: Any = resolve("torch._inductor.lowering:register_lowering")

# The type of an artifact that is a file of JSON in Inductor's cache folder.
_json_artifact: str = resolve("torch._inductor.runtime.autotune_cache:AutotuneCacheArtifact").type()
# Settings that are read or set by name.
resolve("torch._inductor.config:joint_custom_pre_pass")
resolve("torch._inductor.config:get_config_copy")


def carry_along(path: str, data: Any) -> None:
    """Let a file travel with `torch.compiler.save_cache_artifacts`.

    Where these are loaded it is written again. It travels as one of Inductor's own artifacts: with
    a type of ours, the whole bundle would be refused wherever this package is not imported first.

    Args:
        path: in the cache folder.
        data: what JSON can express.
    """
    cache_artifacts.record_artifact(_json_artifact, path, data)


def run_eagerly(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Stand in for Inductor's code generation: run a graph operator by operator."""
    compiled: Callable[..., Any] = aot.boxed_nop(gm, inputs)
    return compiled


def inductor_settings(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the Inductor settings that `torch.compile(mode=…, options=…)` stands for.

    Args:
        mode: one of torch.compile's modes, or None.
        options: Inductor settings, or None.

    Returns:
        Settings by name, as `compile_fx` takes them.

    Raises:
        RuntimeError: torch's own, for an unknown mode or a value of the wrong type.
    """
    return dict(_InductorWrapper(mode, dict(options or {}), None).config)


def inductor_setting_names() -> list[str]:
    """Return every name that `torch.compile(options=…)` accepts for Inductor."""
    return list(config.get_config_copy())


def register_operator_lowering(overload: Any, lowering: Callable[..., Any]) -> None:
    """Make Inductor lower an operator by a function that gets and returns its nodes."""
    _register_lowering(overload, type_promotion_kind=None)(lowering)
    # A compilation before this one may have tied the operator's inputs to the strides of eager.
    _add_layout_constraint(overload, None)


def is_triton_device(device: torch.device) -> bool:
    """Tell whether Inductor makes Triton kernels for a device, CPUs set aside."""
    if device.type == "cpu" or not _has_triton_package():
        return False
    return bool(_is_triton(device))


def realized(node: Any, *, dense: bool = False) -> Any:
    """Give an Inductor value memory and fixed strides, as a view of what it is wherever possible.

    Args:
        node: the value.
        dense: whether a vector must also have stride 1, by a copy if need be.
    """
    kernel = _ExternKernel
    buffer = kernel.realize_input(node)
    if dense:
        buffer = kernel.require_stride1(buffer)
    buffer.freeze_layout()
    return buffer


def materialized(node: Any) -> Any:
    """Give an Inductor value a buffer of its own, in place of computing it where it is read."""
    node.realize()
    return node


def aten_lowering(overload: Any) -> Callable[..., Any]:
    """Return Inductor's lowering of an ATen overload."""
    lowering: Callable[..., Any] = _lowerings[overload]
    return lowering


def expression_hint(expression: Any, fallback: int) -> int:
    """Return the value an Inductor size was compiled with, adding no guard.

    Args:
        expression: int or sympy expression.
        fallback: returned where there is none, as for data-dependent sizes.
    """
    sizevars = _V.graph.sizevars
    return int(sizevars.optimization_hint(expression, fallback=fallback))


def is_divisible(expression: Any, divisor: int) -> bool:
    """Tell whether an Inductor size is known to be a multiple of a number, adding no guard."""
    sizevars = _V.graph.sizevars
    return bool(sizevars.statically_known_multiple_of(expression, divisor))


def is_one(sizes: Sequence[Any]) -> bool:
    """Tell whether a tensor of these Inductor sizes has one element, adding no guard."""
    sizevars = _V.graph.sizevars
    return all(sizevars.statically_known_equals(size, 1) for size in sizes)


def is_max_autotune() -> bool:
    """Tell whether Inductor was asked to time several kernels."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def has_reader(position: int) -> bool:
    """Tell whether the graph reads one output of the multi-output node being lowered."""
    node = _V.graph.current_node
    return any(
        user.target is not operator.getitem or (user.args[1] == position and len(user.users) > 0)
        for user in node.users
    )


def device_properties(device: torch.device) -> tuple[str, int, int, int]:
    """Return what tile sizes depend on.

    Args:
        device: one that Triton compiles for.

    Returns:
        "cuda", "hip" or "xpu"; major compute capability (0 if not CUDA); number of multiprocessors;
        bytes of shared memory that one program may use.
    """
    properties = _DeviceProperties.create(device)
    interface = _get_interface_for_device(device)
    raw = interface.get_device_properties(device)
    shared = getattr(raw, "shared_memory_per_block_optin", 0) or 64 * 1024
    major = (properties.major or 0) if properties.type == "cuda" else 0
    return properties.type, major, properties.multi_processor_count, shared


def select_choice(
    name: str,
    choices: list[Any],
    inputs: list[Any],
    layout: Any,
    input_gen_fns: dict[int, Callable[[Any], Any]],
) -> Any:
    """Return the output node of the fastest choice: of the only one, without timing anything.

    Args:
        name: for Inductor's autotuning log and cache.
        choices: of Inductor's type `ChoiceCaller`.
        inputs: nodes the choices read or mutate.
        layout: of the output.
        input_gen_fns: per position in `inputs`, what to time with where random values do not do.
    """
    # A deferred choice (MultiTemplateBuffer) forgets which of its inputs a template mutates.
    picked = _autotune_select_algorithm(
        name,
        choices,
        inputs,
        layout,
        input_gen_fns=input_gen_fns or None,
        return_multi_template=False,
    )
    # torch 2.11 returns the node, later versions the node and the choice.
    return picked[0] if isinstance(picked, tuple) else picked


def is_template_output(node: Any) -> bool:
    """Tell whether a node that `select_choice` returned is a Triton template's."""
    return isinstance(node.data.data, _TritonTemplateBuffer)


class Integers:
    """An Inductor value of integers under Python's operators, so that what is written for tensors
    can also be lowered as it stands.

    Args:
        node: the value.
    """

    def __init__(self, node: Any) -> None:
        self.node = node

    def _apply(self, overload: Any, other: Any) -> Integers:
        operand = other.node if isinstance(other, Integers) else other
        return Integers(aten_lowering(overload)(self.node, operand))

    def __add__(self, other: Any) -> Integers:
        return self._apply(torch.ops.aten.add.Tensor, other)

    def __mul__(self, other: Any) -> Integers:
        return self._apply(torch.ops.aten.mul.Tensor, other)

    def __and__(self, other: Any) -> Integers:
        return self._apply(torch.ops.aten.bitwise_and.Tensor, other)

    def __xor__(self, other: Any) -> Integers:
        return self._apply(torch.ops.aten.bitwise_xor.Tensor, other)

    def __rshift__(self, other: Any) -> Integers:
        return self._apply(torch.ops.aten.bitwise_right_shift.Tensor, other)
