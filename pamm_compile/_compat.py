"""The only importer of private torch: everything that a torch release may move is named here.

Supported: torch 2.11 and newer. A missing symbol is reported once, by name, as
`UnsupportedTorchError`, when the backend is imported.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from pamm_compile.errors import UnsupportedTorchError

OLDEST_TORCH = (2, 11)

# ---------------------------------------------------------------------------------------------
# Private symbols
# ---------------------------------------------------------------------------------------------

GRAPH_SYMBOLS = (
    "torch._dispatch.python:enable_python_dispatcher",
    "torch._dynamo.backends.common:aot_autograd",
    "torch._dynamo.backends.debugging:boxed_nop",
    "torch._functorch._aot_autograd.descriptors:GradAOTOutput",
    "torch._functorch._aot_autograd.descriptors:ParamAOTInput",
    "torch._functorch._aot_autograd.descriptors:PlainAOTInput",
    "torch._functorch._aot_autograd.descriptors:SubclassGetAttrAOTInput",
    "torch._functorch._aot_autograd.descriptors:SubclassGetAttrAOTOutput",
    "torch._functorch._aot_autograd.descriptors:TangentAOTInput",
    "torch._functorch.partitioners:min_cut_rematerialization_partition",
    "torch:_TorchCompileInductorWrapper",
    "torch._guards:detect_fake_mode",
    "torch._inductor.compile_fx:compile_fx",
    "torch._inductor.compile_fx:select_decomp_table",
    "torch._inductor.config:joint_custom_pre_pass",
    "torch._inductor.config:get_config_copy",
    "torch._inductor.custom_graph_pass:CustomGraphPass",
    "torch._inductor.pattern_matcher:stable_topological_sort",
    "torch._inductor.runtime.runtime_utils:cache_dir",
    "torch._logging:trace_structured",
    "torch._ops:HigherOrderOperator",
    "torch._ops:OpOverload",
    "torch.fx.experimental.proxy_tensor:make_fx",
)
"""Private symbols of the graph rooms, as "module:attribute"."""


def resolve(symbol: str) -> Any:
    """Import one private symbol.

    Args:
        symbol: "module:attribute".

    Returns:
        The object.

    Raises:
        UnsupportedTorchError: this torch does not have it.
    """
    module, attribute = symbol.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no {module}.{attribute}, which pamm_compile needs. "
            f"Supported: torch {'.'.join(map(str, OLDEST_TORCH))} and newer; install one of these, "
            "or a newer pamm_compile."
        ) from error


def check_torch_version(version: str) -> None:
    """Refuse a torch that is too old.

    Args:
        version: as in `torch.__version__`.

    Raises:
        UnsupportedTorchError: older than `OLDEST_TORCH`.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise UnsupportedTorchError(
            f"torch {version} is too old: pamm_compile needs torch "
            f"{'.'.join(map(str, OLDEST_TORCH))} or newer."
        )


check_torch_version(torch.__version__)

aot_autograd = resolve("torch._dynamo.backends.common:aot_autograd")
min_cut_rematerialization_partition = resolve(
    "torch._functorch.partitioners:min_cut_rematerialization_partition"
)
boxed_nop = resolve("torch._dynamo.backends.debugging:boxed_nop")
_InductorWrapper = resolve("torch:_TorchCompileInductorWrapper")
compile_fx = resolve("torch._inductor.compile_fx:compile_fx")
select_decomp_table = resolve("torch._inductor.compile_fx:select_decomp_table")
CustomGraphPass: type = resolve("torch._inductor.custom_graph_pass:CustomGraphPass")
stable_topological_sort = resolve("torch._inductor.pattern_matcher:stable_topological_sort")
detect_fake_mode = resolve("torch._guards:detect_fake_mode")
enable_python_dispatcher = resolve("torch._dispatch.python:enable_python_dispatcher")
make_fx = resolve("torch.fx.experimental.proxy_tensor:make_fx")
cache_dir: Callable[[], str] = resolve("torch._inductor.runtime.runtime_utils:cache_dir")
trace_structured = resolve("torch._logging:trace_structured")
HigherOrderOperator: Any = resolve("torch._ops:HigherOrderOperator")
OpOverload: Any = resolve("torch._ops:OpOverload")


def run_eagerly(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Stand in for Inductor's code generation: run a graph operator by operator."""
    compiled: Callable[..., Any] = boxed_nop(gm, inputs)
    return compiled


functorch_config = importlib.import_module("torch._functorch.config")
inductor_config = importlib.import_module("torch._inductor.config")

_descriptors = "torch._functorch._aot_autograd.descriptors:"
_GradAOTOutput: type = resolve(_descriptors + "GradAOTOutput")
_ParamAOTInput: type = resolve(_descriptors + "ParamAOTInput")
_PlainAOTInput: type = resolve(_descriptors + "PlainAOTInput")
_SubclassGetAttrAOTInput: type = resolve(_descriptors + "SubclassGetAttrAOTInput")
_SubclassGetAttrAOTOutput: type = resolve(_descriptors + "SubclassGetAttrAOTOutput")
_TangentAOTInput: type = resolve(_descriptors + "TangentAOTInput")

# ---------------------------------------------------------------------------------------------
# Descriptors of a joint graph's inputs and outputs
# ---------------------------------------------------------------------------------------------


def input_key(desc: object) -> str | None:
    """Return a stable name for an input descriptor; None for inputs that no user passed.

    The inner tensor of a subclass (the local shard of a DTensor, say) has its outer tensor's key.
    """
    if isinstance(desc, _SubclassGetAttrAOTInput):
        return input_key(desc.base)  # type: ignore[attr-defined]
    if isinstance(desc, _PlainAOTInput):
        return plain_input_key(desc.idx)  # type: ignore[attr-defined]
    if isinstance(desc, _ParamAOTInput):
        return f"parameter:{desc.target}"  # type: ignore[attr-defined]
    return None


def plain_input_key(position: int) -> str:
    """Return the key of the input at a position of Dynamo's graph."""
    return f"input:{position}"


def gradient_key(desc: object) -> str | None:
    """Return the key of the input that an output is the gradient of; None for other outputs."""
    if isinstance(desc, _SubclassGetAttrAOTOutput):
        return gradient_key(desc.base)  # type: ignore[attr-defined]
    if isinstance(desc, _GradAOTOutput):
        return input_key(desc.grad_of)  # type: ignore[attr-defined]
    return None


def is_tangent(desc: object) -> bool:
    """Tell whether an input descriptor is that of an output's gradient."""
    if isinstance(desc, _SubclassGetAttrAOTInput):
        return is_tangent(desc.base)  # type: ignore[attr-defined]
    return isinstance(desc, _TangentAOTInput)


def dynamo_inputs(gm: torch.fx.GraphModule) -> list[tuple[object, str]]:
    """Return what Dynamo knows of the inputs of a graph it captured.

    Args:
        gm: as handed to a backend.

    Returns:
        Per placeholder, the real value (None if unknown) and the Python expression it came from
        ("" if unknown), such as "L['self'].model.layers[0].self_attn.q_proj.weight".
    """
    found: list[tuple[object, str]] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        grapharg = node.meta.get("grapharg")
        source = getattr(grapharg, "source", None)
        example = getattr(grapharg, "example", None)
        found.append((example, "" if source is None else str(source.name)))
    return found


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
    return list(inductor_config.get_config_copy())


def size_hint(size: int | torch.SymInt) -> int:
    """Return a size, or for a symbolic one the value that was compiled with, adding no guard."""
    if isinstance(size, int):
        return size
    return int(size.node.hint)


def is_recomputed(policy: object) -> bool:
    """Tell whether a node's checkpointing policy asks for recomputation."""
    return policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


MUST_SAVE = CheckpointPolicy.MUST_SAVE


def trace(function: Callable[..., Any], fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace a function with Inductor's decompositions, on fake tensors that already exist.

    Args:
        function: takes and returns tensors.
        fakes: fake tensors of one mode; their symbolic sizes stay symbolic.

    Returns:
        The trace, `meta["val"]` set on every node.
    """
    mode = detect_fake_mode(fakes)
    with mode, enable_python_dispatcher():
        tracer = make_fx(function, select_decomp_table(), tracing_mode="real")
        traced: torch.fx.GraphModule = tracer(*fakes)
    traced.graph.eliminate_dead_code()
    return traced


# ---------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------

MEASURE_SYMBOLS = (
    "torch._functorch.config:activation_memory_budget",
    "torch._subclasses.fake_tensor:FakeTensor",
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
)
"""Private symbols of `measure`, as "module:attribute"."""


def memory_budget(budget: float) -> AbstractContextManager[None]:
    """Return a context in which the partitioner keeps this fraction of activation memory.

    Args:
        budget: from 0 (recompute all) to 1 (torch's default).
    """
    resolve(MEASURE_SYMBOLS[0])
    config = importlib.import_module("torch._functorch.config")
    context: AbstractContextManager[None] = config.patch(activation_memory_budget=budget)
    return context


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor is made of: itself, or those of a subclass."""
    if not resolve(MEASURE_SYMBOLS[2])(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    # On torch 2.13, unlike 2.11, a DTensor lists its mesh as well.
    parts = [part for name in names if isinstance(part := getattr(tensor, name), torch.Tensor)]
    return [inner for part in parts for inner in inner_tensors(part)]


def storage_address(tensor: torch.Tensor) -> int:
    """Return a number that two tensors alive at once share iff they share memory."""
    storage = tensor.untyped_storage()
    if isinstance(tensor, resolve(MEASURE_SYMBOLS[1])):
        # Fake tensors have no memory; those that alias each other have one storage object.
        return int(storage._cdata)
    return int(storage.data_ptr())


# ---------------------------------------------------------------------------------------------
# Inductor lowering
# ---------------------------------------------------------------------------------------------

LOWERING_SYMBOLS = (
    "torch._dynamo.device_interface:get_interface_for_device",
    "torch._inductor.ir:ExternKernel",
    "torch._inductor.ir:FixedLayout",
    "torch._inductor.ir:TritonTemplateBuffer",
    "torch._inductor.ir:is_triton",
    "torch._inductor.lowering:add_layout_constraint",
    "torch._inductor.lowering:empty_strided",
    "torch._inductor.lowering:fallback_handler",
    "torch._inductor.lowering:lowerings",
    "torch._inductor.lowering:register_lowering",
    "torch._inductor.lowering:to_dtype",
    "torch._inductor.runtime.hints:DeviceProperties",
    "torch._inductor.select_algorithm:ExternKernelChoice",
    "torch._inductor.select_algorithm:SymbolicGridFn",
    "torch._inductor.select_algorithm:TritonTemplate",
    "torch._inductor.select_algorithm:autotune_select_algorithm",
    "torch._inductor.virtualized:V",
    "torch.utils._triton:has_triton_package",
)
"""Private symbols of the lowering rooms, as "module:attribute"."""


def lowering_symbol(name: str) -> Any:
    """Import one of `LOWERING_SYMBOLS` by its attribute's name."""
    return resolve(next(symbol for symbol in LOWERING_SYMBOLS if symbol.endswith(f":{name}")))


def register_operator_lowering(overload: Any, lowering: Callable[..., Any]) -> None:
    """Make Inductor lower an operator by a function that gets and returns its nodes."""
    lowering_symbol("register_lowering")(overload, type_promotion_kind=None)(lowering)
    # A compilation before this one may have tied the operator's inputs to the strides of eager.
    lowering_symbol("add_layout_constraint")(overload, None)


def is_triton_device(device: torch.device) -> bool:
    """Tell whether Inductor makes Triton kernels for a device, CPUs set aside."""
    if device.type == "cpu" or not lowering_symbol("has_triton_package")():
        return False
    return bool(lowering_symbol("is_triton")(device))


def realized(node: Any, *, dense: bool = False) -> Any:
    """Give an Inductor value memory and fixed strides, as a view of what it is wherever possible.

    Args:
        node: the value.
        dense: whether a vector must also have stride 1, by a copy if need be.
    """
    kernel = lowering_symbol("ExternKernel")
    buffer = kernel.realize_input(node)
    if dense:
        buffer = kernel.require_stride1(buffer)
    buffer.freeze_layout()
    return buffer


def aten_lowering(overload: Any) -> Callable[..., Any]:
    """Return Inductor's lowering of an ATen overload."""
    lowering: Callable[..., Any] = lowering_symbol("lowerings")[overload]
    return lowering


def expression_hint(expression: Any, fallback: int) -> int:
    """Return the value an Inductor size was compiled with, adding no guard.

    Args:
        expression: int or sympy expression.
        fallback: returned where there is none, as for data-dependent sizes.
    """
    sizevars = lowering_symbol("V").graph.sizevars
    return int(sizevars.optimization_hint(expression, fallback=fallback))


def is_divisible(expression: Any, divisor: int) -> bool:
    """Tell whether an Inductor size is known to be a multiple of a number, adding no guard."""
    sizevars = lowering_symbol("V").graph.sizevars
    return bool(sizevars.statically_known_multiple_of(expression, divisor))


def is_max_autotune() -> bool:
    """Tell whether Inductor was asked to time several kernels."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


def has_reader(position: int) -> bool:
    """Tell whether the graph reads one output of the multi-output node being lowered."""
    node = lowering_symbol("V").graph.current_node
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
    properties = lowering_symbol("DeviceProperties").create(device)
    interface = lowering_symbol("get_interface_for_device")(device)
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
    picked = lowering_symbol("autotune_select_algorithm")(
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
    return isinstance(node.data.data, lowering_symbol("TritonTemplateBuffer"))


def without_autograd_cache() -> AbstractContextManager[None]:
    """Return a context in which AOTAutograd traces every graph, so that our pass runs."""
    context: AbstractContextManager[None] = functorch_config.patch(enable_autograd_cache=False)
    return context


# Used later, and checked now: a compilation is no place to learn that torch is not supported. Their
# modules are loaded by now, all of them with `compile_fx`.
for _symbol in (*MEASURE_SYMBOLS, *LOWERING_SYMBOLS):
    resolve(_symbol)
