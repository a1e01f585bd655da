"""Time and bytes a generated token by context length: whole attention, clusters, factored keys.

    python examples/benchmarks/decoding/times.py --lengths 1024 4096 16384 32768

Caches are filled with random keys and values, which stand for a prompt: none is read, since reading
32,768 tokens takes minutes and is the same for all. Keys drift, as those of a text do. Arms take
turns, a token each; ratios are of the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf

from examples.benchmarks import cli, machine, tables, timing
from pamm_compile import decoding
from pamm_compile.decoding.attention import AttendingLayer

ARMS = (
    "full",
    "full, static cache",
    "clusters",
    "factored, pairs",
    "factored, pairs, static cache",
    "factored, before",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--lengths", nargs="+", type=cli.positive, default=[1024, 4096, 32768])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budget", type=cli.positive, default=1024, help="of clusters")
    parser.add_argument("--layers", type=cli.positive, default=8)
    parser.add_argument("--hidden", type=cli.positive, default=512)
    parser.add_argument("--heads", type=cli.positive, default=8)
    parser.add_argument("--rounds", type=cli.positive, default=7)
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, a record each")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace, length: int) -> Any:
    torch.manual_seed(0)
    config: Any = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=length + 64,
    )
    return decoding.attach(hf.LlamaForCausalLM(config).eval())


def fill(cache: Any, args: argparse.Namespace, length: int, key_width: int, before: bool) -> None:
    """Put `length` tokens of random keys and values into every layer."""
    generator = torch.Generator().manual_seed(0)
    width = args.hidden // args.heads
    for index in range(args.layers):
        value = torch.randn(1, args.heads, length, width, generator=generator)
        key = torch.randn(1, args.heads, length, key_width, generator=generator)
        drift = torch.randn(1, args.heads, length // 64 + 1, key_width, generator=generator)
        key += 2 * drift.repeat_interleave(64, 2)[:, :, :length]
        shared: dict[str, Any] = {}
        cache.update(key, value, index, kwargs=shared)
        layer = shared.get("cache_layer")
        if isinstance(layer, AttendingLayer):
            layer.answered()
    if before:
        # Keys before rotation come with the angles of their positions, once.
        turned = torch.randn(1, 1, length, width // 2, generator=generator)
        cache.update(turned, turned, args.layers)


def arm(name: str, args: argparse.Namespace, length: int) -> tuple[Any, Any]:
    model = build(args, length)
    width = args.hidden // args.heads
    cache: Any = hf.DynamicCache()
    if name.endswith("static cache"):
        cache = hf.StaticCache(model.config, max_cache_len=length + 64)
    elif name == "clusters":
        cache = decoding.ClusterCache(args.budget)
    if name.startswith("factored"):
        width //= 4
        decoding.factor_keys(model, width, rotary="before" if "before" in name else "pairs")
    fill(cache, args, length, width, name == "factored, before")
    return model, cache


def measure(args: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """One record an arm: its first step, which makes the clusters, and a time for each round."""
    made = {name: arm(name, args, length) for name in args.arms}
    device = torch.device("cpu")

    def step(name: str) -> float:
        model, cache = made[name]
        call = partial(model, torch.tensor([[65]]), cache=cache, use_cache=True)
        return timing.seconds(call, device)

    first = {name: step(name) for name in args.arms}
    times: dict[str, list[float]] = {name: [] for name in args.arms}
    for round_ in range(args.rounds):
        for name in timing.in_turn(args.arms, round_):
            times[name].append(step(name))
    return [
        {
            "length": length,
            "arm": name,
            "first_seconds": first[name],
            "seconds": times[name],
            "cache_bytes": decoding.cache_bytes(made[name][1]),
        }
        for name in args.arms
    ]


def rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row a record: times, and their ratios to both kinds of full attention, round by round."""
    seconds = {(r["length"], r["arm"]): r["seconds"] for r in records}
    found = []
    for record in records:
        row = [f"{record['length']:,}", record["arm"]]
        row.append(f"{1000 * statistics.median(record['seconds']):.1f}")
        for base in ARMS[:2]:
            base_seconds = seconds.get((record["length"], base))
            ratios = base_seconds and timing.paired_ratios(record["seconds"], base_seconds)
            row.append(str(timing.quartiles(ratios)) if ratios else "-")
        row.append(f"{record['first_seconds']:.1f}")
        found.append([*row, tables.mebibytes(record["cache_bytes"])])
    return found


HEADER = ["tokens", "arm", "ms a token", "by full", "by full, static", "first token, s", "MiB"]


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = machine.facts(threads=args.threads)
    cli.announce(facts)
    settings = {**cli.options(args), **facts}
    # Where a record was written says nothing of what it holds.
    del settings["out"]
    records = []
    for length in args.lengths:
        for record in measure(args, length):
            print(rows([record])[0], flush=True)
            records.append(record)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({**record, "facts": settings}) + "\n")
    print(tables.text(HEADER, rows(records)))


if __name__ == "__main__":
    cli.run(main)
