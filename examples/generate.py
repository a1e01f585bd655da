"""One prompt under every method: how far it agrees, bytes of the cache, time, what is written.

    python examples/generate.py                     with a small byte-level LLaMA, trained a minute
    python examples/generate.py --model Qwen/Qwen2-0.5B --prompt-file README.md --budget 1024

Without --model a LLaMA of 4 layers is trained on Python's own sources for about a minute, enough to
write something that looks like them. The prompt's last tokens are read one by one through a cache;
those are alike of which the most likely next token is that of the whole cache. Texts are sampled,
all with the same random numbers: how many tokens stay the same. How well a method finds what was
said long ago is not to be seen here; docs/decoding.md has measurements.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from collections.abc import Callable
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
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--read", type=int, default=64, help="last tokens of the prompt, singly")
    parser.add_argument("--rank", type=int, help="of factored keys; default: half of a head")
    parser.add_argument("--train-steps", type=int, default=400, help="of the small model")
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
        source = squeezed(args.prompt_file or Path(argparse.__file__))
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
    methods: dict[str, tuple[Any, Callable[[], Any]]] = {
        "everything": (model, DynamicCache),
        f"factored keys, rank {rank} of {width}": (thin, DynamicCache),
        "clusters": (model, lambda: decoding.ClusterCache(n)),
        "pages": (model, lambda: decoding.PageCache(n)),
        "unlike the others (KeyDiff)": (model, lambda: decoding.KeyDiffCache(n)),
        "learned eviction": (model, lambda: decoding.EvictionCache(budget=n)),
        "heavy hitters": (model, lambda: decoding.HeavyHitterCache(n)),
        "small norms": (model, lambda: decoding.NormCache(n)),
        "window with sinks": (model, lambda: decoding.WindowCache(n)),
    }
    print(f"{ids.shape[1]} tokens of prompt, budget {n}\n")
    expected: Any = None
    for name, (each, make) in methods.items():
        best, seconds, cache = read(each, make(), ids, args.read)
        torch.manual_seed(args.seed)
        tokens = each.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=make(),
            max_new_tokens=args.new_tokens,
            do_sample=True,
            temperature=0.5,
            pad_token_id=0,
            eos_token_id=None,
        )
        text = tokens[0, ids.shape[1] :]
        expected = (best, text) if expected is None else expected
        alike = int((best == expected[0]).sum())
        same = int((text == expected[1]).cumprod(0).sum())
        held = decoding.cache_bytes(cache) / 2**20
        print(
            f"{name:30} reads {alike} of {len(best)} alike, writes {same} of {len(text)} "
            f"{held:6.2f} MiB {1000 * seconds:5.1f} ms a token"
        )
        print(f"    {decode(text)!r}")


@torch.no_grad()
def read(model: Any, cache: Any, ids: Any, singly: int) -> tuple[Any, float, Any]:
    """Most likely tokens after each of the last ones, median seconds a token, and the cache."""
    model(ids[:, :-singly], cache=cache, use_cache=True, logits_to_keep=1)
    best, times = [], []
    for token in ids[:, -singly:].T:
        start = time.perf_counter()
        best.append(model(token[:, None], cache=cache, use_cache=True).logits.argmax(-1))
        times.append(time.perf_counter() - start)
    return torch.cat(best), sorted(times)[len(times) // 2], cache


def squeezed(path: Path) -> bytes:
    """A file with a single space for all white space, which would be most of what is written."""
    return b" ".join(path.read_bytes().split())


def train(steps: int) -> Any:
    """A LLaMA of 4 layers on Python's own sources, as bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Not the file that the prompt is from.
    paths = [path for path in sorted(root.glob("*.py")) if path.name != "argparse.py"]
    data = torch.frombuffer(bytearray(b" ".join(map(squeezed, paths))), dtype=torch.uint8)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_theta=100_000.0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        # Short windows teach letters fast, long ones that there is more to look at.
        length = 128 if step < 0.8 * steps else 1024
        starts = torch.randint(len(data) - length, (2048 // length, 1))
        ids = data[starts + torch.arange(length)].long()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model


if __name__ == "__main__":
    main()
