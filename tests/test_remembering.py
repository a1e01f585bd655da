"""Two graphs in place of one: which runs when, and what is remembered of which parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import pamm_compile
from pamm_compile import GradientSubspace
from pamm_compile.private import aot
from pamm_compile.report import GraphReport, memories

METHOD = GradientSubspace(8, every=3, warmup=1)
CARRYING = GradientSubspace(8, every=3, carry=0.5, warmup=1)
WIDTH = 32


class Block(nn.Module):
    """Attention and an MLP; the input of `o` stays saved for attention's own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape)).tanh()
        return x + self.down(nn.functional.gelu(self.up(x)))


def backend(**options: Any) -> pamm_compile.Backend:
    given: dict[str, Any] = {"rules": {"linear": METHOD}, "goal": "any", "min_tokens": 1}
    return pamm_compile.backend(**{"base": "aot_eager", **given, **options})


def batch(step: int) -> Tensor:
    return torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(step))


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], step: int) -> dict[str, Tensor]:
    model.zero_grad()
    x = batch(step).requires_grad_()
    call(x).square().sum().backward()
    assert x.grad is not None
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**named, "input": x.grad}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def restored(dw: Tensor, before: Tensor) -> Tensor:
    """The gradient that CARRYING makes of an exact one, and of the last whole one."""
    basis = CARRYING.remember([before])
    along = dw @ basis.T @ basis
    kept = before @ basis.T @ basis
    lost = (0.5 * (before - kept) / kept.norm()).bfloat16()
    return along + lost.float() * along.norm()


def weights(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is compressed of them."""
    kept = ("qkv.weight", "up.weight", "down.weight")
    return {name: each for name, each in of.items() if name.endswith(kept)}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


def test_every_third_pass_is_whole_and_those_between_are_along_the_last() -> None:
    model, used = Block(), backend()
    compiled = torch.compile(model, backend=used)
    basis: dict[str, Tensor] = {}
    for step in range(7):
        found, exact = gradients(model, compiled, step), gradients(model, model, step)
        for name, dw in weights(found).items():
            if step % 3 == 0:
                assert 0 < error(dw, exact[name]) < 0.02, (step, name)
                basis[name] = METHOD.remember([dw])
            else:
                wanted = exact[name] @ basis[name].T @ basis[name]
                assert error(dw, wanted) < 1e-4, (step, name)
                assert error(dw, exact[name]) > 0.1
        for name in found.keys() - weights(found).keys():
            assert torch.equal(found[name], exact[name]), (step, name)
    assert len(used.report.compressed) == 3
    assert all(site.method.startswith("r = 8, 1 of 3 in 8 bits") for site in used.report.compressed)


def test_passes_of_a_warm_up_are_all_whole_and_the_last_of_them_is_remembered() -> None:
    method = GradientSubspace(8, every=3, warmup=4)
    model = Block()
    compiled = torch.compile(model, backend=backend(rules={"linear": method}))
    whole: list[int] = []
    for step in range(10):
        found, exact = gradients(model, compiled, step), gradients(model, model, step)
        errors = [error(dw, exact[name]) for name, dw in weights(found).items()]
        if max(errors) < 0.02:
            whole.append(step)
            basis = {name: method.remember([dw]) for name, dw in weights(found).items()}
            continue
        for name, dw in weights(found).items():
            assert error(dw, exact[name] @ basis[name].T @ basis[name]) < 1e-4, (step, name)
    assert whole == [0, 1, 2, 3, 6, 9]


def test_the_output_is_exact_in_every_step() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend())
    for step in range(5):
        out = compiled(batch(step))
        assert torch.equal(out, model(batch(step)))
        out.sum().backward()


def test_blocks_that_share_code_remember_apart() -> None:
    model = nn.Sequential(Block(), Block())
    compiled = nn.Sequential(*(torch.compile(block, backend=backend()) for block in model))
    gradients(model, compiled, 0)
    exact, found = gradients(model, model, 0), gradients(model, compiled, 0)
    for name, dw in weights(found).items():
        # Of the very gradient that is remembered, little is lost; of another block's, nearly all.
        kept = exact[name] @ METHOD.remember([exact[name]]).T
        lost = 1 - float(kept.square().sum() / exact[name].square().sum())
        assert error(dw, exact[name]) ** 2 < lost + 0.02


def test_a_copy_begins_anew() -> None:
    model, used = Block(), backend()
    compiled = torch.compile(model, backend=used)
    for step in range(2):
        gradients(model, compiled, step)
    other = copy.deepcopy(model)
    found = gradients(other, torch.compile(other, backend=used), 5)
    exact = gradients(other, other, 5)
    assert max(error(dw, exact[name]) for name, dw in weights(found).items()) < 0.02


def test_gradients_that_are_not_finite_are_not_remembered() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend())
    first, *_ = [gradients(model, compiled, step) for step in range(3)]
    model.zero_grad()
    (compiled(batch(3).requires_grad_()) * float("inf")).sum().backward()
    assert not bool(model.up.weight.grad.isfinite().all())  # type: ignore[union-attr]
    found, exact = gradients(model, compiled, 4), gradients(model, model, 4)
    basis = METHOD.remember([first["up.weight"]])
    wanted = exact["up.weight"] @ basis.T @ basis
    assert error(found["up.weight"], wanted) < 1e-3


def test_a_block_that_is_recomputed_from_outside_runs_the_same_graph_twice() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend())

    def call(x: Tensor) -> Tensor:
        return checkpoint(compiled, x, use_reentrant=False)  # type: ignore[no-any-return]

    for step in range(5):
        found, exact = gradients(model, call, step), gradients(model, model, step)
        assert (error(found["up.weight"], exact["up.weight"]) < 0.02) == (step % 3 == 0)


def test_a_weight_that_two_sites_share_is_remembered_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x[:2]) * 2 + self.block(x[2:]).tanh()

    model, used = Twice(), backend(rules={"linear": CARRYING})
    compiled = torch.compile(model, backend=used)
    first = gradients(model, compiled, 0)
    found, exact = gradients(model, compiled, 1), gradients(model, model, 1)
    for name, dw in weights(found).items():
        assert error(dw, restored(exact[name], first[name])) < 1e-3
    assert len(memories(GraphReport(tuple(used.report.compressed)))) == 3


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_what_the_directions_lose_is_added_from_the_last_whole_gradient(scale: float) -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend(rules={"linear": CARRYING}))
    before = {name: dw.clone() for name, dw in gradients(model, compiled, 0).items()}
    for step in (1, 2):
        # As a scaler of losses does between two steps.
        found = gradients(model, lambda x: compiled(x) * scale, step)
        exact = gradients(model, lambda x: model(x) * scale, step)
        for name, dw in weights(found).items():
            assert error(dw, restored(exact[name], before[name])) < 1e-3, (step, name)
        for name in found.keys() - weights(found).keys():
            assert torch.equal(found[name], exact[name]), (step, name)


def test_each_of_several_passes_before_a_step_is_restored() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend(rules={"linear": CARRYING}))
    before = gradients(model, compiled, 0)["up.weight"]
    exact = [gradients(model, model, number)["up.weight"] for number in (1, 2)]
    model.zero_grad()
    for number in (1, 2):
        compiled(batch(number).requires_grad_()).square().sum().backward()
    wanted = restored(exact[0], before) + restored(exact[1], before)
    assert model.up.weight.grad is not None
    assert error(model.up.weight.grad, wanted) < 1e-3


def test_gradients_that_others_make_are_left_alone() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend(rules={"linear": CARRYING}))
    exact = gradients(model, model, 1)
    gradients(model, compiled, 0)
    for name, dw in gradients(model, model, 1).items():
        assert torch.equal(dw, exact[name]), name


def test_a_sum_over_two_graphs_is_restored_once() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend(rules={"linear": CARRYING}), dynamic=False)

    def both(x: Tensor) -> Tensor:
        return torch.cat([compiled(x[:3]), compiled(x[3:])])

    before = gradients(model, both, 0)
    found, exact = gradients(model, both, 1), gradients(model, model, 1)
    for name, dw in weights(found).items():
        assert error(dw, restored(exact[name], before[name])) < 1e-3, name


class Scaled(nn.Module):
    """A linear layer whose weight is made in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.block(x), self.weight * 2).tanh()


def test_a_weight_that_is_computed_is_whole_in_every_step() -> None:
    model = Scaled()
    compiled = torch.compile(model, backend=backend())
    for step in range(2):
        found, exact = gradients(model, compiled, step), gradients(model, model, step)
    assert error(found["weight"], exact["weight"]) < 0.02
    assert error(found["block.up.weight"], exact["block.up.weight"]) > 0.1


def test_a_transposed_square_weight_is_told_from_its_transpose() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.block(x) @ self.weight).tanh()

    model = Columns()
    compiled = torch.compile(model, backend=backend(rules={"linear": CARRYING}))
    first = gradients(model, compiled, 0)
    found, exact = gradients(model, compiled, 1), gradients(model, model, 1)
    assert error(found["weight"].T, restored(exact["weight"].T, first["weight"].T)) < 1e-3


def test_passes_of_others_are_not_counted() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend())
    gradients(model, compiled, 0)
    for step in range(5):
        gradients(model, model, step)
    found, exact = gradients(model, compiled, 1), gradients(model, model, 1)
    assert error(found["up.weight"], exact["up.weight"]) > 0.1


def test_a_graph_without_inputs_runs() -> None:
    compiled = torch.compile(lambda: torch.ones(3) * 2, backend=backend())
    assert torch.equal(compiled(), torch.full((3,), 2.0))


def test_a_graph_of_more_inputs_keeps_what_dynamo_knows() -> None:
    seen: list[tuple[GraphModule, GraphModule]] = []

    def look(gm: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append((gm, aot.with_further_inputs(gm, [torch.zeros(2, 3)])))
        return gm.forward

    torch.compile(Block(), backend=look)(batch(0))
    ((gm, wider),) = seen
    assert "_param_name_to_source" in vars(gm)
    assert vars(gm).keys() <= vars(wider).keys()
    places, more = (g.graph.find_nodes(op="placeholder") for g in (gm, wider))
    assert [each._dynamo_source for each in more] == [*(p._dynamo_source for p in places), None]


def test_without_gradients_the_graph_is_left_alone() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend())
    with torch.no_grad():
        assert torch.equal(compiled(batch(0)), model(batch(0)))


def test_reports_travel_as_json() -> None:
    model, used = Block(), backend()
    gradients(model, torch.compile(model, backend=used), 0)
    (graph,) = (each for each in used.report.graphs if each.training)
    assert GraphReport.from_dict(graph.to_dict()) == graph
    assert len(memories(graph)) == 3


def test_sizes_may_vary() -> None:
    model, used = Block(), backend()
    compiled = torch.compile(model, backend=used, dynamic=True)
    for count in (4, 3, 2):
        made = []
        for call in (compiled, model):
            model.zero_grad()
            call(batch(count)[:count].clone().requires_grad_()).square().sum().backward()
            assert model.up.weight.grad is not None
            made.append(model.up.weight.grad.clone())
        if count == 4:
            basis = METHOD.remember([made[0]])
        else:
            assert error(made[0], made[1] @ basis.T @ basis) < 1e-3
    assert len(used.report.graphs) == 1


def test_generated_code_remembers() -> None:
    model = Block()
    compiled = torch.compile(model, backend=backend(base="inductor"))
    first = gradients(model, compiled, 0)
    found, exact = gradients(model, compiled, 1), gradients(model, model, 1)
    for name, dw in weights(found).items():
        basis = METHOD.remember([first[name]])
        assert error(dw, exact[name] @ basis.T @ basis) < 1e-3


@pytest.mark.everything
def test_a_graph_from_a_cache_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Block()
    for seed in (5, 5):
        torch.compiler.reset()
        used = backend(base="inductor", seed=seed)
        used.report.clear()
        compiled = torch.compile(model, backend=used)
        whole, along = (gradients(model, compiled, step) for step in range(2))
        exact = gradients(model, model, 1)
        for name, dw in weights(along).items():
            basis = METHOD.remember([whole[name]])
            assert error(dw, exact[name] @ basis.T @ basis) < 1e-3
        assert len(used.report.compressed) == 3
