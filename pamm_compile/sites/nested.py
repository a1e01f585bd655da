"""Weights that a graph hands to a region inside it, such as torch.cond's: nothing there is ours."""

from __future__ import annotations

from pamm_compile.graph.chains import value
from pamm_compile.graph.dynamo import nested_graphs
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.operands import Operands
from pamm_compile.graph.vocabulary import op_name
from pamm_compile.sites.reasons import Decline, Reason


def nested_declines(joint: JointGraph) -> list[Decline]:
    """Return one decline for every weight with a gradient that a nested region multiplies by.

    Args:
        joint: the graph around the regions.

    Returns:
        Declines in graph order, each naming a weight and the operator that holds the region.
    """
    found: dict[Decline, None] = {}
    operands = Operands(joint)
    for node in joint.nodes:
        if node in joint.backward or not nested_graphs(node):
            continue
        for operand in node.all_input_nodes:
            for weight in operands.parameters(operand):
                # Vectors are biases, or belong to norms.
                if weight.gradient is not None and value(weight.node).dim() >= 2:
                    found[Decline(Reason.NESTED_REGION, weight.name, op_name(node))] = None
    return list(found)
