"""Train small models for many steps of ever other shapes, and watch memory.

    python tests/pamm_testing/soak.py --steps 2000
    python tests/pamm_testing/soak.py --steps 2000 --reset
    python tests/pamm_testing/soak.py --steps 2000 --reset --no-code

Prints one JSON line per round. Every model is compiled for one shape and then, once a second comes,
for all; with --reset a round ends with `torch._dynamo.reset()`, and the next does so again;
with --no-code Inductor partitions its graphs, and runs them operator by operator.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.fx import Graph, GraphModule

# Not this folder, whose triton is no library.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parents[1]))


import pamm_compile
from pamm_compile.graph.joint import JointGraph
from pamm_compile.graph.pipeline import Pipeline
from pamm_compile.recorded import RecordedReport
from pamm_compile.sites.projections import Site
from pamm_testing.forms import Attention, EinsumHeads, FusedQKV, _sdpa
from pamm_testing.no_code import no_code
from pamm_testing.zoo import WIDTH

WATCHED = (
    GraphModule,
    Graph,
    JointGraph,
    Pipeline,
    Site,
    RecordedReport,
    pamm_compile.GraphReport,
)

Arm = tuple[nn.Module, Any, torch.optim.Optimizer]


def arms(*, exact: bool) -> list[Arm]:
    """Return models with their backends; every fourth step is one of full Inductor."""
    eager: dict[str, Any] = {"base": "aot_eager", "min_tokens": 1}
    chosen = [
        (
            Attention(_sdpa(is_causal=True, enable_gqa=True), kv_heads=2, bias=True),
            {"ratio": 4, **eager},
        ),
        (FusedQKV(), {"ratio": 8, "epsilon": 0.5, "sampling": "uniform", **eager}),
        (EinsumHeads(), {"ratio": 16, "min_generators": 4, **eager}),
        (FusedQKV(), {"ratio": 8, "min_tokens": 1}),
    ]
    found = []
    for model, options in chosen:
        backend: Any = pamm_compile.backend(**options)
        if exact:
            backend = options.get("base", "inductor")
        found.append((model, backend, torch.optim.SGD(model.parameters(), lr=1e-3)))
    return found


def train(arm: Arm, call: Callable[..., Any], rng: random.Random) -> float:
    """Run one step of a random shape; return the loss."""
    optimizer = arm[2]
    x = torch.randn(rng.randint(2, 6), rng.randint(8, 48), WIDTH)
    optimizer.zero_grad(set_to_none=True)
    loss = call(x).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def alive() -> dict[str, int]:
    """Count the watched objects that a full collection leaves."""
    gc.collect()
    counts = Counter(type(each) for each in gc.get_objects())
    return {kind.__name__: counts[kind] for kind in WATCHED}


def soak(steps: int, rounds: int, *, reset: bool, exact: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng, process, trained = random.Random(0), psutil.Process(), arms(exact=exact)
    calls: list[Callable[..., Any]] = []
    for number in range(rounds):
        calls = calls or [torch.compile(model, backend=backend) for model, backend, _ in trained]
        losses = []
        for step in range(steps // rounds):
            which = step % len(trained)
            losses.append(train(trained[which], calls[which], rng))
        assert all(loss == loss and loss < 1e6 for loss in losses), "training diverged"
        if reset:
            calls = []
            torch._dynamo.reset()
        counts = alive()
        reported = 0 if exact else sum(len(backend.report.graphs) for _, backend, _ in trained)
        line = {
            "steps": (number + 1) * (steps // rounds),
            "rss_mib": round(process.memory_info().rss / 2**20, 1),
            "alive": counts,
            "reported": reported,
            "loss": sum(losses) / len(losses),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10, help="lines to print")
    parser.add_argument("--reset", action="store_true", help="compile anew in every round")
    parser.add_argument("--exact", action="store_true", help="without PAMM, to compare with")
    parser.add_argument("--no-code", action="store_true", help="let Inductor generate none")
    args = parser.parse_args()
    with no_code() if args.no_code else contextlib.nullcontext():
        soak(args.steps, args.rounds, reset=args.reset, exact=args.exact)


if __name__ == "__main__":
    main()
