"""Accuracy and loss of a model that recalls, by method and budget of its cache.

    python examples/benchmarks/decoding/budgets.py recall-seed0 --lengths 1024 4096
    python examples/benchmarks/decoding/budgets.py recall-seed0 --bytes --kvpress

With --bytes a budget is a share of the bytes of the whole cache, all tensors of a method counted
when the first question has been read; without, a share of its tokens. With --kvpress the methods of
that package run beside ours (Llama class only).

The context is read whole; then come questions, each answered (with the right answer, whatever the
model says) before the next, and a piece of the text that follows, token by token through the cache.
What a method drops it drops before it knows what will be asked. All methods choose in every layer
(whole_layers=0), where the papers leave the first two of many layers whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf
from torch import Tensor

from examples.benchmarks import cli, corpus, machine, tables
from examples.benchmarks.decoding.recall import ANSWER, VALUES, question
from pamm_compile import decoding

# Methods that keep every token, and spare reading rather than bytes.
KEEPING = ("clusters of 80", "clusters of 16", "pages")
METHODS: dict[str, Callable[[int], Any]] = {
    "clusters of 80": lambda n: decoding.ClusterCache(n, whole_layers=0),
    "clusters of 16": lambda n: decoding.ClusterCache(n, tokens_per_cluster=16, whole_layers=0),
    "pages": lambda n: decoding.PageCache(n, whole_layers=0),
    "policy": lambda n: decoding.EvictionCache(budget=n),
    "heavy hitters": decoding.HeavyHitterCache,
    "norms": lambda n: decoding.NormCache(n, whole_layers=0),
    "keydiff": decoding.KeyDiffCache,
    "window": decoding.WindowCache,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="folders that recall.py wrote")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=cli.positive, default=[1024, 4096])
    parser.add_argument("--budgets", nargs="+", type=float, default=[1 / 4, 1 / 8, 1 / 16, 1 / 32])
    parser.add_argument("--contexts", type=cli.positive, default=4, help="contexts a model")
    parser.add_argument("--facts", type=cli.positive, default=16, help="planted and asked for")
    parser.add_argument("--text", type=cli.positive, default=16, help="tokens of text after them")
    parser.add_argument("--bytes", action="store_true", help="budgets are shares of all bytes")
    parser.add_argument("--kvpress", action="store_true", help="beside ours, those of kvpress")
    parser.add_argument("--threads", type=cli.positive, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines, a record each")
    return parser.parse_args(arguments)


@torch.no_grad()
def ask(
    model: Any, cache: Any, contexts: Tensor, asked: Tensor, answers: Tensor, text: Tensor
) -> dict[str, float]:
    """Read contexts [b, n], ask for facts [b, f] in turn, then read text [b, t]."""
    model(contexts, cache=cache, use_cache=True, logits_to_keep=1)
    right, answer_loss, text_loss = [], [], []
    # A cache that dropped tokens does not always know how many there were.
    place = torch.tensor([[contexts.shape[1]]])
    bytes_held = 0

    def step(token: Tensor) -> Tensor:
        given = {"position_ids": place.clone(), "cache": cache, "use_cache": True}
        place.add_(1)
        logits: Tensor = model(token[:, None], **given).logits[:, 0]
        return logits.log_softmax(-1)

    for asks, answer in zip(asked.T, answers.T, strict=True):
        scores = step(asks)
        bytes_held = bytes_held or decoding.cache_bytes(cache)
        best = scores[:, ANSWER : ANSWER + VALUES].argmax(-1) + ANSWER
        right.append(best == answer)
        answer_loss.append(-scores.gather(1, answer[:, None]))
        step(answer)
    for token, following in zip(text.T[:-1], text.T[1:], strict=True):
        text_loss.append(-step(token).gather(1, following[:, None]))
    return {
        "accuracy": float(torch.stack(right).float().mean()),
        "answer_loss": float(torch.stack(answer_loss).mean()),
        "text_loss": float(torch.stack(text_loss).mean()),
        "cache_bytes": float(bytes_held),
    }


@torch.no_grad()
def within(
    model: Any, make: Callable[[int], Any], data: list[Tensor], share: float, whole: float
) -> int:
    """How many tokens a method may keep to hold no more than a share of the whole cache's bytes."""
    contexts, asked = data[0][:1], data[1][:1, :1]
    allowed = share * whole / len(data[0])
    count = round(share * contexts.shape[1])
    for _ in range(2):
        held = ask(model, make(count), contexts, asked, data[2][:1, :1], data[3][:1, :2])
        if held["cache_bytes"] <= allowed:
            break
        count = int(count * allowed / held["cache_bytes"])
    return count


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = machine.facts(threads=args.threads)
    cli.announce(facts)
    text = corpus.Text().validation
    methods = {name: METHODS[name] for name in args.methods}
    if args.bytes:
        methods = {name: make for name, make in methods.items() if name not in KEEPING}
    if args.kvpress:
        from examples.benchmarks.decoding import presses

        methods |= presses.METHODS
    rows = []
    for folder in args.models:
        model = decoding.attach(hf.AutoModelForCausalLM.from_pretrained(folder).eval())
        if args.kvpress:
            presses.prepare(model)
        for length in args.lengths:
            generator = torch.Generator().manual_seed(length)
            drawn = [
                question(text, length, args.facts, generator, args.text)
                for _ in range(args.contexts)
            ]
            data = [torch.cat([q.context for q in drawn])]
            data += [torch.stack([getattr(q, n) for q in drawn]) for n in ("asked", "answers")]
            data.append(torch.stack([q.text for q in drawn]))
            whole = ask(model, hf.DynamicCache(), *data)
            runs = [("full", 1.0)]
            runs += [(name, share) for name in methods for share in args.budgets]
            for name, share in runs:
                kept = round(length * share)
                if name != "full" and args.bytes:
                    kept = within(model, methods[name], data, share, whole["cache_bytes"])
                found = whole if name == "full" else ask(model, methods[name](kept), *data)
                record = {
                    "model": folder.name,
                    "length": length,
                    "method": name,
                    "share": share,
                    "of": "bytes" if args.bytes else "tokens",
                    "budget": kept,
                    **found,
                }
                print(json.dumps(record), flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({**record, "facts": facts}) + "\n")
                rows.append(record)
    header = ["model", "length", "method", "budget", "accuracy", "answer loss", "text loss", "MiB"]
    body = [
        [
            str(r["model"]),
            str(r["length"]),
            str(r["method"]),
            str(r["budget"]),
            f"{r['accuracy']:.2f}",
            f"{r['answer_loss']:.3f}",
            f"{r['text_loss']:.3f}",
            tables.mebibytes(r["cache_bytes"] / args.contexts),
        ]
        for r in rows
    ]
    print(tables.text(header, body))


if __name__ == "__main__":
    cli.run(main)
