"""Time the CPU kernels of PAMM against other ways to write them, and against the exact gradient.

    python examples/benchmarks/cpu_kernels.py            # about a minute
    python examples/benchmarks/cpu_kernels.py --smoke    # seconds

Every round times every candidate once, in random order; a figure is the median over the rounds of
its time divided by that of the exact weight gradient dZᵀX in the same round, so that a machine that
slows down slows both. Below 1, the candidate costs less than the exact gradient. "total" is all
that PAMM puts in its place: assign, contract and the finishing matmul. With `--threads 1` the clock
is the thread's CPU time, for machines that are not otherwise idle.
"""

from __future__ import annotations

import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from examples.benchmarks import cli, machine, tables
from examples.benchmarks.timing import paired_ratios
from pamm_compile.methods.pamm import assign, contract, index_dtype
from pamm_compile.methods.pamm.compression import Compressed, weight_gradients

Kernel = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = "2048x192x8,4096x192x16,4096x512x16,4096x512x64,4096x512x256,2048x2048x64,16384x512x64"


def naive_assign(
    x: Tensor, generators: Tensor, pick: Callable[[Tensor], Tensor], rows: int
) -> tuple[Tensor, Tensor]:
    """Return index and scale, `rows` tokens at a time, by one way to find the largest score."""
    c = generators.float()
    inverse = c.norm(dim=1).reciprocal()
    indices, scales = [], []
    for tile in x.split(rows):
        dot = tile.float() @ c.T
        nearest = pick(dot.abs() * inverse)
        near = inverse[nearest]
        indices.append(nearest)
        scales.append(dot.gather(1, nearest[:, None])[:, 0] * near * near)
    return torch.cat(indices), torch.cat(scales)


def half_assign(x: Tensor, generators: Tensor) -> Tensor:
    """Scores as a matmul in the dtype of x rounds them: near ties are lost. Index only."""
    return ((x @ generators.T).abs() / generators.float().norm(dim=1)).argmax(dim=1)


def sorted_csr(index: Tensor, scale: Tensor, grad: Tensor, k: int) -> Tensor:
    """B̃ as a sparse matrix of α times dZ."""
    members, order = torch.sort(index.long(), stable=True)
    bounds = torch.searchsorted(members, torch.arange(k + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = torch.sparse_csr_tensor(
            bounds, order, scale.float()[order], (k, index.shape[0]), check_invariants=False
        )
    return matrix @ grad.float()


def sorted_bag(index: Tensor, scale: Tensor, grad: Tensor, k: int) -> Tensor:
    """The shipped contraction without tiles."""
    members, order = torch.sort(index.long(), stable=True)
    bounds = torch.searchsorted(members, torch.arange(k + 1))
    return embedding_bag(
        order,
        grad.float(),
        bounds,
        mode="sum",
        per_sample_weights=scale.float()[order],
        include_last_offset=True,
    )


def sorted_segments(index: Tensor, scale: Tensor, grad: Tensor, k: int) -> Tensor:
    order = torch.argsort(index.long(), stable=True)
    lengths = torch.bincount(index, minlength=k)
    rows = scale.float()[order, None] * grad[order].float()
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0)


def one_hot(index: Tensor, scale: Tensor, grad: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    weights = torch.zeros(k, index.shape[0], dtype=dtype)
    weights.scatter_(0, index.long()[None], scale.to(dtype)[None])
    return (weights @ grad.to(dtype)).float()


def accumulated(index: Tensor, scale: Tensor, grad: Tensor, k: int, how: str) -> Tensor:
    sums = torch.zeros(k, grad.shape[1])
    rows = scale.float()[:, None] * grad.float()
    if how == "index_add":
        return sums.index_add_(0, index.long(), rows)
    return sums.index_put_((index.long(),), rows, accumulate=True)


def finish(compressed: Compressed, m: int) -> Tensor:
    """The matmul of B̃ᵀ and C on its own."""
    sums = compressed.generators.new_ones(compressed.generators.shape[0], m)
    return sums.T @ compressed.generators


def candidates(b: int, n: int, k: int, m: int, dtype: torch.dtype) -> dict[str, Kernel]:
    x, grad = torch.randn(b, n).to(dtype), torch.randn(b, m).to(dtype)
    generators = x[:: b // k][:k].clone()
    small = index_dtype(k)
    f, a, _ = assign(x, generators, small)
    compressed = Compressed(generators, f, a)

    def total() -> object:
        index, scale, _ = assign(x, generators, small)
        return weight_gradients(Compressed(generators, index, scale), [grad], [False])

    def largest(scores: Tensor) -> Tensor:
        return scores.max(dim=1).indices

    def top(scores: Tensor) -> Tensor:
        return scores.topk(1, dim=1).indices[:, 0]

    def arg(scores: Tensor) -> Tensor:
        return scores.argmax(dim=1)

    kernels: dict[str, Kernel] = {
        "exact": lambda: grad.T @ x,
        "**total**": total,
        "**assign**": lambda: assign(x, generators, small),
        "argmax, no tiles": lambda: naive_assign(x, generators, arg, b),
        "argmax, 256 rows": lambda: naive_assign(x, generators, arg, 256),
        "max": lambda: naive_assign(x, generators, largest, 2048),
        "topk": lambda: naive_assign(x, generators, top, 2048),
        "**contract**": lambda: contract(f, a, [grad], k),
        "bag, no tiles": lambda: sorted_bag(f, a, grad, k),
        "csr": lambda: sorted_csr(f, a, grad, k),
        "one-hot": lambda: one_hot(f, a, grad, k, torch.float32),
        "index_add": lambda: accumulated(f, a, grad, k, "index_add"),
        "index_put": lambda: accumulated(f, a, grad, k, "index_put"),
        "segment_reduce": lambda: sorted_segments(f, a, grad, k),
        "finish": lambda: finish(compressed, m),
    }
    if dtype != torch.float32:
        kernels[f"{str(dtype)[6:]} scores"] = lambda: half_assign(x, generators)
        kernels[f"{str(dtype)[6:]} one-hot"] = lambda: one_hot(f, a, grad, k, dtype)
    return kernels


def time_once(kernel: Kernel) -> float:
    # One thread's own CPU time does not grow when other processes take its turns.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    kernel()
    return clock() - start


def measure(kernels: dict[str, Kernel], rounds: int) -> dict[str, list[float]]:
    """Return every round's seconds of every kernel, after one round that is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for round_ in range(rounds + 1):
        # Whoever comes first finds the operands outside the caches: let it be another each time.
        for name in random.sample(list(kernels), len(kernels)):
            elapsed = time_once(kernels[name])
            if round_:
                seconds[name].append(elapsed)
    return seconds


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="b×n×k, comma-separated: %(default)s")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of: " + ", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="one small shape, three rounds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    rounds = args.rounds
    if args.smoke:
        shapes, rounds = [(512, 64, 8)], 3

    print(
        f"{machine.processor()}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {rounds} rounds, m = 3n")
    for dtype in args.dtypes.split(","):
        columns: dict[str, dict[str, str]] = {}
        for b, n, k in shapes:
            with torch.no_grad():
                seconds = measure(candidates(b, n, k, 3 * n, DTYPES[dtype]), rounds)
            column = columns[f"{b}×{n}, k={k}"] = {
                name: f"{statistics.median(paired_ratios(times, seconds['exact'])):.3f}"
                for name, times in seconds.items()
            }
            column["exact"] = f"{statistics.median(seconds['exact']) * 1e3:.2f} ms"
        names = next(iter(columns.values()))
        rows = [[name, *(column[name] for column in columns.values())] for name in names]
        print("\n" + "\n".join(tables.markdown([dtype, *columns], rows)))


if __name__ == "__main__":
    main()
