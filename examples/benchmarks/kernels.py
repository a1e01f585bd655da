"""Time the GPU kernels of PAMM against the exact weight gradients that they replace.

    python examples/benchmarks/kernels.py --json results.json        # a GPU; minutes
    python examples/benchmarks/kernels.py --tiles                    # every tile, not the first
    python examples/benchmarks/kernels.py --device cpu --smoke       # seconds; shows that it runs

At the shapes of LLaMA's attention projections: the time of pamm::assign (with the norms of the
generators), of pamm::contract over dQ, dK and dV, of the matmul that finishes dW, and of the three
exact dW by the vendor's library. Inputs rotate through more memory than the cache holds. "share" is
bytes that must move, over time, over the bandwidth of a large copy on the same device.

With --tiles each cell is also timed with every tile size that max-autotune would try, and the
contraction with the tokens sorted by generator and not. Every cell is written to --json when it is
done; one that fails is written with its error, and the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from examples.benchmarks import cli, machine, tables
from examples.benchmarks.models import SHAPES
from examples.benchmarks.timing import seconds
from pamm_compile import devices
from pamm_compile.methods.pamm import assign, contract, index_dtype
from pamm_compile.methods.pamm import triton as lowering
from pamm_compile.methods.pamm.triton import model as time_model
from pamm_compile.methods.pamm.triton import plan as tile_plan
from pamm_compile.size import Size

TINY = ("tiny", 512, 16)
WIDTHS = {name: shape.width for name, shape in SHAPES.items()} | {"tiny": 64}
_REPLAYS = 16


class Clock:
    """Times kernels on one device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device = torch.device(device)
        self.repeats = repeats

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Compile for the device; on a CPU, where this is only tried, generate no code."""
        torch._dynamo.reset()
        base = "inductor" if self.is_gpu else "aot_eager"
        return torch.compile(call, backend=base, dynamic=False)

    def kernel(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Median seconds of one of several equivalent calls, launch cost left out where possible.

        On a GPU the calls are captured into one CUDA graph, so that what is timed is the kernels.
        """
        for call in calls:
            call()
        if not self.is_gpu:
            return statistics.median(
                seconds(call, self.device) for _ in range(self.repeats) for call in calls
            )
        torch.cuda.synchronize()
        graph, rounds = torch.cuda.CUDAGraph(), max(1, _REPLAYS // len(calls))
        with torch.cuda.graph(graph):
            for _, call in itertools.product(range(rounds), calls):
                call()
        graph.replay()
        times = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / (rounds * len(calls)))
        return statistics.median(times)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written, of a large copy."""
    size = 1 << (30 if clock.is_gpu else 24)
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.kernel([lambda: target.copy_(source)])


def sets_needed(read: int, cache: int, most: int = 16) -> int:
    """Return how many equal inputs to rotate through, so that each has left the cache when read.

    Args:
        read: bytes that the timed kernel reads of one input. Of what it does not read nothing
            counts: it would not push anything out of the cache.
        cache: bytes that the cache holds.
        most: at most so many.
    """
    return max(1, min(most, 1 + 2 * cache // read))


@dataclasses.dataclass
class Cell:
    """The times of one site's kernels, in seconds."""

    model: str
    tokens: int
    generators: int
    width: int
    dtype: str
    assign: float
    contract: float
    finish: float
    exact: float
    assign_share: float
    contract_share: float
    predicted: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the package's model of the time says of each kernel, where it knows the device."""
    tiles: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
    """Seconds by kernel and tile, where they were asked for; none of a tile that failed."""


class Site:
    """Inputs of one site's kernels, and the kernels as Inductor compiles them."""

    def __init__(self, model: str, tokens: int, k: int, dtype: torch.dtype, clock: Clock) -> None:
        self.model, self.tokens, self.k, self.dtype, self.clock = model, tokens, k, dtype, clock
        self.n = WIDTHS[model]
        self.cache = 1 << 16
        if clock.is_gpu:
            self.cache = torch.cuda.get_device_properties(clock.device).L2_cache_size
        rows = torch.arange(k, device=clock.device) * tokens // k
        size = tokens * self.n * dtype.itemsize
        # Three gradients are wider than X: that many inputs do for both kernels.
        count = sets_needed(size, self.cache)
        self.x = [self._input() for _ in range(count)]
        self.c = [x[rows] for x in self.x]
        wide = sets_needed(3 * size, self.cache)
        self.grads = [
            torch.randn(tokens, 3 * self.n, device=clock.device, dtype=dtype) for _ in range(wide)
        ]

    def _input(self) -> Tensor:
        # A few directions and noise, so that assignments are as uneven as real ones.
        given = {"device": self.clock.device}
        base = torch.randn(32, self.n, dtype=self.dtype, **given)
        pick = (torch.rand(self.tokens, **given) ** 2 * 32).long()
        noise = torch.randn(self.tokens, self.n, dtype=self.dtype, **given)
        return base[pick] + 0.3 * noise

    def compile_assign(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        k = self.k

        def forward(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            index, scale, _ = assign(x, c, index_dtype(k))
            return index, scale

        return self.clock.compiled(forward)

    def compile_contract(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        k, n = self.k, self.n

        def backward(index: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
            return contract(index, scale, list(grad.split(n, dim=1)), k)

        return self.clock.compiled(backward)

    def time_assign(self) -> float:
        call = self.compile_assign()
        return self.clock.kernel(
            [lambda x=x, c=c: call(x, c) for x, c in zip(self.x, self.c, strict=True)]
        )

    def codes(self) -> list[tuple[Tensor, Tensor]]:
        call = self.compile_assign()
        return [call(self.x[i % len(self.x)], self.c[i % len(self.c)]) for i in self._wide()]

    def _wide(self) -> range:
        return range(len(self.grads))

    def time_contract(self, codes: Sequence[tuple[Tensor, Tensor]]) -> float:
        call = self.compile_contract()
        return self.clock.kernel(
            [
                lambda f=f, a=a, g=g: call(f, a, g)
                for (f, a), g in zip(codes, self.grads, strict=True)
            ]
        )

    def measure(self, copy: float, with_tiles: bool) -> Cell:
        """Time everything of this site."""
        n, size = self.n, self.dtype.itemsize
        codes = self.codes()
        forward, back = self.time_assign(), self.time_contract(codes)
        sums = torch.randn(self.k, 3 * n, device=self.clock.device, dtype=self.dtype)
        finish = self.clock.kernel([lambda c=c: sums.T @ c for c in self.c])
        exact = self.clock.kernel(
            [
                lambda x=x, g=g: [part.T @ x for part in g.split(n, dim=1)]
                for x, g in zip(itertools.cycle(self.x), self.grads, strict=False)
            ]
        )
        code = index_dtype(self.k).itemsize + size
        moved = self.tokens * (n * size + code) + self.k * n * size
        moved_back = self.tokens * (3 * n * size + code) + self.k * 3 * n * 4
        cell = Cell(
            self.model, self.tokens, self.k, n, str(self.dtype).removeprefix("torch."),
            forward, back, finish, exact, moved / forward / copy, moved_back / back / copy,
        )  # fmt: skip
        size_of_site = Size(self.tokens, n, (n, n, n), self.dtype, self.clock.device.type)
        cell.predicted = predictions(size_of_site, self.k)
        if with_tiles:
            cell.tiles["assign"] = _by_choice("assign_tiles", self.time_assign)
            for name in ("one-hot", "sorted"):
                with mock.patch.object(time_model, "is_sorted", return_value=name == "sorted"):
                    found = _by_choice("contract_tiles", lambda: self.time_contract(codes))
                cell.tiles[f"contract, {name}"] = found
        return cell


def predictions(size: Size, k: int) -> dict[str, float]:
    """Return seconds by kernel as the package's model has them, for the device at hand."""
    if size.device == "cpu":
        return {}
    device = devices.known_as(torch.cuda.get_device_name())
    if device is None:
        return {}
    found = {time.name: time.seconds for time in time_model.site_times(size, k, device)}
    return {**found, "exact": devices.exact_seconds(size, device)}


def _by_choice(chooser: str, timed: Callable[[], float]) -> dict[str, float | None]:
    """Time a kernel with each tile that a function of the plan would choose from, one by one."""
    choose: Callable[..., Sequence[Any]] = getattr(tile_plan, chooser)
    times: dict[str, float | None] = {}
    for number in itertools.count():
        seen: list[Any] = []

        def one(*args: Any, number: int = number, seen: list[Any] = seen, **kwargs: Any) -> Any:
            seen[:] = choose(*args, **kwargs)
            return seen[number : number + 1] or seen[:1]

        # The cache of compiled graphs knows nothing of what is replaced here.
        with mock.patch.object(tile_plan, chooser, one), fresh_code():
            try:
                took: float | None = timed()
            except Exception as error:  # noqa: BLE001  the other tiles do not hang on it
                print(f"tile {number}: {error}", file=sys.stderr)
                took = None
        if number >= len(seen):
            return times
        times[str(seen[number])] = took
    return times


@contextlib.contextmanager
def fresh_code() -> Iterator[None]:
    """Compile anew within."""
    with inductor_config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def plan(smoke: bool) -> list[tuple[str, int, int]]:
    """Return cells (model, tokens, k), what the claims rest on first."""
    if smoke:
        return [TINY]
    cells = [("llama-1b", 16384, k) for k in (64, 128, 256, 512)]
    cells += [("llama-60m", 131072, k) for k in (64, 128, 256, 512)]
    for model in ("llama-350m", "llama-60m", "llama-7b"):
        cells += [(model, 16384, k) for k in (32, 64, 128, 256)]
    return cells + [(model, 65536, k) for model in WIDTHS if "llama" in model for k in (128, 256)]


HEAD = ("model", "tokens", "k", "assign µs", "contract µs", "finish µs", "exact dW µs",
        "exact/PAMM", "assign share", "contract share")  # fmt: skip


def row(cell: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    head = [cell["model"], f"{cell['tokens']:,}", str(cell["generators"])]
    if "error" in cell:
        return [*head, cell["error"].splitlines()[0][:60], *["–"] * (len(HEAD) - 4)]
    parts = [cell[name] for name in ("assign", "contract", "finish")]
    times = [f"{t * 1e6:.1f}" for t in (*parts, cell["exact"])]
    shares = [f"{100 * cell[f'{name}_share']:.0f} %" for name in ("assign", "contract")]
    return [*head, *times, f"{cell['exact'] / sum(parts):.2f}", *shares]


def measure_all(
    cells: Sequence[tuple[str, int, int]],
    clock: Clock,
    record: dict[str, Any],
    save: Callable[[], None],
    *,
    with_tiles: bool = False,
    until: float = float("inf"),
    now: Callable[[], float] = time.time,
    make: Callable[..., Any] = Site,
) -> None:
    """Measure cells into record["kernels"], saving after each; a failing one loses itself alone.

    Args:
        cells: model, tokens, k.
        clock: of the device.
        record: gets "kernels", and "skipped" for cells that `until` does not reach.
        save: called after every cell.
        with_tiles: time every tile size.
        until: when to begin no further cell, by `now`.
        now: a clock.
        make: of a cell's sizes, something with `measure`.
    """
    dtype = torch.bfloat16 if clock.is_gpu else torch.float32
    copy = record["copy_bytes_per_second"] = copy_bandwidth(clock)
    record["kernels"], record["skipped"] = [], []
    for model, tokens, k in cells:
        if now() > until:
            record["skipped"].append(f"kernels {model}, {tokens} tokens, k = {k}")
            continue
        try:
            found = dataclasses.asdict(
                make(model, tokens, k, dtype, clock).measure(copy, with_tiles)
            )
        except Exception as error:  # noqa: BLE001  whatever it is, the other cells do not hang on it
            found = {"model": model, "tokens": tokens, "generators": k}
            found["error"] = f"{type(error).__name__}: {error}"
        record["kernels"].append(found)
        save()
        print(tables.text(HEAD, [row(found)]), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--tiles", action="store_true", help="time every tile size too")
    return cli.parse_for_gpu(
        parser,
        arguments,
        smoke="tiny cells, which a CPU can run",
        repeats=30,
        seconds=450,
        json=Path("runs/kernels.json"),
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    lowering.register()
    record: dict[str, Any] = {
        "command": machine.command(),
        "environment": machine.facts(args.device),
    }
    cli.announce(record["environment"])
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")

    clock = Clock(args.device, 3 if args.smoke else args.repeats)
    until = time.time() + args.budget
    measure_all(plan(args.smoke), clock, record, save, with_tiles=args.tiles, until=until)
    save()
    print("\n" + tables.text(HEAD, [row(cell) for cell in record["kernels"]]))
    print(f"skipped: {', '.join(record['skipped']) or 'nothing'}; wrote {args.json}")


if __name__ == "__main__":
    cli.run(main)
