"""Graphs: what AOTAutograd and Dynamo say of inputs and outputs, tracing, partitioning."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sympy
import torch
from torch.utils.checkpoint import CheckpointPolicy

from pamm_compile.private.symbols import resolve

aot_autograd: Any = resolve("torch._dynamo.backends.common:aot_autograd")
boxed_nop: Any = resolve("torch._dynamo.backends.debugging:boxed_nop")
min_cut_rematerialization_partition: Any = resolve(
    "torch._functorch.partitioners:min_cut_rematerialization_partition"
)
select_decomp_table: Any = resolve("torch._inductor.compile_fx:select_decomp_table")
stable_topological_sort: Any = resolve("torch._inductor.pattern_matcher:stable_topological_sort")
make_fx: Any = resolve("torch.fx.experimental.proxy_tensor:make_fx")
HigherOrderOperator: Any = resolve("torch._ops:HigherOrderOperator")
OpOverload: Any = resolve("torch._ops:OpOverload")
functorch_config: Any = resolve("torch._functorch:config")
resolve("torch._functorch.config:donated_buffer")

MUST_SAVE = CheckpointPolicy.MUST_SAVE

DEPENDS_ON_VALUES: tuple[type[Exception], ...] = (
    *resolve("torch._dynamo.exc:exceptions_allowed_to_be_fallback"),
    resolve("torch.fx.experimental.symbolic_shapes:GuardOnDataDependentSymNode"),
)
"""What tracing raises where sizes or control flow depend on values of tensors.

Of most of these Dynamo thinks that they are about the user's function, which it then runs eagerly.
"""

_InstructionTranslator: Any = resolve("torch._dynamo.symbolic_convert:InstructionTranslator")
_dynamo_config: Any = resolve("torch._dynamo:config")
resolve("torch._dynamo.config:recompile_limit")
_OptimizedModule: Any = resolve("torch._dynamo.eval_frame:OptimizedModule")
_EVAL_FRAME: str = _OptimizedModule.__init__.__code__.co_filename
_Module: Any = resolve("torch.nn.modules.module:Module")
_MODULE_CALLS = (_Module._wrapped_call_impl.__code__, _Module._call_impl.__code__)
_statically_known_true: Any = resolve("torch.fx.experimental.symbolic_shapes:statically_known_true")
_TorchDispatchMode: Any = resolve("torch.utils._python_dispatch:TorchDispatchMode")
_detect_fake_mode: Any = resolve("torch._guards:detect_fake_mode")
_enable_python_dispatcher: Any = resolve("torch._dispatch.python:enable_python_dispatcher")

_GradAOTOutput: Any = resolve("torch._functorch._aot_autograd.descriptors:GradAOTOutput")
_ParamAOTInput: Any = resolve("torch._functorch._aot_autograd.descriptors:ParamAOTInput")
_PlainAOTInput: Any = resolve("torch._functorch._aot_autograd.descriptors:PlainAOTInput")
_SubclassGetAttrAOTInput: Any = resolve(
    "torch._functorch._aot_autograd.descriptors:SubclassGetAttrAOTInput"
)
_SubclassGetAttrAOTOutput: Any = resolve(
    "torch._functorch._aot_autograd.descriptors:SubclassGetAttrAOTOutput"
)
_TangentAOTInput: Any = resolve("torch._functorch._aot_autograd.descriptors:TangentAOTInput")


def input_key(desc: object) -> str | None:
    """Return a stable name for an input descriptor; None for inputs that no user passed.

    The inner tensor of a subclass (the local shard of a DTensor, say) has its outer tensor's key.
    """
    if isinstance(desc, _SubclassGetAttrAOTInput):
        return input_key(desc.base)
    if isinstance(desc, _PlainAOTInput):
        return plain_input_key(desc.idx)
    if isinstance(desc, _ParamAOTInput):
        return f"parameter:{desc.target}"
    return None


def plain_input_key(position: int) -> str:
    """Return the key of the input at a position of Dynamo's graph."""
    return f"input:{position}"


def plain_position(desc: object) -> int | None:
    """Return which input of Dynamo's graph a descriptor is of; None unless it is a whole one."""
    return int(desc.idx) if isinstance(desc, _PlainAOTInput) else None


def gradient_key(desc: object) -> str | None:
    """Return the key of the input that an output is the gradient of; None for other outputs."""
    if isinstance(desc, _SubclassGetAttrAOTOutput):
        return gradient_key(desc.base)
    if isinstance(desc, _GradAOTOutput):
        return input_key(desc.grad_of)
    return None


def is_tangent(desc: object) -> bool:
    """Tell whether an input descriptor is that of an output's gradient."""
    if isinstance(desc, _SubclassGetAttrAOTInput):
        return is_tangent(desc.base)
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


def symbolic_inputs(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs of Dynamo's graph with the sizes that it was traced with, some symbols.

    Args:
        gm: as handed to a backend.
        inputs: what it was called with, which stand in where Dynamo says nothing.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(inputs):
        return list(inputs)
    return [
        node.meta.get("example_value", value)
        for node, value in zip(placeholders, inputs, strict=True)
    ]


def with_further_inputs(
    gm: torch.fx.GraphModule, examples: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Return a copy of a graph that Dynamo captured, which takes more tensors, and reads none.

    Args:
        gm: as handed to a backend; left as it is.
        examples: real tensors like those to come, behind its own inputs.
    """
    copied = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        # Which AOTAutograd asks for, and no copy has.
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied.meta.update(gm.meta)
    # Dynamo says there of which variables parameters come; without it nothing is a static input.
    copied.__dict__.update({n: v for n, v in gm.__dict__.items() if n not in copied.__dict__})
    own = list(copied.graph.find_nodes(op="placeholder"))
    values = [node.meta.get("example_value") for node in own]
    mode = _detect_fake_mode([value for value in values if value is not None])
    for number, example in enumerate(examples):
        with copied.graph.inserting_after(own[-1]):
            own.append(copied.graph.placeholder(f"remembered_{number}"))
        own[-1]._dynamo_source = None
        if mode is not None:
            own[-1].meta["example_value"] = mode.from_tensor(example, static_shapes=True)
    copied.recompile()
    return copied


@contextmanager
def beside_buckets() -> Iterator[None]:
    """Let DDPOptimizer take no notice of what is compiled.

    Of each bucket it expects one graph, whose first call returns fake tensors.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or not context.fakify_first_call:
        yield
        return
    # A copy, since a backward pass is compiled later in the context of its forward pass.
    own = copy.copy(context)
    own.ddp_optimizer_ctx, own.fakify_first_call = None, False
    with torch._guards.tracing(own):
        yield


def dynamo_frame() -> tuple[str, Mapping[str, object]] | None:
    """Return the name and the variables of the function that Dynamo is compiling, if it is."""
    try:
        frame = _InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        # Somebody calls a backend without Dynamo.
        return None
    return frame.f_code.co_name, frame.f_locals


def modules_being_called() -> list[torch.nn.Module]:
    """Return the modules whose call Python is in the midst of, the last one called first."""
    found: list[torch.nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        # Code that Dynamo writes may hold a dict among its constants, and has no hash then.
        if any(frame.f_code is code for code in _MODULE_CALLS):
            module = frame.f_locals["self"]
            if not found or found[-1] is not module:
                found.append(module)
        frame = frame.f_back
    return found


def compiled_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module that torch.compile was given, if calling `module` runs compiled code."""
    if isinstance(module, _OptimizedModule):
        original: torch.nn.Module = module._orig_mod
        return original
    return module if module._compiled_call_impl is not None else None


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Return a context in which Dynamo keeps code of one function for this many cases."""
    context: AbstractContextManager[None] = _dynamo_config.patch(recompile_limit=limit)
    return context


def backend_in_use() -> object:
    """Return the backend of the innermost compiled function that Python is in; None outside."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _EVAL_FRAME and "callback" in code.co_freevars:
            found = frame.f_locals["callback"]
            while hasattr(found, "_torchdynamo_orig_backend"):
                found = found._torchdynamo_orig_backend
            # What torch.compile puts around a backend, for its mode and options.
            return getattr(found, "compiler_fn", found)
        frame = frame.f_back
    return None


def size_hint(size: int | torch.SymInt) -> int | None:
    """Return a size, or for a symbolic one the value that was compiled with, adding no guard.

    None for a size that only the data decide.
    """
    if isinstance(size, int):
        return size
    # The length of a ragged dimension has none either.
    hint = getattr(size.node, "hint", None)
    return None if hint is None else int(hint)


def guarded(condition: bool | torch.SymBool) -> bool | None:
    """Return whether a condition on sizes holds, for this and every later call of the graph.

    What depends on symbolic sizes becomes a guard: a call for which it comes out otherwise compiles
    anew. Where only the data decide, there is nothing to guard on.

    Args:
        condition: a comparison of sizes.

    Returns:
        Whether it holds; None if neither this nor the opposite can be known.
    """
    if isinstance(condition, bool):
        return condition
    if condition.node.has_hint():
        return bool(condition)
    if _statically_known_true(condition):
        return True
    return False if _statically_known_true(torch.sym_not(condition)) else None


def size_key(size: int | torch.SymInt) -> Any:
    """Return a size as a number or a symbolic expression, to compare and multiply unguarded."""
    if isinstance(size, int):
        return size
    # The length of a ragged dimension has no expression.
    return getattr(size.node, "expr", None) or sympy.Symbol(str(size))


def is_recomputed(policy: object) -> bool:
    """Tell whether a node's checkpointing policy asks for recomputation."""
    return policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def trace(function: Callable[..., Any], fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace a function with Inductor's decompositions, on fake tensors that already exist.

    Args:
        function: takes and returns tensors.
        fakes: fake tensors of one mode; their symbolic sizes stay symbolic.

    Returns:
        The trace, `meta["val"]` set on every node.
    """
    mode = _detect_fake_mode(fakes)
    with mode, _enable_python_dispatcher():
        tracer = make_fx(function, select_decomp_table(), tracing_mode="real")
        traced: torch.fx.GraphModule = tracer(*fakes)
    traced.graph.eliminate_dead_code()
    return traced


class WatchWrites(_TorchDispatchMode):  # type: ignore[misc]
    """A context that says which tensors operators write to in place, before they do.

    Args:
        written: gets an operator's name and a tensor.
    """

    supports_higher_order_operators = True

    def __init__(self, written: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._written = written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for place, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[place] if place < len(args) else given.get(argument.name)
                    for each in value if isinstance(value, list | tuple) else [value]:
                        if isinstance(each, torch.Tensor):
                            self._written(str(func), each)
        return func(*args, **given)


def shape_guards(symbols: Sequence[torch.SymInt]) -> str | None:
    """Return all that was guarded on about symbolic sizes so far, for `holds` to check later.

    Args:
        symbols: those that the graph takes as inputs.

    Returns:
        An expression of them; None if nothing was guarded on.
    """
    if not symbols:
        return None
    found: str | None = symbols[0].node.shape_env.produce_guards_expression(list(symbols))
    return found


def holds(guards: str | None, symbols: Sequence[torch.SymInt]) -> bool:
    """Tell whether guards hold for the values that symbolic sizes have now, adding no guard."""
    if guards is None:
        return True
    if not symbols:
        return False
    values = [symbol.node.hint for symbol in symbols]
    return bool(symbols[0].node.shape_env.evaluate_guards_expression(guards, values))


def backed_symbols(inputs: Sequence[Any]) -> list[torch.SymInt]:
    """Return the inputs of a graph that are symbolic sizes whose value is known before it runs."""
    return [s for s in inputs if isinstance(s, torch.SymInt) and size_hint(s) is not None]


def without_donated_buffers() -> AbstractContextManager[None]:
    """Return a context in which no backward pass may overwrite what was saved for it."""
    context: AbstractContextManager[None] = functorch_config.patch(donated_buffer=False)
    return context


def without_autograd_cache() -> AbstractContextManager[None]:
    """Return a context in which AOTAutograd traces every graph, so that our pass runs."""
    context: AbstractContextManager[None] = functorch_config.patch(enable_autograd_cache=False)
    return context


class _Recorder(torch.fx.Interpreter):
    """Keeps what every node of a graph gives."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = self.values[n] = super().run_node(n)
        return result


def fake_values(traced: torch.fx.GraphModule, fakes: Sequence[Any]) -> dict[torch.fx.Node, Any]:
    """Return fake tensors of their own for every node of a trace.

    Args:
        traced: what `trace` returned.
        fakes: its inputs.

    Returns:
        Per node, what it gives for these inputs.
    """
    recorder = _Recorder(traced)
    with _detect_fake_mode(fakes), _enable_python_dispatcher():
        recorder.run(*fakes)
    return recorder.values
