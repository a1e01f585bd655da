"""Threads that make backends, compile and read reports at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pamm_testing.forms import Attention, FusedQKV, _sdpa
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import nn

import pamm_compile
from pamm_compile import torch_backend
from pamm_compile.report import GraphReport, Report

_SECONDS = 120
"""After which a thread waits for no other, so that a failure is told."""


def _at_once(*functions: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [each.result() for each in [pool.submit(function) for function in functions]]


def _backend() -> pamm_compile.Backend:
    return pamm_compile.backend(ratio=4, min_tokens=1, base="aot_eager")


class Meeting(nn.Module):
    """Two blocks; no graph is compiled before every thread is in the midst of a forward pass."""

    def __init__(self, barrier: threading.Barrier, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self._barrier = barrier

    @torch.compiler.disable
    def meet(self) -> None:
        self._barrier.wait(_SECONDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meet()
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_models_compiled_by_two_threads_have_their_own_reports() -> None:
    barrier = threading.Barrier(2)
    models = [
        Meeting(barrier, Attention(_sdpa()), FusedQKV()),
        Meeting(barrier, FusedQKV(), Attention(_sdpa())),
    ]
    # Equal ones, whose reports tell models apart by who runs what.
    backends = [_backend() for _ in models]

    def train(model: nn.Module, backend: pamm_compile.Backend) -> Callable[[], None]:
        compiled = torch.compile(model, backend=backend)
        x = torch.randn(BATCH, LENGTH, WIDTH)
        return lambda: compiled(x).sum().backward()

    _at_once(*map(train, models, backends))
    three = tuple(f"{p}.weight" for p in "qkv")
    assert [[site.parameters for site in b.report.compressed] for b in backends] == [
        [tuple(f"first.{n}" for n in three), ("second.c_attn.weight",)],
        [("first.c_attn.weight",), tuple(f"second.{n}" for n in three)],
    ]


class Slow(Counter[str]):
    """Lets other threads run between the reading of a number and the writing of the next."""

    def __missing__(self, key: object) -> int:
        time.sleep(0.05)
        return 0


def test_equal_backends_made_by_two_threads_know_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_backend, "_made", Slow())
    backends = _at_once(_backend, _backend)
    model, x = Attention(_sdpa()), torch.randn(BATCH, LENGTH, WIDTH)
    for backend in backends:
        torch.compile(model, backend=backend)(x).sum().backward()
    first, second = (backend.report.graphs for backend in backends)
    assert first == second
    assert len(first) == 1


def test_a_name_stands_for_one_backend_in_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(pamm_compile.Backend):
        def __init__(self, *args: Any) -> None:
            time.sleep(0.05)
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(torch_backend, "Backend", Counted)
    one, other = _at_once(*[lambda: pamm_compile.by_name({"pamm.seed": 2718})] * 2)
    assert one is other
    # A second one, though nobody had it, would have every call look for who is in use.
    assert made == [one]


def test_a_report_is_read_while_another_thread_adds_to_it() -> None:
    report = Report()

    def adding() -> Iterator[Any]:
        report.add(GraphReport())
        yield from ()

    class Adding(SimpleNamespace):
        @property
        def sites(self) -> Iterator[Any]:
            return adding()

        notes = sites

        def to_dict(self) -> dict[str, Any]:
            return {"sites": list(self.sites)}

    graph: Any = Adding(training=True, state=None)
    report.add(graph)
    report.add(graph)
    assert report.sites == report.notes == ()
    assert report.to_dict()["graphs"][:2] == [{"sites": []}] * 2
    assert "0 of 0 sites" in report.text()
