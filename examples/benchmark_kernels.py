"""Time the GPU kernels of PAMM, and training steps, against what they replace.

    python examples/benchmark_kernels.py --json results.json   # a GPU; about eight minutes at most
    python examples/benchmark_kernels.py --device cpu --smoke  # seconds; only shows that it runs

Kernels: at the shapes of LLaMA's attention projections, the time of pamm::assign (with the norms
of the generators), of pamm::contract over dQ, dK and dV, of the matmul that finishes dW, and of
the three exact dW by the vendor's library. Inputs rotate through more memory than the cache holds.
"share" is bytes that must move, over time, over the bandwidth of a large copy on the same device.

Steps: forward and backward of a stack of layers, or of a whole model with AdamW, compiled exactly
and with PAMM in one process; the arms alternate, and the ratio is the median of paired ratios.
What the time budget does not reach is listed as skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile
from pamm_compile.methods.pamm import assign, compression, contract, index_dtype
from pamm_compile.methods.pamm import triton as lowering


class Shape(NamedTuple):
    """One model of the LLaMA family, as pre-trained in the paper."""

    width: int
    inner: int
    heads: int
    layers: int


SHAPES = {
    "60M": Shape(512, 1376, 8, 8),
    "350M": Shape(1024, 2736, 16, 24),
    "1B": Shape(2048, 5461, 32, 24),
    "7B": Shape(4096, 11008, 32, 32),
    "tiny": Shape(64, 160, 4, 2),
}
VOCABULARY = 32000
# Kept back from the time budget before two models of so many layers are compiled and timed.
RESERVED_PER_LAYER = 7.5


class Clock:
    """Times on one device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.is_gpu = device != "cpu"
        self.repeats = repeats
        self.device = device

    def once(self, fn: Callable[[], Any]) -> float:
        """Seconds of one call, the device idle before and after."""
        self.wait()
        start = time.perf_counter()
        fn()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def kernel(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Median seconds of one of several equivalent calls, launch cost left out where possible.

        On a GPU the calls are captured into one CUDA graph, so that what is timed is the kernels.
        """
        for call in calls:
            call()
        if not self.is_gpu:
            times = [self.once(call) for _ in range(self.repeats) for call in calls]
            return statistics.median(times)
        self.wait()
        graph, rounds = torch.cuda.CUDAGraph(), max(1, 16 // len(calls))
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
            self.wait()
            times.append(begin.elapsed_time(end) / 1e3 / (rounds * len(calls)))
        return statistics.median(times)


def copy_bandwidth(clock: Clock, size: int) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.kernel([lambda: target.copy_(source)])


def sets_of(make: Callable[[], list[Tensor]], cache: int) -> list[list[Tensor]]:
    """Equal inputs, as many as it takes to fill twice the cache, at most eight."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    return [first] + [make() for _ in range(min(7, 2 * cache // size))]


@dataclasses.dataclass
class KernelResult:
    """One cell; times in seconds."""

    model: str
    tokens: int
    ratio: int
    generators: int
    width: int
    dtype: str
    assign: float
    contract: float
    finish: float
    exact: float
    assign_share: float
    contract_share: float


def time_kernels(
    model: str, tokens: int, ratio: int, dtype: torch.dtype, clock: Clock, copy: float, cache: int
) -> KernelResult:
    """Time one site's kernels and what they replace."""
    n, device = SHAPES[model].width, clock.device
    k = int(compression.num_generators(tokens, Fraction(ratio), 1))
    rows = torch.arange(k, device=device) * tokens // k

    def make() -> list[Tensor]:
        # A few directions and noise, so that assignments are as uneven as real ones.
        base = torch.randn(32, n, device=device, dtype=dtype)
        pick = (torch.rand(tokens, device=device) ** 2 * 32).long()
        x = base[pick] + 0.3 * torch.randn(tokens, n, device=device, dtype=dtype)
        return [x, torch.randn(tokens, 3 * n, device=device, dtype=dtype)]

    def forward(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        index, scale, _ = assign(x, c, index_dtype(k))
        return index, scale

    def backward(index: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
        return contract(index, scale, list(grad.split(n, dim=1)), k)

    torch._dynamo.reset()
    compiled_forward = torch.compile(forward, dynamic=False)
    compiled_backward = torch.compile(backward, dynamic=False)
    inputs = sets_of(make, cache)
    sites = [(x, x[rows], grad) for x, grad in inputs]
    codes = [compiled_forward(x, c) for x, c, _ in sites]
    sums = [compiled_backward(*code, grad) for code, (_, _, grad) in zip(codes, sites, strict=True)]
    parts = [total.to(dtype) for total in sums]

    seconds = clock.kernel([lambda s=s: compiled_forward(s[0], s[1]) for s in sites])
    back = clock.kernel(
        [
            lambda code=code, s=s: compiled_backward(*code, s[2])
            for code, s in zip(codes, sites, strict=True)
        ]
    )
    finish = clock.kernel([lambda p=p, s=s: p.T @ s[1] for p, s in zip(parts, sites, strict=True)])
    exact = clock.kernel(
        [lambda s=s: [part.T @ s[0] for part in s[2].split(n, dim=1)] for s in sites]
    )
    size, code_size = dtype.itemsize, index_dtype(k).itemsize + dtype.itemsize
    moved = tokens * n * size + k * n * size + tokens * code_size
    moved_back = tokens * (3 * n * size + code_size) + k * 3 * n * 4
    return KernelResult(
        model, tokens, ratio, k, n, str(dtype).removeprefix("torch."),
        seconds, back, finish, exact, moved / seconds / copy, moved_back / back / copy,
    )  # fmt: skip


@dataclasses.dataclass
class StepResult:
    """One model or stack; times in seconds."""

    model: str
    layers: int
    whole: bool
    tokens: int
    ratio: int
    exact: float
    pamm: float
    speedup: float
    compressed_sites: int


def time_steps(
    model: str,
    layers: int,
    whole: bool,
    batch: int,
    length: int,
    ratio: int,
    clock: Clock,
    dtype: torch.dtype,
) -> StepResult:
    """Time training steps of a model, compiled exactly and with PAMM, alternating."""
    shape, device = SHAPES[model], clock.device
    config = LlamaConfig(
        vocab_size=VOCABULARY if clock.is_gpu else 256,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=length,
        use_cache=False,
    )
    torch.manual_seed(0)
    backend = pamm_compile.backend(ratio=ratio, min_tokens=2, strict=True)
    # The same options are the same object, with the graphs of earlier models in its report.
    earlier = len(backend.report.graphs)
    steps: dict[str, Callable[[], None]] = {}
    for name, chosen in (("exact", "inductor"), ("pamm", backend)):
        torch._dynamo.reset()
        network = LlamaForCausalLM(config).to(device=device, dtype=dtype)
        steps[name] = _step(network, chosen, whole, batch, length, clock)
        for _ in range(3):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _, (name, step) in itertools.product(range(clock.repeats), steps.items()):
        times[name].append(clock.once(step))
    fresh = list(backend.report.graphs)[earlier:]
    ratios = [a / b for a, b in zip(times["exact"], times["pamm"], strict=True)]
    return StepResult(
        model,
        layers,
        whole,
        batch * length,
        ratio,
        statistics.median(times["exact"]),
        statistics.median(times["pamm"]),
        statistics.median(ratios),
        sum(site.compressed for graph in fresh for site in graph.sites),
    )


def _step(
    network: LlamaForCausalLM, backend: Any, whole: bool, batch: int, length: int, clock: Clock
) -> Callable[[], None]:
    device, width = clock.device, network.config.hidden_size
    if whole:
        compiled = torch.compile(network, backend=backend, dynamic=False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=clock.is_gpu)
        ids = torch.randint(0, network.config.vocab_size, (batch, length), device=device)

        def train() -> None:
            compiled(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return train

    stack: nn.Module = network.model
    dtype = next(network.parameters()).dtype
    hidden = torch.randn(batch, length, width, device=device, dtype=dtype, requires_grad=True)
    compiled = torch.compile(stack, backend=backend, dynamic=False)

    def run() -> None:
        compiled(inputs_embeds=hidden).last_hidden_state.sum().backward()
        stack.zero_grad(set_to_none=True)
        hidden.grad = None

    return run


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on besides this code."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else platform.machine(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _commit(),
        "arguments": sys.argv[1:],
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def kernel_row(r: KernelResult) -> list[str]:
    """One line of the table of kernels."""
    compressed = r.assign + r.contract + r.finish
    times = [f"{t * 1e6:.1f}" for t in (r.assign, r.contract, r.finish, r.exact)]
    shares = [f"{100 * share:.0f} %" for share in (r.assign_share, r.contract_share)]
    head = [r.model, str(r.tokens), str(r.ratio), str(r.generators)]
    return [*head, *times, f"{r.exact / compressed:.2f}", *shares]


KERNEL_HEAD = [
    *["model", "tokens", "b/k", "k", "assign µs", "contract µs", "finish µs", "exact dW µs"],
    *["exact/PAMM", "assign share", "contract share"],
]
STEP_HEAD = [
    "model",
    "layers",
    "whole",
    "tokens",
    "b/k",
    "exact ms",
    "PAMM ms",
    "exact/PAMM",
    "sites",
]


def step_row(r: StepResult) -> list[str]:
    """One line of the table of steps."""
    head = [r.model, str(r.layers), "yes" if r.whole else "no", str(r.tokens), str(r.ratio)]
    times = [f"{r.exact * 1e3:.2f}", f"{r.pamm * 1e3:.2f}", f"{r.speedup:.3f}"]
    return [*head, *times, str(r.compressed_sites)]


def plan(smoke: bool) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Cells (model, tokens, ratio) and steps (model, layers, whole, batch, length, ratio)."""
    if smoke:
        return [("tiny", 512, 32)], [("tiny", 1, False, 2, 128, 32), ("tiny", 2, True, 2, 128, 32)]
    sizes, ratios = ("60M", "350M", "1B", "7B"), (128, 256, 512)
    # What the claims rest on first: the budget may cut the rest.
    kernels = [("1B", 16384, ratio) for ratio in ratios]
    kernels += [(m, 16384, ratio) for m in sizes if m != "1B" for ratio in ratios]
    kernels += [(m, 65536, ratio) for m in sizes for ratio in ratios]
    steps = [
        ("60M", 8, True, 64, 256, 256),
        ("1B", 4, False, 64, 256, 256),
        ("350M", 4, False, 64, 256, 256),
        ("350M", 24, True, 64, 256, 256),
        ("1B", 24, True, 64, 256, 256),
        ("7B", 1, False, 64, 256, 256),
    ]
    return kernels, steps


def main() -> None:
    """Run the plan and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="one tiny cell of everything")
    parser.add_argument("--only", choices=["kernels", "steps"], help="default: both")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--budget", type=float, default=450, help="seconds after which to skip")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("these sizes are for a GPU; on a CPU add --smoke")

    started = time.monotonic()
    lowering.register()
    clock = Clock(args.device, 3 if args.smoke else args.repeats)
    dtype = torch.bfloat16 if clock.is_gpu else torch.float32
    cache = torch.cuda.get_device_properties(0).L2_cache_size if clock.is_gpu else 1 << 16
    results: dict[str, Any] = {"environment": environment(args.device)}
    print(json.dumps(results["environment"], indent=2), flush=True)
    copy = copy_bandwidth(clock, 1 << (30 if clock.is_gpu else 24))
    results["copy_bytes_per_second"] = copy
    print(f"copy: {copy / 1e9:.0f} GB/s, read and written", flush=True)

    kernels, steps = plan(args.smoke)
    kernel_results: list[KernelResult] = []
    step_results: list[StepResult] = []
    skipped: list[str] = []
    # Half of the budget belongs to the steps, unless kernels are all that is asked for.
    kernel_budget = args.budget * (1 if args.only == "kernels" else 0.5)
    for cell in [] if args.only == "steps" else kernels:
        if time.monotonic() - started > kernel_budget:
            skipped.append(f"kernels {cell}")
            continue
        kernel_results.append(time_kernels(*cell, dtype, clock, copy, cache))
        print(table([KERNEL_HEAD, kernel_row(kernel_results[-1])]), flush=True)
    for step in [] if args.only == "kernels" else steps:
        if time.monotonic() - started > args.budget - RESERVED_PER_LAYER * step[1]:
            skipped.append(f"steps {step}")
            continue
        step_results.append(time_steps(*step, clock, dtype))
        print(table([STEP_HEAD, step_row(step_results[-1])]), flush=True)

    results["kernels"] = [dataclasses.asdict(r) for r in kernel_results]
    results["steps"] = [dataclasses.asdict(r) for r in step_results]
    results["skipped"] = skipped
    results["seconds"] = time.monotonic() - started
    print("\n" + table([KERNEL_HEAD, *map(kernel_row, kernel_results)]))
    print("\n" + table([STEP_HEAD, *map(step_row, step_results)]))
    print(f"\n{results['seconds']:.0f} s; skipped: {', '.join(skipped) or 'nothing'}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
