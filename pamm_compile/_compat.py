"""The only importer of private torch: everything that a torch release may move is named here.

Supported: torch 2.11 and newer. A missing symbol is reported once, by name, as
`UnsupportedTorchError`, when the backend is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
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
        traced = make_fx(function, select_decomp_table(), tracing_mode="real")(*fakes)
    traced.graph.eliminate_dead_code()
    return traced
