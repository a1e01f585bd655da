"""Reading joint graphs: chains, transposes, phases, and which gradient belongs to which weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from pamm_compile.graph.chains import chain_of, is_transpose, matmul_operands, strip_transposes
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.operands import Operands
from pamm_compile.graph.vocabulary import op_name
from pamm_compile.names import names_of
from pamm_compile.private import aot


def _trace(function: Callable[..., Tensor], *fakes: Tensor) -> list[Node]:
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = [mode.from_tensor(t) for t in fakes]
    traced = aot.make_fx(function)(*inputs)
    return list(traced.graph.nodes)


def _last(nodes: list[Node]) -> Node:
    (result,) = nodes[-1].all_input_nodes
    return result


def test_a_chain_ends_where_values_are_made() -> None:
    nodes = _trace(lambda x: x.sin().view(6, 4).t().to(torch.float64).clone(), torch.ones(2, 3, 4))
    chain = chain_of(_last(nodes))
    assert op_name(chain.base) == "aten::sin"
    assert [step[0] for step in chain.steps][:2] == ["aten::view", "aten::t"]


def test_chains_tell_apart_what_differs_in_order_or_dtype() -> None:
    x = torch.ones(2, 3, 4)
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.view(6, 4),
        lambda x: x.transpose(0, 1).reshape(6, 4),
        lambda x: x.view(6, 4).to(torch.bfloat16),
    ]
    steps = [chain_of(_last(_trace(form, x))).steps for form in forms]
    assert len(set(steps)) == 3
    assert steps[0] == chain_of(_last(_trace(lambda x: x.detach().view(6, 4), x))).steps


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (lambda x: x.t(), True),
        (lambda x: x.permute(1, 0), True),
        (lambda x: x.transpose(-1, -2), True),
        (lambda x: x.permute(0, 1), False),
        (lambda x: x.view(4, 3), False),
    ],
)
def test_transposes_of_matrices(form: Callable[[Tensor], Tensor], expected: bool) -> None:
    assert is_transpose(_last(_trace(form, torch.ones(3, 4)))) == expected


def test_a_permutation_that_moves_the_batch_is_no_transpose() -> None:
    x = torch.ones(2, 3, 4)
    assert is_transpose(_last(_trace(lambda x: x.permute(0, 2, 1), x)))
    assert not is_transpose(_last(_trace(lambda x: x.permute(1, 0, 2), x)))


def test_strip_transposes_counts_them() -> None:
    x = torch.ones(3, 4)
    node, odd = strip_transposes(_last(_trace(lambda x: x.sin().t().t().t(), x)))
    assert op_name(node) == "aten::sin"
    assert odd


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.frozen(self.first(x).relu()).relu())


def _joint(model: nn.Module, *inputs: Tensor) -> JointGraph:
    found: list[JointGraph] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        def partition(joint: torch.fx.GraphModule, *args: object, **kwargs: object) -> object:
            found.append(JointGraph(joint.graph, names_of(gm).by_key))
            return aot.min_cut_rematerialization_partition(joint, *args, **kwargs)

        compiler = aot.aot_autograd(
            fw_compiler=aot.boxed_nop,
            bw_compiler=aot.boxed_nop,
            decompositions=aot.select_decomp_table(),
            partition_fn=partition,
        )
        return compiler(gm, example_inputs)

    torch.compile(model, backend=backend)(*inputs)
    (joint,) = found
    assert JointGraph.is_joint(joint.graph)
    return joint


def test_parameters_are_paired_with_their_gradients() -> None:
    joint = _joint(_Model(), torch.randn(5, 4))
    parameters = {p.name: p for p in joint.parameters.values()}
    assert set(parameters) == {"first.weight", "second.weight", "frozen.weight"}
    assert parameters["frozen.weight"].gradient is None
    for name in ("first.weight", "second.weight"):
        (matmul,) = joint.gradient_matmuls(parameters[name])
        assert matmul in joint.backward
    assert joint.gradient_matmuls(parameters["frozen.weight"]) == []


def test_the_input_of_a_layer_is_read_by_its_own_weight_gradient() -> None:
    joint = _joint(_Model(), torch.randn(5, 4))
    second = next(p for p in joint.parameters.values() if p.name == "second.weight")
    operands = Operands(joint)
    forward = next(
        node
        for node in joint.nodes
        if op_name(node) == "aten::mm"
        and node not in joint.backward
        and operands.parameters(matmul_operands(node)[1]) == (second,)
    )
    _, readers = joint.readers(chain_of(matmul_operands(forward)[0]).base)
    assert set(joint.gradient_matmuls(second)) <= readers
    # relu's own gradient looks at its output too.
    assert len(readers) > 1


def test_equal_calls_are_one_value_unless_random() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            equal = [(x * self.weight).view(2, 10) for _ in range(2)]
            other = [x * 1, x * 1.0, torch.rand_like(x), torch.rand_like(x)]
            return torch.cat([*equal, *(o.view(2, 10) for o in other)]).sin() * self.weight.sum()

    joint = _joint(Twice(), torch.randn(5, 4))
    (cat,) = (n for n in joint.nodes if op_name(n) == "aten::cat")
    bases = [joint.chain_of(node).base for node in cat.all_input_nodes]
    plain = [chain_of(node).base for node in cat.all_input_nodes]
    assert len(set(plain)) == 6
    assert bases == [plain[0], plain[0], *plain[2:]]
    for base in plain[:2]:
        assert set(plain[:2]) <= joint.readers(base)[0]


def test_an_inference_graph_is_not_joint() -> None:
    traced = aot.make_fx(lambda x: x @ x)(torch.randn(3, 3))
    assert not JointGraph.is_joint(traced.graph)
