"""Putting traced functions into a graph, keeping their results for backward, taking nodes out.

Inserted nodes are not decomposed again, so functions are traced with Inductor's decompositions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pamm_compile.graph.chains import value
from pamm_compile.graph.vocabulary import is_getitem, op_name
from pamm_compile.private import aot

# Not "is_backward": what only reads saved tensors could then run in the forward pass, and where a
# matmul reads it the partitioner saves it in place of them, at its full size.
FORWARD, BACKWARD = "is_forward", "must_be_in_backward"
"""The partitioner's tags for the two phases."""

_TRANSPOSES = ("aten::t", "aten::permute", "aten::transpose")

Function = Callable[..., Tensor | Sequence[Tensor]]


class Inserter:
    """Inserts functions into one graph, tracing each once for all inputs that look alike.

    Args:
        graph: where to.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._traces: dict[Hashable, GraphModule] = {}

    def insert(
        self, after: Node, function: Function, inputs: Sequence[Node], phase: str, key: Hashable
    ) -> tuple[list[Node], Node]:
        """Trace a function and insert its operations.

        Args:
            after: the node to insert behind.
            function: takes and returns tensors.
            inputs: its arguments, as nodes.
            phase: `FORWARD` or `BACKWARD`.
            key: equal for functions that do the same to inputs that look alike.

        Returns:
            The results as nodes, and the last node inserted.
        """
        traced, vals = self._trace(function, inputs, key)
        env: dict[Node, Node] = {}
        arguments = iter(inputs)
        cursor = after
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(arguments)
            elif node.op == "output":
                results = torch.fx.map_arg(node.args[0], env.__getitem__)
                flat = list(results) if isinstance(results, list | tuple) else [results]
                return flat, cursor
            else:
                assert node.op == "call_function", f"traced {node.op} {node.target}"
                with self.graph.inserting_after(cursor):
                    cursor = env[node] = self.graph.node_copy(node, env.__getitem__)
                cursor.meta["partitioner_tag"] = phase
                if node in vals:
                    cursor.meta["val"] = vals[node]
                # Annotations (memory-budget regions, streams) must cover what stands among them.
                if "custom" in after.meta:
                    cursor.meta["custom"] = after.meta["custom"]
        raise AssertionError("a traced graph ends with an output")

    def _trace(
        self, function: Function, inputs: Sequence[Node], key: Hashable
    ) -> tuple[GraphModule, dict[Node, Any]]:
        """Return a trace, and fake tensors for its nodes where those it has are taken."""
        # A layer's sites differ from the next layer's in nothing but their nodes, and tracing is
        # nearly all that the pass costs. Symbols are compared as text: equal text, equal symbol.
        key = (key, *(_appearance(value(node)) for node in inputs))
        fakes = [value(node) for node in inputs]
        if key not in self._traces:
            self._traces[key] = aot.trace(function, fakes)
            return self._traces[key], {}
        # Two nodes with one fake tensor would count as aliases of each other.
        return self._traces[key], aot.fake_values(self._traces[key], fakes)

    def keep_for_backward(self, nodes: Sequence[Node], cursor: Node) -> Node:
        """Make the partitioner save nodes at any memory budget.

        Left alone it recomputes them below a budget of 1, and what they are made of with them. It
        heeds MUST_SAVE only on nodes that the forward outputs need, and never on getitem; an
        assertion on a node's dtype counts as such a need, and Inductor drops it once the graphs are
        split.

        Args:
            nodes: of the forward pass.
            cursor: the node to insert behind.

        Returns:
            The last node inserted.
        """
        for node in nodes:
            node.meta["recompute"] = aot.MUST_SAVE
            if is_getitem(node):
                node.all_input_nodes[0].meta["recompute"] = aot.MUST_SAVE
            with self.graph.inserting_after(cursor):
                cursor = self.graph.call_function(
                    torch.ops.aten._assert_tensor_metadata.default,
                    (node,),
                    {"dtype": value(node).dtype},
                )
            # It returns nothing; an empty tuple is what every partitioner takes for a size of 0.
            cursor.meta.update(val=(), partitioner_tag=FORWARD)
        return cursor


def replace_node(graph: Graph, old: Node, new: Node) -> None:
    """Let all users of a node read another one, and erase it and the transposes only it read."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    old.replace_all_uses_with(new)
    _erase(graph, old)


def _erase(graph: Graph, node: Node) -> None:
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and op_name(source) in _TRANSPOSES:
            _erase(graph, source)


def _appearance(val: object) -> Hashable:
    if not isinstance(val, Tensor):
        return str(val)
    layout = (str(val.stride()), str(val.storage_offset())) if val.layout == torch.strided else ()
    return (str(tuple(val.shape)), val.dtype, val.device, val.requires_grad, *layout)
