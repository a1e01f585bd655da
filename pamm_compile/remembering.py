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
from pamm_compile.methods.base import TOGETHER, Remembering
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

    def gradients(self, arrived: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the gradient of every weight, [outputs, features], of those that arrived."""
        found = []
        for (place, flip), outputs in zip(self.where.weights, self.where.outputs, strict=True):
            shape = (self.features, outputs) if flip else (outputs, self.features)
            matrix = arrived[place].detach().reshape(shape)
            found.append(matrix.T if flip else matrix)
        return found

    def is_like(self, other: Memory) -> bool:
        """Tell whether another memory is made of gradients of the same sizes in the same way."""
        mine, its = ((m.method, m.where.outputs, m.features, m.dtype, m.device)
                     for m in (self, other))  # fmt: skip
        return mine == its


def _made(
    memories: Sequence[Memory], arrived: Mapping[int, Tensor], before: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return new memories of what arrived; those before where it is not all finite.

    Memories that are alike are made together, so that small matrices wait for one another once.
    """
    made: list[Tensor | None] = [None] * len(memories)
    for number, memory in enumerate(memories):
        if made[number] is not None:
            continue
        alike = [n for n, m in enumerate(memories) if made[n] is None and memory.is_like(m)]
        first = memory.gradients(arrived)
        alike = alike[: max(1, TOGETHER // sum(each.nbytes for each in first))]
        sites = [memories[n].gradients(arrived) for n in alike]
        stacked = [torch.stack(each) for each in zip(*sites, strict=True)]
        found = memory.method.remember(stacked).to(memory.dtype)
        if any(before[n] is not None for n in alike):
            finite = torch.stack([each.isfinite().flatten(1).all(1) for each in stacked]).all(0)
            known = [_or(before[n], new) for n, new in zip(alike, found.unbind(), strict=True)]
            found = torch.where(finite[:, None, None], found, torch.stack(known))
        for n, each in zip(alike, found.unbind(), strict=True):
            made[n] = each
    return [each for each in made if each is not None]


def _or(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else before


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
        if self.arrived.keys() >= {p for memory in self.memories for p in memory.places}:
            self.settle()
            self.collects, self.passes = False, 1

    def settle(self) -> None:
        """Make the memories of which all gradients have arrived."""
        done = [n for n, m in enumerate(self.memories) if self.arrived.keys() >= set(m.places)]
        with torch.no_grad():
            memories, before = [self.memories[n] for n in done], [self.known[n] for n in done]
            for number, made in zip(done, _made(memories, self.arrived, before), strict=True):
                self.known[number] = made
        self.arrived.clear()


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
        # Of some weights none may come, as where gradients are asked of others only.
        state.settle()
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
