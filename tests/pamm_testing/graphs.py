"""Run a model through AOTAutograd with our pass, and keep every graph on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pamm_compile.driver import Mode, compile_graph, make_pipeline, visit
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.pipeline import Pipeline
from pamm_compile.graph.vocabulary import op_name
from pamm_compile.names import Names, names_of
from pamm_compile.options import Options
from pamm_compile.private import aot
from pamm_compile.report import GraphReport
from pamm_compile.sites.compress import CompressInputs
from pamm_compile.sites.decide import Decision
from pamm_compile.sites.targets import Match, classify, holds


@dataclass
class Captured:
    """The graphs of one compilation; of the last joint graph, if there were several."""

    before: str = ""
    after: str = ""
    joint: Graph | None = None
    forward: Graph | None = None
    backward: Graph | None = None
    report: GraphReport = field(default_factory=GraphReport)
    exact: GraphModule | None = None
    """The joint graph before the pass, to run."""
    forward_outputs: int = 0
    """How many of its outputs are those of the forward pass."""
    inputs: list[set[str]] = field(default_factory=list)
    """Per compressed site, the names of the nodes that are its input X in some arrangement."""
    at_budget: dict[float, Captured] = field(default_factory=dict)
    """The same joint graph as the partitioner cuts it under other memory budgets."""

    def saved(self) -> list[Node]:
        """Return what the forward graph saves for the backward graph."""
        assert self.forward is not None
        assert self.backward is not None
        wanted = {node.name for node in self.backward.find_nodes(op="placeholder")}
        outputs = self.forward.output_node().args[0]
        return [n for n in outputs if isinstance(n, Node) and n.name in wanted]

    def saved_bytes(self) -> int:
        return sum(n.meta["val"].nbytes for n in self.saved() if isinstance(n.meta["val"], Tensor))


def _copy(module: GraphModule) -> GraphModule:
    """Return a module with another graph, and the same constants."""
    graph = Graph()
    output = graph.output(graph.graph_copy(module.graph, {}))
    output.meta = dict(module.graph.output_node().meta)
    return GraphModule(module, graph)


def capturing_backend(
    captured: Captured,
    options: Options,
    *,
    decompose: bool,
    apply: bool = True,
    budgets: Sequence[float] = (),
    run: Callable[[GraphModule, list[Any]], Any] = aot.boxed_nop,
) -> Callable[..., Any]:
    """Return a Dynamo backend that partitions as Inductor does and runs the parts eagerly."""

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        pipeline = make_pipeline(options, names_of(gm).by_key, apply=apply)
        # A graph break puts the loss in a graph of its own; the one with sites is what counts.
        kept = Captured() if captured.inputs else captured

        def partition(module: GraphModule, *args: Any, **kwargs: Any) -> Any:
            kept.before = str(module.graph)
            kept.exact = _copy(module)
            kept.forward_outputs = kwargs["num_fwd_outputs"]
            joint = JointGraph(module.graph, pipeline.parameter_names)
            plans = pipeline.passes[0].decide(joint).accepted
            bases = [joint.readers(plan.site.chain.base)[0] for plan in plans]
            kept.inputs = [{node.name for node in nodes} for nodes in bases]
            pipeline(module.graph)
            module.recompile()
            kept.after = str(module.graph)
            kept.joint = module.graph
            assert pipeline.report is not None
            kept.report = pipeline.report
            for budget in budgets:
                with memory_budget(budget):
                    parts = aot.min_cut_rematerialization_partition(_copy(module), *args, **kwargs)
                forward, backward = (part.graph for part in parts)
                kept.at_budget[budget] = replace(kept, forward=forward, backward=backward)
            return aot.min_cut_rematerialization_partition(module, *args, **kwargs)

        def keep(name: str) -> Callable[..., Any]:
            def compiler(part: GraphModule, example_inputs: list[Any]) -> Any:
                setattr(kept, name, part.graph)
                return run(part, example_inputs)

            return compiler

        return aot.aot_autograd(
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            inference_compiler=aot.boxed_nop,
            decompositions=aot.select_decomp_table() if decompose else None,
            partition_fn=partition,
            keep_inference_input_mutations=True,
        )(gm, inputs)

    return backend


def check_saved(
    captured: Captured, sites: int, budget: float, *, recomputes_from_x: bool = False
) -> None:
    """Assert that every site's C, f and α are saved, and that no gradient reads its X.

    Args:
        captured: the graphs.
        sites: how many are compressed.
        budget: under which they were partitioned.
        recomputes_from_x: whether the partitioner may save X, to compute a projection again.
    """
    assert len(captured.inputs) == sites
    assert captured.forward is not None
    assert captured.backward is not None
    saved = {node.name for node in captured.saved()}
    in_forward = {node.name for node in captured.forward.nodes}
    for names in captured.inputs:
        # The partitioner may compute a residual sum or a projection again, and read X for that:
        # below a budget of 1, or where X is a graph input, which it has for nothing. No gradient
        # may.
        readers = {u for n in captured.backward.nodes if n.name in names for u in n.users}
        is_graph_input = any(name.startswith("primals") for name in names)
        assert {u.name for u in readers} <= in_forward, "the backward pass still reads X"
        assert budget < 1 or is_graph_input or not readers
        assert not names & saved or ((is_graph_input or recomputes_from_x) and readers)

    assert captured.joint is not None
    contractions = [n for n in captured.backward.nodes if "pamm.contract" in str(n.target)]
    assert len(contractions) == sites
    assert "pamm::assign" not in operators(captured.backward), "recomputed, not saved"
    for node in contractions:
        index, scale = node.args[0], node.args[1]
        assert index.op == scale.op == "placeholder"
        assert {index.name, scale.name} <= saved
    for node in captured.joint.nodes:
        if "pamm.assign" in str(node.target):
            # Saved as it is, or transposed where the weight gradient wants it so.
            assert {node.args[1].name, *(u.name for u in node.args[1].users)} & saved


@contextlib.contextmanager
def memory_budget(budget: float) -> Iterator[None]:
    # Caches would answer with the partition of another budget, or skip the pass.
    with functorch_config.patch(activation_memory_budget=budget, enable_autograd_cache=False):
        yield


class Both:
    """A Dynamo backend that compiles exactly and with ours, and runs what it is set to.

    Dynamo, which takes most of the time, traces a model once for the two.
    """

    def __init__(self, ours: Callable[..., Any]) -> None:
        self.ours = ours
        self.exact = True

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        exact = compile_graph(gm, inputs, None, base="aot_eager")
        ours = self.ours(gm, inputs)
        return lambda *given: (exact if self.exact else ours)(*given)


@dataclass
class Run:
    """The loss and gradients of one step."""

    loss: Tensor
    grads: dict[str, Tensor]


def step(
    model: nn.Module,
    compiled: Callable[..., Any],
    batch: dict[str, Any],
    loss_of: Callable[[Any], Tensor],
    *,
    autocast: bool = False,
    seed: int = 1,
) -> Run:
    """Run one forward and backward pass from a fixed seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(compiled(**batch))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(loss.detach().clone(), grads)


@dataclass
class Look:
    """What was found in the graph of a model, nothing rewritten."""

    joint: JointGraph
    match: Match
    decision: Decision

    @property
    def compressed(self) -> set[str]:
        """Names of the weights whose gradients would be approximated."""
        return {g.projection.name for plan in self.decision.accepted for g in plan.site.gradients}

    @property
    def reasons(self) -> dict[str, str]:
        """The reason by weight, and by what a decline is about where it concerns no site."""
        found = {}
        for candidate, decline in self.decision.declines:
            if candidate is None:
                found |= dict.fromkeys(decline.what.split(", "), decline.reason.name)
            else:
                weights = (w for p in candidate.site.projections for w in p.parameters)
                found |= {w.name: decline.reason.name for w in weights}
        return found

    def held(self, target: str) -> set[str]:
        """Names of the weights that a named target holds."""
        held = (p for p in self.match.projections if holds(target, p))
        return {w.name for p in held for w in p.parameters}


def look(model: nn.Module, batch: dict[str, Any], rules: str = "qkv=pamm:4") -> Look:
    """Call a model once, and look at its joint graph as Inductor gets it."""
    options, found = Options(rules=rules, min_tokens=1), []

    class Looking:
        name = fingerprint = "look"

        def __call__(self, joint: JointGraph, *, apply: bool) -> GraphReport:
            decision = CompressInputs(options).decide(joint)
            found.append(Look(joint, classify(joint), decision))
            return GraphReport()

    def compile_one(gm: GraphModule, inputs: Sequence[Any], names: Names) -> Any:
        pipeline = Pipeline([Looking()], names.by_key, apply=False)
        return compile_graph(gm, inputs, pipeline, mode=Mode.LOOK)

    visit(model, lambda compiled: compiled(**batch), compile_one)
    # Where Dynamo breaks a model into graphs, the one with its layers.
    return max(found, key=lambda each: len(each.match.projections))


def operators(graph: Graph) -> list[str]:
    """Return the operator names of a graph, in order."""
    return [op_name(node) for node in graph.nodes]
