"""Two graphs in place of one, for methods that remember something from step to step.

    backward passes   0 … w − 1    w        …   w + T − 2    w + T − 1
    graph             whole        along    …   along        whole
                      ├ dW of every weight ── method.remember ── memory, an input of "along"
                      └ dW, memory ── method.lost ──┐
    gradients         dW               method.restored(dW, lost)

Gradients are seen where they reach the parameters, outside of any graph; nothing is kept in the
model. Passes are counted by the gradients that arrive, not by calls: of a block that is
checkpointed from outside, the second forward pass has to run the graph of the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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

    def lost(self, memory: Tensor, arrived: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return what is added to gradients of the steps between, by place and in their shape."""
        found = {}
        matrices = self.gradients(arrived)
        for (place, flip), matrix in zip(self.where.weights, matrices, strict=True):
            left = self.method.lost(matrix, memory)
            if left is not None:
                found[place] = (left.T if flip else left).reshape(arrived[place].shape)
        return found

    def is_like(self, other: Memory) -> bool:
        """Tell whether another memory is made of gradients of the same sizes in the same way."""
        mine, its = ((m.method, m.where.outputs, m.features, m.dtype, m.device)
                     for m in (self, other))  # fmt: skip
        return mine == its


class Known(NamedTuple):
    """What is remembered of some weights."""

    memory: Tensor
    lost: dict[int, Tensor]
    """What is added to gradients, by the input of the graph that the weight is."""


def _made(
    memories: Sequence[Memory], arrived: Mapping[int, Tensor], before: Sequence[Known | None]
) -> list[Known]:
    """Return what is known of what arrived; what was known before where it is not all finite.

    Memories that are alike are made together, so that small matrices wait for one another once.
    """
    made: list[Known | None] = [None] * len(memories)
    for number, memory in enumerate(memories):
        if made[number] is not None:
            continue
        alike = [n for n, m in enumerate(memories) if made[n] is None and memory.is_like(m)]
        first = memory.gradients(arrived)
        alike = alike[: max(1, TOGETHER // sum(each.nbytes for each in first))]
        sites = [memories[n].gradients(arrived) for n in alike]
        stacked = [torch.stack(each) for each in zip(*sites, strict=True)]
        # Generated code reads it with the strides of its example.
        found = memory.method.remember(stacked).to(memory.dtype).contiguous()
        finite = torch.stack([each.isfinite().flatten(1).all(1) for each in stacked]).all(0)
        for index, n in enumerate(alike):
            new = Known(found[index], memories[n].lost(found[index], arrived))
            made[n] = _kept(before[n], new, finite[index])
    return [each for each in made if each is not None]


def _kept(before: Known | None, new: Known, finite: Tensor) -> Known:
    if before is None:
        return new
    lost = {p: torch.where(finite, each, before.lost[p]) for p, each in new.lost.items()}
    return Known(torch.where(finite, new.memory, before.memory), lost)


@dataclass(eq=False)
class _State:
    """What is known for the parameters that a graph is called with."""

    memories: Sequence[Memory]
    every: int
    warmup: int
    known: list[Known | None] = field(init=False)
    passes: int = 0
    """Backward passes from the last whole one on, which counts too."""
    whole: int = 0
    """Passes that were whole, and whose gradients all arrived."""
    waits: set[int] = field(default_factory=set)
    """Places of which no gradient arrived since the graph was called: others may use them too."""
    collects: bool = False
    arrived: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = [None] * len(self.memories)

    @property
    def places(self) -> set[int]:
        """Of all weights."""
        return {place for memory in self.memories for place in memory.places}

    @property
    def is_due(self) -> bool:
        if self.passes >= self.every or self.whole < self.warmup:
            return True
        return any(each is None for each in self.known)

    def arrive(self, place: int, grad: Tensor, *, is_last: bool) -> Tensor | None:
        """Take notice of a gradient, and return it restored where the graph lost a part of it.

        Args:
            place: of the weight among the inputs.
            grad: of it.
            is_last: whether no other graph used the weight since.
        """
        is_ours = place in self.waits
        if is_ours and place == self.memories[0].places[0]:
            self.passes += 1
        self.waits.discard(place)
        if not self.collects:
            return self._restored(place, grad) if is_ours and is_last else None
        self.arrived[place] = grad
        if self.arrived.keys() >= self.places:
            self.whole += 1
            # Those before the last of the first are not used.
            if self.whole >= self.warmup:
                self.settle()
            self.arrived.clear()
            self.collects, self.passes = False, 1
        return None

    @torch.no_grad()
    def _restored(self, place: int, grad: Tensor) -> Tensor | None:
        for memory, known in zip(self.memories, self.known, strict=True):
            if known is not None and place in known.lost:
                return memory.method.restored(grad, known.lost[place])
        return None

    @torch.no_grad()
    def settle(self) -> None:
        """Make the memories of which all gradients have arrived."""
        done = [n for n, m in enumerate(self.memories) if self.arrived.keys() >= set(m.places)]
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
        state.waits = state.places
        for place in state.places:
            _CALLED_LAST[args[place]] = weakref.ref(state)
        if state.is_due:
            state.collects = True
            return self._whole(*args)
        return self._along(*args, *(known.memory for known in state.known if known is not None))

    def _state(self, args: Sequence[Any]) -> _State:
        key = args[self._memories[0].places[0]]
        known: _State | None = self._states.get(key)
        if known is not None:
            return known
        methods = [memory.method for memory in self._memories]
        every, warmup = min(m.every for m in methods), max(m.warmup for m in methods)
        state = _State(self._memories, every, warmup)
        self._states[key] = state
        for place in state.places:
            hook = _hook(weakref.ref(state), weakref.ref(args[place]), place)
            args[place].register_hook(hook)
        return state


_CALLED_LAST = WeakIdKeyDictionary()
"""The state of the graph that used a parameter last, by the parameter. A gradient may be the sum of
what several graphs made, as where lengths differ, and is restored once."""


def _hook(
    state: weakref.ref[_State], weight: weakref.ref[Tensor], place: int
) -> Callable[[Tensor], Tensor | None]:
    # A parameter that outlives what was compiled for it keeps nothing of that alive.
    def hook(grad: Tensor) -> Tensor | None:
        known, parameter = state(), weight()
        if known is None or parameter is None:
            return None
        return known.arrive(place, grad, is_last=_CALLED_LAST.get(parameter) == state)

    return hook


def period(options: Options) -> int:
    """Return after how many steps all are alike again; 1 where no method remembers anything."""
    methods = (rule.method for rule in options.rules)
    return max((each.every for each in methods if isinstance(each, Remembering)), default=1)


def early(options: Options) -> int:
    """Return how many steps behind the first are nearly exact too, before turns begin."""
    methods = (rule.method for rule in options.rules)
    return max((each.warmup - 1 for each in methods if isinstance(each, Remembering)), default=0)


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
    with aot.beside_buckets():
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
