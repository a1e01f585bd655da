"""What a batch gets does not depend on the batches before it; what nobody knows stays exact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pamm_compile

N = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv = nn.LayerNorm(N), nn.Linear(N, 3 * N)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


def _backend(**more: Any) -> pamm_compile.Backend:
    backend = pamm_compile.backend(**{"ratio": 16, "base": "aot_eager", **more})
    backend.report.clear()
    return backend


def _gradient(model: nn.Module, call: Any, x: Tensor) -> Tensor:
    model.zero_grad()
    call(x).square().mean().backward()
    return model.qkv.weight.grad.clone()  # type: ignore[union-attr, operator]


def _is_exact(model: nn.Module, call: Any, x: Tensor) -> bool:
    return torch.allclose(_gradient(model, call, x), _gradient(model, model, x), atol=1e-6)


@pytest.mark.parametrize("lengths", [(64, 72, 300), (150, 128, 127)])
def test_min_tokens_holds_for_every_batch(lengths: tuple[int, ...]) -> None:
    model, backend = Attention(), _backend(min_tokens=256)
    compiled = torch.compile(model, backend=backend)
    for length in lengths:
        assert _is_exact(model, compiled, torch.randn(2, length, N)) == (2 * length < 256)


def test_short_and_long_batches_take_one_graph_each() -> None:
    model, backend = Attention(), _backend(min_tokens=256)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for length in (64, 300, 72, 310):
        compiled(torch.randn(2, length, N))
    assert [len(graph.sites) for graph in backend.report.graphs] == [1, 1]
    assert [len(graph.compressed) for graph in map(_report, backend.report.graphs)] == [0, 1]


def _report(graph: pamm_compile.GraphReport) -> pamm_compile.Report:
    return pamm_compile.Report([graph])


def test_what_saves_nothing_is_decided_for_every_batch() -> None:
    """64 rows of 32 floats are stored from 20 rows on, with more bytes than X up to some length."""
    model = Attention()
    seen = {}
    for lengths in ((20, 400), (400, 20)):
        torch._dynamo.reset()
        backend = _backend(min_tokens=1, ratio=256, min_generators=64)
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for length in lengths:
            exact = _is_exact(model, compiled, torch.randn(2, length, N))
            assert seen.setdefault(length, exact) == exact
    assert seen[20]
    assert not seen[400]


def test_one_generator_and_several_are_compiled_apart() -> None:
    model, backend = Attention(), _backend(min_tokens=1, ratio=256)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for tokens in (600, 200, 700, 256):
        gradient = _gradient(model, compiled, torch.randn(2, tokens // 2, N))
        rank = torch.linalg.matrix_rank(gradient.double(), rtol=1e-5).item()
        assert rank == -(-tokens // 256)


def test_a_batch_of_one_matrix_and_of_several() -> None:
    """Batched matmuls are taken for matmuls where the batch is one, whatever came before."""

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q = nn.LayerNorm(N), nn.Parameter(torch.randn(1, N, N) / 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            q = torch.bmm(x, self.q.expand(len(x), -1, -1)).unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q)

    for batches in ((1, 2), (3, 1)):
        torch._dynamo.reset()
        model, backend = Batched(), _backend(min_tokens=1)
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for batch in batches:
            x = torch.randn(batch, 64, N)
            for call in (compiled, model):
                model.zero_grad()
                call(x).square().mean().backward()
                assert model.q.grad is not None
                assert model.q.grad.isfinite().all()
        seen = {graph.sites[0].reason for graph in backend.report.graphs if graph.sites}
        assert None in seen or seen == set()


_PROCESS = """
import json, sys
import torch
from torch._dynamo.utils import counters
import pamm_compile
from test_symbolic_sizes import Attention, _is_exact
model = Attention()
backend = pamm_compile.backend(ratio=16, min_tokens=256)
compiled = torch.compile(model, backend=backend, dynamic=True)
exact = {n: _is_exact(model, compiled, torch.randn(2, n // 2, 32)) for n in json.loads(sys.argv[1])}
kept = [[s.compressed for s in g.sites] for g in backend.report.graphs]
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps({"exact": exact, "report": kept, "hits": hits}))
"""


@pytest.mark.slow
@pytest.mark.everything
def test_min_tokens_holds_where_caches_answer(tmp_path: Path) -> None:
    """With Inductor, and in a second process that finds both graphs in caches, in the other order.

    The report, too, is that of the graph that was found.
    """

    # What one process runs must be what the next does, whatever is edited meanwhile.
    shutil.copytree(Path(pamm_compile.__file__).parent, tmp_path / "package" / "pamm_compile")

    def run(lengths: list[int]) -> dict[str, Any]:
        paths = [str(Path(__file__).parent), str(tmp_path / "package")]
        done = subprocess.run(
            [sys.executable, "-c", _PROCESS, json.dumps(lengths)],
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    first = run([128, 600])
    assert first == {
        "exact": {"128": True, "600": False}, "report": [[False], [True]], "hits": 0,
    }  # fmt: skip
    again = run([700, 130])
    assert again == {
        "exact": {"700": False, "130": True}, "report": [[True], [False]], "hits": 2,
    }  # fmt: skip


class Unpadded(Attention):
    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        n = length.item()
        torch._check(n >= 2)
        torch._check(n <= x.shape[0])
        return super().forward(x[:n][None])


class Experts(nn.Module):
    """A mixture of experts: each gets the rows that chose it, of a number nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.router = nn.Linear(N, 2)
        self.experts = nn.ModuleList(nn.Linear(N, N) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x).flatten(0, 1)
        rows = x.flatten(0, 1)
        chosen = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (own,) = torch.nonzero(chosen == number, as_tuple=True)
            out = out.index_add(0, own, F.gelu(expert(rows[own])))
        return out


def _check_exact_but(model: nn.Module, backend: Any, names: set[str], *inputs: Tensor) -> None:
    grads = []
    for each in ("aot_eager", backend):
        torch._dynamo.reset()
        model.zero_grad()
        torch.compile(model, backend=each, fullgraph=True)(*inputs).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, exact in grads[0].items():
        if exact is not None:
            assert torch.equal(exact, grads[1][name]) == (name not in names), name


def test_tokens_of_a_number_that_the_data_decide() -> None:
    model, backend = Unpadded(), _backend(min_tokens=1)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        _check_exact_but(model, backend, set(), torch.randn(512, N), torch.tensor(300))
    (site,) = backend.report.sites
    assert (site.reason, site.shape) == ("UNKNOWN_TOKENS", (0, N))
    assert f"? × {N}" in str(backend.report)


def test_a_mixture_of_experts_keeps_its_experts_exact() -> None:
    model, backend = Experts(), _backend(min_tokens=1, targets="linear")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _check_exact_but(model, backend, {"attention.qkv.weight"}, torch.randn(4, 64, N))
    reasons = {n: site.reason for site in backend.report.declined for n in site.parameters}
    assert reasons["experts.0.weight"] == reasons["experts.1.weight"] == "UNKNOWN_TOKENS"


def test_sizes_marked_unbacked() -> None:
    backend = _backend(min_tokens=1)
    x = torch.randn(8, 64, N)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    torch.compile(Attention(), backend=backend)(x).sum().backward()
    assert [site.reason for site in backend.report.sites] == ["UNKNOWN_TOKENS"]
