"""Replace the weight gradients of the chosen sites by compressed ones.

    forward:   X ─┬─ mm(X, Wqᵀ) …  unchanged
                  └─ seed → rows → C = X[rows] ── pamm::assign(X, C) → f, α      saved: C, f, α
    backward:  pamm::contract(f, α, [dQ, dK, dV], k) → B̃ ── mm(B̃ᵀ, C) ── split → dWq, dWk, dWv

What is inserted is traced from the functions of `ops.compression` with Inductor's decompositions,
since nodes inserted here are not decomposed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pamm_compile.graph.joint import strip_transposes, value
from pamm_compile.graph.vocabulary import op_name
from pamm_compile.methods.pamm.compression import (
    Compressed,
    compress,
    content_seed,
    site_seed,
    weight_gradients,
)
from pamm_compile.options import Options
from pamm_compile.private import aot
from pamm_compile.sites.projections import Site, WeightGradient


def is_rewritten(graph: Graph) -> bool:
    """Tell whether a graph already holds compressed sites."""
    return any(op_name(node) == "pamm::assign" for node in graph.nodes)


def rewrite(graph: Graph, sites: Sequence[Site], options: Options) -> None:
    """Rewrite the sites of a joint graph in place.

    Args:
        graph: the joint graph.
        sites: accepted sites, in graph order.
        options: ratio, min_generators, sampling, epsilon and seed are read.
    """
    seeds: dict[torch.device, Node] = {}
    for number, site in enumerate(sites):
        compressed = _compress_site(graph, site, number, seeds, options)
        _replace_gradients(graph, site, compressed)
    if sites:
        # dW now needs dQ, dK and dV together: users of the first wait for the last.
        aot.stable_topological_sort(graph)
        graph.lint()


def _compress_site(
    graph: Graph, site: Site, number: int, seeds: dict[torch.device, Node], options: Options
) -> list[Node]:
    x = site.input
    cursor = x
    device = value(x).device
    if device not in seeds:
        # One seed per graph and device: a reduction at every site would cost a launch at each.
        (seeds[device],), cursor = _insert(
            graph, cursor, lambda x: content_seed(_matrix(x), options.seed), [x], "is_forward"
        )

    def compress_input(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        # A plain tuple: fx would trace the construction of a named one.
        return tuple(
            compress(
                _matrix(x),
                site_seed(seed, number),
                ratio=options.exact_ratio,
                min_generators=options.min_generators,
                sampling=options.sampling,
                epsilon=options.epsilon,
            )
        )

    compressed, cursor = _insert(graph, cursor, compress_input, [x, seeds[device]], "is_forward")
    _force_saved(graph, compressed, cursor)
    return compressed


def _force_saved(graph: Graph, compressed: Sequence[Node], cursor: Node) -> None:
    """Make the partitioner save these nodes at any memory budget.

    Left alone it recomputes them below a budget of 1, and X with them. It heeds MUST_SAVE only on
    nodes that the forward outputs need, and never on getitem; an assertion on a node's dtype counts
    as such a need, and Inductor drops it once the graphs are split.
    """
    for node in compressed:
        node.meta["recompute"] = aot.MUST_SAVE
        if op_name(node) == "":
            node.all_input_nodes[0].meta["recompute"] = aot.MUST_SAVE
        with graph.inserting_after(cursor):
            cursor = graph.call_function(
                torch.ops.aten._assert_tensor_metadata.default,
                (node,),
                {"dtype": value(node).dtype},
            )
        # It returns nothing; an empty tuple is what every partitioner takes for a size of 0.
        cursor.meta.update(val=(), partitioner_tag="is_forward")


def _replace_gradients(graph: Graph, site: Site, compressed: Sequence[Node]) -> None:
    grads, flips = zip(*(_output_gradient(g) for g in site.gradients), strict=True)
    vals = [value(g.node) for g in site.gradients]

    def replacement(generators: Tensor, index: Tensor, scale: Tensor, *dz: Tensor) -> list[Tensor]:
        results = weight_gradients(
            Compressed(generators, index, scale),
            [_matrix(z).t() if flip else _matrix(z) for z, flip in zip(dz, flips, strict=True)],
            [g.transposed for g in site.gradients],
        )
        return [r.to(v.dtype).reshape(v.shape) for r, v in zip(results, vals, strict=True)]

    last = max(site.gradients, key=lambda g: g.node).node
    new, _ = _insert(graph, last, replacement, [*compressed, *grads], "is_backward")
    for gradient, node in zip(site.gradients, new, strict=True):
        for key in ("stack_trace", "nn_module_stack"):
            if key in gradient.node.meta:
                node.meta[key] = gradient.node.meta[key]
        gradient.node.replace_all_uses_with(node)
        _erase(graph, gradient.node)


def _output_gradient(gradient: WeightGradient) -> tuple[Node, bool]:
    """Return dZ as a node, and whether it is still to be transposed to [b, m]."""
    stripped, odd = strip_transposes(gradient.output_gradient)
    # On the left stands dZᵀ, so one transpose is undone; on the right none.
    return stripped, odd == gradient.transposed


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.squeeze(0)


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node and the transposes that only it read."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and op_name(source) in ("aten::t", "aten::permute", "aten::transpose"):
            _erase(graph, source)


def _insert(
    graph: Graph,
    after: Node,
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Node],
    phase: str,
) -> tuple[list[Node], Node]:
    """Trace a function and insert its operations.

    Args:
        graph: where to.
        after: the node to insert behind.
        function: takes and returns tensors.
        inputs: its arguments, as nodes.
        phase: the partitioner's tag, "is_forward" or "is_backward".

    Returns:
        The results as nodes, and the last node inserted.
    """
    traced: GraphModule = aot.trace(function, [value(node) for node in inputs])
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
            with graph.inserting_after(cursor):
                cursor = env[node] = graph.node_copy(node, env.__getitem__)
            cursor.meta["partitioner_tag"] = phase
            # Annotations (memory-budget regions, streams) must cover what stands among them.
            if "custom" in after.meta:
                cursor.meta["custom"] = after.meta["custom"]
    raise AssertionError("a traced graph ends with an output")
