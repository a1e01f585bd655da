"""One prompt under every method: what is generated, bytes of the cache, time a token.

    python examples/generate.py                     with a small byte-level LLaMA, trained first
    python examples/generate.py --model Qwen/Qwen2-0.5B --prompt-file README.md --budget 1024

Without --model a LLaMA of 4 layers is trained on Python's own sources for a few steps, enough to
write something that looks like them. How well a method works is not to be seen here;
docs/decoding.md has measurements.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from pamm_compile import decoding


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a name on the Hub; default: train a small one")
    parser.add_argument("--prompt-file", type=Path, help="text to go on from")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=256, help="tokens attended to, or kept")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, help="of factored keys; default: half of a head")
    parser.add_argument("--train-steps", type=int, default=100, help="of the small model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    if args.model:
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        model: Any = AutoModelForCausalLM.from_pretrained(args.model)
        text = (args.prompt_file or Path(argparse.__file__)).read_text()
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens]
        decode: Callable[[Any], str] = tokenizer.decode
    else:
        source = (args.prompt_file or Path(argparse.__file__)).read_bytes()
        ids = torch.tensor([list(source[: args.prompt_tokens])])
        model = train(args.train_steps)

        def decode(tokens: Any) -> str:
            return bytes(tokens.tolist()).decode(errors="replace")

    model.eval()
    # The one line that a model needs for caches that choose.
    decoding.attach(model)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rank = args.rank or width // 2
    thin = decoding.factor_keys(copy.deepcopy(model), rank)

    n = args.budget
    methods: dict[str, tuple[Any, Any]] = {
        "everything": (model, DynamicCache()),
        f"factored keys, rank {rank} of {width}": (thin, DynamicCache()),
        "clusters": (model, decoding.ClusterCache(n)),
        "pages": (model, decoding.PageCache(n)),
        "learned eviction": (model, decoding.EvictionCache(budget=n)),
        "heavy hitters": (model, decoding.HeavyHitterCache(n)),
        "small norms": (model, decoding.NormCache(n)),
        "window with sinks": (model, decoding.WindowCache(n)),
    }
    print(f"{ids.shape[1]} tokens of prompt, budget {n}\n")
    for name, (each, cache) in methods.items():
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        times: list[float] = []
        tokens = each.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=args.new_tokens,
            streamer=Clock(times),
            **settings,
        )
        # The first two intervals hold the prompt, and the clusters made of it.
        steps = sorted(b - a for a, b in pairwise(times[2:]))
        median = 1000 * steps[len(steps) // 2] if steps else float("nan")
        held = decoding.cache_bytes(cache) / 2**20
        print(f"{name:32} {held:8.2f} MiB {median:8.1f} ms a token")
        print(f"    {decode(tokens[0, ids.shape[1] :])!r}")


class Clock:
    """Notes when tokens arrive, where `generate` expects what prints them."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def train(steps: int) -> Any:
    """A LLaMA of 4 layers on Python's own sources, as bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        starts = torch.randint(len(data) - 256, (8, 1))
        ids = data[starts + torch.arange(256)].long()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model


if __name__ == "__main__":
    main()
