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

ARMS = ("full", "full, static cache", "clusters", "factored, pairs", "factored, before")


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


def fill(cache: Any, args: argparse.Namespace, length: int, key_width: int) -> None:
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


def arm(name: str, args: argparse.Namespace, length: int) -> tuple[Any, Any]:
    model = build(args, length)
    width = args.hidden // args.heads
    cache: Any = hf.DynamicCache()
    if name == "full, static cache":
        cache = hf.StaticCache(model.config, max_cache_len=length + 64)
    elif name == "clusters":
        cache = decoding.ClusterCache(args.budget)
    elif name.startswith("factored"):
        width //= 4
        decoding.factor_keys(model, width, rotary="pairs" if name.endswith("pairs") else "before")
    fill(cache, args, length, width)
    return model, cache


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = machine.facts(threads=args.threads)
    cli.announce(facts)
    rows = []
    for length in args.lengths:
        made = {name: arm(name, args, length) for name in args.arms}
        token = torch.tensor([[65]])
        times: dict[str, list[float]] = {name: [] for name in args.arms}
        device = torch.device("cpu")
        for name, (model, cache) in made.items():
            # The first step makes the clusters.
            first = timing.seconds(partial(model, token, cache=cache, use_cache=True), device)
            print(f"{length} {name}: first step {first:.2f} s", flush=True)
        for round_ in range(args.rounds):
            for name in timing.in_turn(args.arms, round_):
                model, cache = made[name]
                call = partial(model, token, cache=cache, use_cache=True)
                times[name].append(timing.seconds(call, device))
        for name in args.arms:
            ratio = timing.quartiles(timing.paired_ratios(times[name], times[args.arms[0]]))
            record = {
                "length": length,
                "arm": name,
                "milliseconds": 1000 * statistics.median(times[name]),
                "ratio": ratio.median,
                "quartiles": [ratio.low, ratio.high],
                "cache_bytes": decoding.cache_bytes(made[name][1]),
            }
            if args.out:
                with args.out.open("a") as file:
                    settings = {**cli.options(args), **facts}
                    file.write(json.dumps({**record, "facts": settings}) + "\n")
            rows.append(
                [
                    str(length),
                    name,
                    f"{record['milliseconds']:.1f}",
                    str(ratio),
                    tables.mebibytes(decoding.cache_bytes(made[name][1])),
                ]
            )
            print(rows[-1], flush=True)
    print(tables.text(["length", "arm", "ms a token", "by full", "MiB"], rows))


if __name__ == "__main__":
    cli.run(main)
