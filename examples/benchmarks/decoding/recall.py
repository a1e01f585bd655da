"""Train a small model to recall facts planted in text: the model that the others measure.

    python examples/benchmarks/decoding/recall.py --out recall-seed0 --seed 0
    python examples/benchmarks/decoding/recall.py --out recall-gpt2 --family gpt2

The text is the standard library's own sources, as bytes. A fact is one symbol that bytes do not
use, for a key and a value together; the key has a symbol of its own that asks, the value one that
answers. In training facts are planted and asked for anywhere, in contexts that grow; for measuring,
facts are planted in a context, and then asked for one after the other, each answered before the
next. That a fact is one symbol spares the model learning to look at a token's neighbour first,
which takes longer than all else; what a cache must keep or find is one token for each fact.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf
from torch import Tensor

from examples.benchmarks import cli, corpus

BYTES, KEYS, VALUES = 256, 32, 16
ASK = BYTES + KEYS * VALUES
ANSWER = ASK + KEYS
VOCABULARY = ANSWER + VALUES
LONGEST = 4096
# Length of a context, windows a step, steps: recall is learnt where it is cheap, then stretched.
STAGES = ((64, 32, 400), (256, 8, 150), (1024, 2, 100), (4096, 1, 50))


class Question(NamedTuple):
    """A context with facts, then questions with their answers, then more of the text."""

    context: Tensor
    asked: Tensor
    answers: Tensor
    text: Tensor


def build(family: str) -> Any:
    """A model of 4 layers of width 128; "gpt2" has positions learnt and as many key heads."""
    if family == "gpt2":
        config: Any = hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LONGEST + 256,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_inner=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            eos_token_id=None,
            bos_token_id=None,
        )
        return hf.GPT2LMHeadModel(config)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST + 256,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    return hf.LlamaForCausalLM(config)


def plant(text: Tensor, facts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Plant facts and questions with their answers anywhere in a window of text.

    Args:
        text: uint8 [n].
        facts: how many are planted or asked for, a third of them new ones.
        generator: decides what and where.

    Returns:
        ids: int64 [n].
        weight: [n], how much a token counts in the loss: answers more than all other text.
    """
    ids = text.long()
    weight = torch.ones(len(ids))
    places = torch.randperm(len(ids) // 2 - 1, generator=generator)[:facts].sort().values * 2
    order = torch.randperm(KEYS, generator=generator).tolist()
    values = torch.randint(VALUES, (KEYS,), generator=generator).tolist()
    known: list[int] = []
    for place in places.tolist():
        chance = torch.rand(2, generator=generator)
        if not known or (bool(chance[0] < 1 / 3) and len(known) < KEYS):
            known.append(order[len(known)])
            ids[place] = BYTES + known[-1] * VALUES + values[known[-1]]
        else:
            key = known[int(chance[1] * len(known))]
            ids[place] = ASK + key
            ids[place + 1] = ANSWER + values[key]
            weight[place + 1] = 2 * len(ids) / facts
    return ids, weight


def batch(
    text: Tensor, length: int, windows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw windows of a text with facts planted, [windows, length], and the tokens' weights."""
    starts = torch.randint(len(text) - length, (windows,), generator=generator).tolist()
    facts = min(length // 5, 100)
    pairs = [plant(text[s : s + length], facts, generator) for s in starts]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def question(
    text: Tensor, length: int, facts: int, generator: torch.Generator, more: int = 32
) -> Question:
    """Plant different facts in a context of `length` and ask for all of them in another order."""
    start = int(torch.randint(len(text) - length - more, (1,), generator=generator))
    context = text[start : start + length].long()
    places = torch.randperm(length, generator=generator)[:facts]
    keys = torch.randperm(KEYS, generator=generator)[:facts]
    values = torch.randint(VALUES, (facts,), generator=generator)
    context[places] = BYTES + keys * VALUES + values
    order = torch.randperm(facts, generator=generator)
    following = text[start + length : start + length + more].long()
    return Question(context[None], (ASK + keys)[order], (ANSWER + values)[order], following)


def weighted_loss(model: Any, ids: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy in nats, each token counted by its weight."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    weight = weight[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


def train(
    model: Any,
    parameters: Any,
    text: Tensor,
    stages: Any,
    seed: int,
    rate: float,
    show: bool = True,
) -> list[dict[str, float]]:
    """Train on contexts that grow; returns step times and losses, a record a hundred steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    total = sum(steps for _, _, steps in stages)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * (1.0 - 0.9 * s / total)
    )
    model.train()
    records = []
    for length, windows, steps in stages:
        start, losses, accuracies = time.perf_counter(), [], []
        for step in range(steps):
            ids, weight = batch(text, length, windows, generator)
            loss = weighted_loss(model, ids, weight)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if (step + 1) % 100 == 0 or step + 1 == steps:
                with torch.no_grad():
                    ids, weight = batch(text, length, windows, generator)
                    best = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
                    answers = weight[:, 1:] > 1
                    accuracies.append(float((best == ids[:, 1:])[answers].float().mean()))
                records.append(
                    {
                        "length": length,
                        "step": step + 1,
                        "loss": sum(losses[-50:]) / len(losses[-50:]),
                        "accuracy": accuracies[-1],
                        "seconds_a_step": (time.perf_counter() - start) / (step + 1),
                    }
                )
                if show:
                    print(records[-1], flush=True)
    model.eval()
    return records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--family", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all numbers of steps")
    parser.add_argument(
        "--longest", type=cli.positive, default=LONGEST, help="leave out stages that are longer"
    )
    parser.add_argument("--threads", type=cli.positive, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = build(args.family)
    stages = [(n, w, max(1, round(s * args.scale))) for n, w, s in STAGES if n <= args.longest]
    train(model, list(model.parameters()), corpus.Text().train, stages, args.seed, args.rate)
    model.save_pretrained(args.out)
    print(f"saved in {args.out}")


if __name__ == "__main__":
    cli.run(main)
