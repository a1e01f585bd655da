"""Two graphs in place of one, for methods that remember something from step to step.

    backward passes   0        1        …   T − 1    T
    graph             whole    along    …   along    whole
                      └ dW of every weight ── method.remember ── memory, an input of "along"

Gradients are seen where they reach the parameters, outside of any graph; nothing is kept in the
model. Passes are counted by the gradients that arrive, not by calls: of a block that is
checkpointed from outside, the second forward pass has to run the graph of the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from pamm_compile.driver import Compiled, compile_graph, make_pipeline
from pamm_compile.graph.pipeline import GraphPass
from pamm_compile.methods.base import Remembering
from pamm_compile.options import Options
from pamm_compile.private import aot
from pamm_compile.report import GraphReport, Remembered, memories


@dataclass(frozen=True)
class Memory:
    """What is remembered of some weights that read one input."""

    method: Remembering
    where: Remembered
    features: int
    dtype: torch.dtype
    device: torch.device

    @property
    def places(self) -> list[int]:
        """The inputs of the graph that the weights are."""
        return [place for place, _ in self.where.weights]

    def example(self) -> Tensor:
        """Return a tensor like the memory."""
        rows = self.method.directions(self.features, self.where.outputs)
        return torch.zeros(rows, self.features, dtype=self.dtype, device=self.device)

    def of(self, gradients: Mapping[int, Tensor], before: Tensor | None) -> Tensor:
        """Return the memory of new gradients; the one before where they are not all finite."""
        found = []
        for (place, flip), outputs in zip(self.where.weights, self.where.outputs, strict=True):
            grad = gradients[place].detach()
            shape = (self.features, outputs) if flip else (outputs, self.features)
            matrix = grad.reshape(shape)
            found.append(matrix.T if flip else matrix)
        made = self.method.remember(found).to(self.dtype)
        if before is None:
            return made
        finite = torch.stack([each.isfinite().all() for each in found]).all()
        return torch.where(finite, made, before)


@dataclass
class _State:
    """What is known for the parameters that a graph is called with."""

    memories: Sequence[Memory]
    every: int
    known: list[Tensor | None] = field(init=False)
    passes: int = 0
    """Backward passes since the last memory was made."""
    waits: bool = False
    """Whether the graph was called since the last gradient: others may use the weights too."""
    collects: bool = False
    arrived: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = [None] * len(self.memories)

    @property
    def is_due(self) -> bool:
        return self.passes >= self.every or any(each is None for each in self.known)

    def arrive(self, place: int, grad: Tensor) -> None:
        """Take notice of a gradient."""
        if self.waits and place == self.memories[0].places[0]:
            self.waits = False
            self.passes += 1
        if not self.collects:
            return
        self.arrived[place] = grad
        for number, memory in enumerate(self.memories):
            if place in memory.places and self.arrived.keys() >= set(memory.places):
                with torch.no_grad():
                    self.known[number] = memory.of(self.arrived, self.known[number])
        if self.arrived.keys() >= {p for memory in self.memories for p in memory.places}:
            self.arrived.clear()
            self.collects, self.passes = False, 1


class TwoGraphs:
    """Calls one of two graphs, and remembers.

    Args:
        whole: the graph of passes that are remembered.
        along: the graph that takes the memories behind its inputs.
        memories: in that order, at least one.
    """

    def __init__(self, whole: Compiled, along: Compiled, memories: Sequence[Memory]) -> None:
        self._whole, self._along, self._memories = whole, along, memories
        # By a weight: Dynamo lets one graph run for all blocks that are alike.
        self._states = WeakIdKeyDictionary()

    def __call__(self, *args: Any) -> Any:
        state = self._state(args)
        state.waits = True
        if state.is_due:
            state.collects = True
            return self._whole(*args)
        return self._along(*args, *state.known)

    def _state(self, args: Sequence[Any]) -> _State:
        key = args[self._memories[0].places[0]]
        known: _State | None = self._states.get(key)
        if known is not None:
            return known
        state = _State(self._memories, min(memory.method.every for memory in self._memories))
        self._states[key] = state
        for place in {p for memory in self._memories for p in memory.places}:
            args[place].register_hook(_hook(weakref.ref(state), place))
        return state


def _hook(state: weakref.ref[_State], place: int) -> Callable[[Tensor], None]:
    # A parameter that outlives what was compiled for it keeps nothing of that alive.
    def hook(grad: Tensor) -> None:
        if (known := state()) is not None:
            known.arrive(place, grad)

    return hook


def period(options: Options) -> int:
    """Return after how many steps all are alike again; 1 where no method remembers anything."""
    methods = (rule.method for rule in options.rules)
    return max((each.every for each in methods if isinstance(each, Remembering)), default=1)


def with_memories(
    whole: Compiled,
    gm: GraphModule,
    inputs: Sequence[Any],
    report: GraphReport,
    options: Options,
    names: dict[str, str],
    passes: Sequence[GraphPass],
    settings: Mapping[str, Any],
) -> Compiled:
    """Return a graph that remembers what its report says, or `whole` where that is nothing.

    Args:
        whole: the graph, compiled.
        gm: the graph, as Dynamo captured it.
        inputs: its inputs.
        report: of `whole`.
        options: what the user chose.
        names: of parameters, by input key.
        passes: of the user's.
        settings: of Inductor.
    """
    found = [_memory(each, report, options, inputs) for each in memories(report)]
    if not found:
        return whole
    examples = [memory.example() for memory in found]
    wider = aot.with_further_inputs(gm, examples)
    pipeline = make_pipeline(options, names, passes, memories=len(inputs))
    along = compile_graph(
        wider, [*inputs, *examples], pipeline, base=options.base, settings=settings
    )
    return TwoGraphs(whole, along, found)


def _memory(
    where: Remembered, report: GraphReport, options: Options, inputs: Sequence[Any]
) -> Memory:
    site = next(site for site in report.sites if site.remembered == where)
    method = options.rules[where.rule].method
    assert isinstance(method, Remembering)
    dtype = getattr(torch, site.dtype)
    # As long as its token is long: in float16 a coefficient could overflow.
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    return Memory(method, where, site.shape[1], dtype, inputs[where.weights[0][0]].device)
