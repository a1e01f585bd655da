"""Runs the parts of a rewritten joint graph, and keeps what the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from pamm_compile.graph.vocabulary import op_name
from pamm_testing.graphs import Captured


@dataclass
class Exact:
    """What the joint graph returned before the pass changed it."""

    outputs: Sequence[Any]
    grads: dict[str, Tensor]


@dataclass
class Site:
    """What one compressed site held in a real run."""

    x: Tensor
    rows: Tensor
    generators: Tensor
    index: Tensor
    scale: Tensor
    parameters: tuple[str, ...] = ()
    beta: float = 1.0
    """By what C is multiplied after the assignment, in float16 and behind the gate ε."""

    def reconstruction(self) -> Tensor:
        picked = self.generators.double()[self.index.long()]
        return self.beta * self.scale.double()[:, None] * picked


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, part: GraphModule, wanted: set[Node]) -> None:
        super().__init__(part)
        self.wanted, self.values = wanted, {}

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if n in self.wanted:
            self.values[n.name] = out.clone() if isinstance(out, Tensor) else out
        return out


@dataclass
class Recording:
    """What the parts of one joint graph were given and computed when they last ran."""

    inputs: dict[str, Any] = field(default_factory=dict)
    """Of both parts, by the name of the placeholder."""
    outputs: list[Any] = field(default_factory=list)
    """Of forward, what it saves for backward included."""
    random: Tensor = field(default_factory=torch.get_rng_state)
    """The state of torch's generator when forward began."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of the nodes that are C, f, α, X or sampled rows."""
    assigns: list[Node] = field(default_factory=list)
    contracts: list[Node] = field(default_factory=list)

    def compiler(self, part: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        assigns = [n for n in part.graph.nodes if op_name(n) == "pamm::assign"]
        contracts = [n for n in part.graph.nodes if op_name(n) == "pamm::contract"]
        self.assigns += assigns
        self.contracts += contracts
        wanted = {a for n in [*assigns, *contracts] for a in n.args[:2] if isinstance(a, Node)}
        wanted |= {u for n in assigns for u in n.users}
        for node in assigns:
            wanted |= set(_gather(node).all_input_nodes)

        names = [node.name for node in part.graph.find_nodes(op="placeholder")]
        is_forward = not any(name.startswith("tangents") for name in names)

        def run(args: list[Any]) -> Any:
            # The list empties itself while the graph runs.
            given = dict(zip(names, args, strict=True))
            if is_forward:
                self.inputs.clear()
                self.random = torch.get_rng_state()
            self.inputs.update(given)
            recorder = _Recorder(part, wanted)
            result = recorder.boxed_run(args)
            # Placeholders are not run.
            placeholders = {n.name: given[n.name] for n in wanted if n.name in given}
            self.values.update(placeholders | recorder.values)
            if is_forward:
                self.outputs = list(result)
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def exact(self, captured: Captured, leaves: Mapping[str, Tensor]) -> Exact:
        """Run the graph as it was before the pass, on what the parts were given.

        Args:
            captured: the graphs.
            leaves: the tensors that gradients are wanted of, by name.
        """
        assert captured.exact is not None
        names = {tensor.data_ptr(): name for name, tensor in leaves.items()}
        places = [n.name for n in captured.exact.graph.find_nodes(op="placeholder")]
        here = torch.get_rng_state()
        torch.set_rng_state(self.random)
        with torch.no_grad():
            results = Interpreter(captured.exact).run(*(self.inputs[name] for name in places))
        torch.set_rng_state(here)
        outputs, gradients = (
            results[: captured.forward_outputs],
            results[captured.forward_outputs :],
        )
        primals = [self.inputs[name] for name in places if not name.startswith("tangents")]
        grads = {
            names[primal.data_ptr()]: gradient
            for primal, gradient in zip(primals, gradients, strict=True)
            if gradient is not None
        }
        return Exact(outputs, grads)

    def sites(self) -> list[Site]:
        """Return the sites in graph order; f and α as the backward pass got them."""
        by_index = {n.args[0].name: n for n in self.contracts}
        found = []
        for node in self.assigns:
            outputs = {u.args[1]: u.name for u in node.users}
            contract = by_index[outputs[0]]
            rows = _gather(node).args[1][0]
            names = (
                _gather(node).args[0], rows, node.args[1], contract.args[0], contract.args[1],
            )  # fmt: skip
            found.append(Site(*(self.values[n.name] for n in names)))
        return found


def _gather(assign: Node) -> Node:
    node = assign.args[1]
    # Rows of float16 are first multiplied by powers of two.
    while op_name(node) in ("prims::convert_element_type", "aten::_to_copy", "aten::mul"):
        node = node.all_input_nodes[0]
    assert op_name(node) == "aten::index", node
    return node
