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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import nn
from torch.fx import GraphModule

from pamm_compile.private import aot

# Levels that wrappers put between a module and its parameters.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Wrappers of a whole model, which name it "module".
_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}

# Whose items no path of attributes leads to.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_ROOT = re.compile(r"[LG]\['(\w+)'\]")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\['([^']*)'\]")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+)_at_\d+")


@dataclass(frozen=True)
class Names:
    """Names of a graph's parameters."""

    by_key: dict[str, str]
    """The name of every parameter, by its input key."""
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By name, those of all parameters that the graph may run for in its place, if there are any.

    Dynamo compiles a function once for all modules alike, which shows only behind a graph break."""


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
    alike = _Alike(outermost, found)

    by_key, others = {}, {}
    for position, (example, source) in enumerate(aot.dynamo_inputs(gm)):
        if not isinstance(example, nn.Parameter):
            continue
        name = (known or {}).get(id(example))
        if name is None and (compiled is not None or id(example) in own):
            name = found.get(id(example))
        if name is None:
            name = _through_root(source, example, frame) or f"input {position}"
        by_key[aot.plain_input_key(position)] = name
        if further := alike.names(example, source, frame):
            others[name] = further
    for name, _ in gm.named_parameters():
        by_key[f"parameter:{name}"] = name
    return Names(by_key, others)


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


class _Alike:
    """Finds the parameters that a graph may run for in place of those that it was compiled with.

    What is reached from the outermost module by a path of attributes is the same at every call.
    What is reached from another variable is whatever stands there: the layer of a loop, say.

    Args:
        outermost: the first module of those being called.
        names: of its parameters, by `id`.
    """

    def __init__(self, outermost: nn.Module | None, names: Mapping[int, str]) -> None:
        self._outermost = None if outermost is None else _unwrapped(outermost)
        self._names = names
        self._paths: dict[int, str] = {}
        self._by_class: dict[type, list[nn.Module]] = {}
        if self._outermost is not None:
            self._paths = {id(p): path for path, p in self._outermost.named_parameters()}
            for module in self._outermost.modules():
                self._by_class.setdefault(type(module), []).append(module)

    def names(
        self, parameter: nn.Parameter, source: str, frame: tuple[str, Mapping[str, object]] | None
    ) -> tuple[str, ...]:
        """Return the names of one and of those that may stand in its place; none if none may."""
        if not source or id(parameter) not in self._paths:
            return ()
        value = None if frame is None else _first_module(source, frame[1])
        if self._stays(parameter, source, value):
            return ()
        found: dict[str, None] = {}
        for module, rest in self._roots(parameter, source, value):
            for each in self._by_class[type(module)]:
                other = _parameter_at(each, rest)
                if _looks_like(other, parameter) and (name := self._names.get(id(other))):
                    found[name] = None
        return tuple(found) if len(found) > 1 else ()

    def _stays(self, parameter: nn.Parameter, source: str, value: nn.Module | None) -> bool:
        """Tell whether the expression gives the same parameter at every call."""
        if source.startswith("G"):
            return True
        if value is None or _unwrapped(value) is not self._outermost:
            return False
        # Under another name than its own, an attribute holds now this module, now that.
        read, own = _clean(readable(source)), _clean(self._paths[id(parameter)])
        return f".{read}".endswith(f".{own}") or f".{own}".endswith(f".{read}")

    def _roots(
        self, parameter: nn.Parameter, source: str, value: nn.Module | None
    ) -> Iterator[tuple[nn.Module, str]]:
        """Yield the module that stands in the variable, and the parameter's path in it."""
        if value is not None and _unwrapped(value) is not self._outermost:
            inner = {id(p): path for path, p in value.named_parameters()}
            if type(value) in self._by_class and id(parameter) in inner:
                yield value, inner[id(parameter)]
                return
        # An iterator, say: the outermost module within which both paths are the same.
        levels = self._paths[id(parameter)].split(".")
        read = f".{readable(source)}"
        for depth in range(1, len(levels)):
            rest = ".".join(levels[depth:])
            module = self._outermost.get_submodule(".".join(levels[:depth]))  # type: ignore[union-attr]
            if read.endswith(f".{rest}") and not isinstance(module, _CONTAINERS):
                yield module, rest
                return


def _first_module(source: str, variables: Mapping[str, object]) -> nn.Module | None:
    """Return the first module on the way of one of Dynamo's expressions from a local variable."""
    root = _ROOT.match(source)
    if root is None:
        return None
    value = variables.get(root[1])
    for attribute, index, key in _STEP.findall(source[root.end() :]):
        if isinstance(value, nn.Module):
            break
        # Nothing here may run code of the user's, or fail.
        if attribute:
            value = getattr(value, "__dict__", {}).get(attribute)
        elif isinstance(value, Mapping):
            value = value.get(key or int(index or 0))
        elif isinstance(value, Sequence) and index and int(index) < len(value):
            value = value[int(index)]
    return value if isinstance(value, nn.Module) else None


def _parameter_at(module: nn.Module, path: str) -> object:
    value: object = module
    for level in path.split("."):
        value = getattr(value, level, None)
    return value


def _looks_like(other: object, parameter: nn.Parameter) -> TypeGuard[nn.Parameter]:
    """Tell whether Dynamo's guards for one parameter hold for another."""
    return (
        isinstance(other, nn.Parameter)
        and other.shape == parameter.shape
        and other.dtype == parameter.dtype
        and other.requires_grad == parameter.requires_grad
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)
