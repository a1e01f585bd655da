"""Names of the parameters of a graph that Dynamo captured, as the user's module gives them.

Dynamo says by which expression it reached a parameter. Where the parameter's module is at hand, the
parameter itself is looked up in it, so that neither wrappers nor the spelling of the expression
matter; else the name is read off the expression:

    torch.compile(model)                       model.named_parameters()
    torch.compile(model), after a graph break  the same, though the graph begins in the midst of it
    block.compile()                            block.named_parameters()
    torch.compile(lambda x: model(x))          "model." and model.named_parameters()
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from pamm_compile.private import aot

# Levels that wrappers put between a module and its parameters.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Wrappers of a whole model, which name it "module".
_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}

_ROOT = re.compile(r"[LG]\['(\w+)'\]")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+)_at_\d+")


@dataclass(frozen=True)
class Names:
    """Names of a graph's parameters."""

    by_key: dict[str, str]
    """The name of every parameter, by its input key."""
    shared: str = ""
    """If the graph runs for several modules of one class, whose first the names are of: its class.

    Dynamo compiles a method once for all modules alike, which shows only behind a graph break."""


def names_of(gm: GraphModule, known: Mapping[int, str] | None = None) -> Names:
    """Return the names of all parameters of a graph that Dynamo captured.

    Args:
        gm: as handed to a backend.
        known: names by `id` of the parameter, where the model is at hand; for others the modules
            being called are searched, then the names are read off Dynamo's expressions.

    Returns:
        Names such as "model.layers.0.self_attn.q_proj.weight".
    """
    called = aot.modules_being_called()
    compiled = next(filter(None, map(aot.compiled_module, called)), None)
    outermost = compiled or (called[-1] if called else None)
    # A function may be handed models of other names than the module has in which it is called.
    innermost = called[0] if called else None
    own = {id(p) for p in innermost.parameters()} if innermost is not None else set()
    found = _of(outermost) if outermost is not None else {}
    frame = aot.dynamo_frame()

    by_key = {}
    for position, (example, source) in enumerate(aot.dynamo_inputs(gm)):
        if not isinstance(example, nn.Parameter):
            continue
        name = (known or {}).get(id(example))
        if name is None and (compiled is not None or id(example) in own):
            name = found.get(id(example))
        if name is None:
            name = _through_root(source, example, frame) or f"input {position}"
        by_key[aot.plain_input_key(position)] = name
    for name, _ in gm.named_parameters():
        by_key[f"parameter:{name}"] = name
    return Names(by_key, _shared(innermost, outermost))


def readable(source: str) -> str:
    """Turn Dynamo's expression for a parameter into the name that the module gives it."""
    # PEFT reads its wrapped model by attributes, which Dynamo follows through __dict__.
    name = re.sub(r"\.__dict__\['_(modules|parameters|buffers)'\]", "", source)
    name = re.sub(r"\.?_(modules|parameters|buffers)(?=\W)", "", name)
    name = re.sub(r"\[['\"]?([^]'\"]+)['\"]?\]", r".\1", name)
    name = re.sub(r"^[LG]\.", "", name)
    # A wrapper such as accelerate's autocast hands the module on in its own *args.
    name = re.sub(r"^(self|args\.0)\.", "", name)
    return re.sub(r"^_orig_mod\.|^fn\.", "", name)


def _of(module: nn.Module) -> dict[int, str]:
    prefix = "module." if type(module).__name__ in _PARALLEL else ""
    return {id(p): _clean(name.removeprefix(prefix)) for name, p in module.named_parameters()}


def _clean(name: str) -> str:
    return ".".join(level for level in name.split(".") if level not in _WRAPPERS)


def _through_root(
    source: str, parameter: nn.Parameter, frame: tuple[str, Mapping[str, object]] | None
) -> str:
    """Name a parameter by the variable of Dynamo's frame through which it was reached."""
    root = _ROOT.match(source)
    if root is None or frame is None:
        return readable(source)
    function, variables = frame
    value = variables.get(root[1])
    is_receiver = _is_receiver(root[1], value, function)
    rest = _of(value).get(id(parameter)) if isinstance(value, nn.Module) else None
    if rest is not None:
        return rest if is_receiver else f"{root[1]}.{rest}"
    if is_receiver:
        # Whatever the method calls its first argument.
        source = source.replace(root[0], "L['self']", 1)
    return readable(source)


def _is_receiver(variable: str, value: object, function: str) -> bool:
    """Tell whether a variable is the first argument of the method that is running."""
    resumed = _RESUMED.match(function)
    method = inspect.unwrap(getattr(type(value), resumed[1] if resumed else function, None))  # type: ignore[arg-type]
    code = getattr(method, "__code__", None)
    return code is not None and code.co_varnames[:1] == (variable,)


def _shared(innermost: nn.Module | None, outermost: nn.Module | None) -> str:
    if innermost is None or outermost is None:
        return ""
    inner, outer = _unwrapped(innermost), _unwrapped(outermost)
    alike = sum(type(module) is type(inner) for module in outer.modules())
    return type(inner).__name__ if inner is not outer and alike > 1 else ""


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)
