"""Reading the graph that Dynamo hands to a backend: what it holds beside plain operations."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from pamm_compile.private import aot

# Traced into the graph around them by AOTAutograd, or into a kernel by Inductor. All other
# operators that take graphs have theirs compiled apart.
_INLINED = {
    "autograd_function_apply", "flex_attention", "tag_activation_checkpoint", "wrap",
    "wrap_activation_checkpoint", "wrap_with_autocast", "wrap_with_set_grad_enabled",
}  # fmt: skip

_GRADIENTS = {"_grad_increment_nesting", "grad", "backward"}
_OF_AUTOGRAD = ("torch.autograd", "torch._C._functorch", "torch._functorch")


def nested_graphs(node: Node) -> list[str]:
    """Return the names of the graphs that an operator takes and that are compiled on their own."""
    if not isinstance(node.target, aot.HigherOrderOperator) or node.target.name() in _INLINED:
        return []
    return [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]


def has_nested_graphs(gm: GraphModule) -> bool:
    """Tell whether a graph holds regions that are compiled on their own, as torch.cond's are."""
    return any(nested_graphs(node) for node in _nodes(gm))


def differentiates(gm: GraphModule) -> bool:
    """Tell whether a graph computes gradients itself, as torch.func.grad in it does."""
    return any(
        node.op == "call_function"
        and getattr(node.target, "__name__", "") in _GRADIENTS
        and str(getattr(node.target, "__module__", "")).startswith(_OF_AUTOGRAD)
        for node in _nodes(gm)
    )


def _nodes(gm: GraphModule) -> Iterator[Node]:
    for part in gm.modules():
        if isinstance(part, GraphModule):
            yield from part.graph.nodes
