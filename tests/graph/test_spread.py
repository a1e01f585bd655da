"""How far a value's elements spread over what is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from pamm_compile.graph.spread import Spread, spread

CASES: dict[str, tuple[tuple[int, ...], Spread, Any, Spread]] = {
    "transposed": ((2, 3, 4), (False, True, False), lambda x: x.mT, (False, False, True)),
    "permuted": ((2, 3, 4), (False, True, True), lambda x: x.permute(1, 2, 0), (True, True, False)),
    "split": ((6, 4), (True, False), lambda x: x.view(2, 3, 4), (True, True, False)),
    "merged": ((2, 3, 4), (True, False, False), lambda x: x.view(6, 4), (True, False)),
    "regrouped": ((6, 8), (False, True), lambda x: x.view(12, 4), (True, True)),
    "ones": ((2, 1, 4), (False, False, True), lambda x: x.view(2, 4, 1), (False, True, False)),
    "broadcast": ((3, 4), (True, False), lambda x: x + x.new_ones(2, 3, 4), (False, True, False)),
    "summed": ((2, 3, 4), (False, True, True), lambda x: x.sum(1), (False, True)),
    "kept": ((2, 3, 4), (False, True, True), lambda x: x.mean(1, True), (False, False, True)),
    "softmax": ((3, 4), (False, True), lambda x: x.softmax(0), (False, True)),
    "one of": ((3, 4), (False, True), lambda x: x[1], (True,)),
    "joined": ((3, 4), (False, True), lambda x: torch.cat([x, x]), (True, True)),
    "unknown": ((3, 4), (False, True), lambda x: x.cumprod(0).sort(0)[0], (True, True)),
}  # fmt: skip


@pytest.mark.parametrize("how", CASES)
def test_spread(how: str) -> None:
    shape, given, function, wanted = CASES[how]
    graph = make_fx(function, tracing_mode="fake")(torch.ones(shape)).graph
    marks: dict[Node, Spread] = {}
    last = None
    for node in graph.nodes:
        if node.op == "placeholder":
            marks[node] = given
        elif node.op == "call_function" and any(s in marks for s in node.all_input_nodes):
            source = next(s for s in node.all_input_nodes if s in marks)
            marks[node] = spread(node, source, marks[source])
            last = node
    assert last is not None
    assert isinstance(last.meta["val"], Tensor)
    assert marks[last] == wanted
