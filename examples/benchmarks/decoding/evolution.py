"""Evolve an eviction policy on a model that recalls, and carry it over to another.

    python examples/benchmarks/decoding/evolution.py recall-seed0 --out policy.json

The fitness is the negative loss of answers when only a share of the tokens may be kept. A context
is read once; every candidate then decides on a copy of the cache, and is asked for all facts in one
pass. Contexts change every generation, and are the same for all of its candidates.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf
from torch import Tensor

from examples.benchmarks import cli, corpus, machine
from examples.benchmarks.decoding.evolve import evolve
from examples.benchmarks.decoding.recall import question
from pamm_compile import decoding
from pamm_compile.decoding.policy import PolicyLayer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model", type=Path, help="folder that recall.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the policy goes")
    parser.add_argument("--generations", type=cli.positive, default=60)
    parser.add_argument("--population", type=cli.positive, default=16)
    parser.add_argument("--sigma", type=float, default=0.065)
    parser.add_argument("--length", type=cli.positive, default=512)
    parser.add_argument("--share", type=float, default=1 / 8, help="of the tokens that are kept")
    parser.add_argument("--facts", type=cli.positive, default=16)
    parser.add_argument("--contexts", type=cli.positive, default=4, help="a generation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=cli.positive, default=1)
    return parser.parse_args(arguments)


class Everything(decoding.EvictionPolicy):
    """Keeps every token."""

    def forward(self, spectrum: Tensor, age: Tensor, real: Tensor) -> Tensor:
        return torch.ones_like(age, dtype=torch.float32)


class Fitness:
    """Negative loss of answers, of `population` policies a generation on the same contexts."""

    def __init__(self, model: Any, args: argparse.Namespace, text: Tensor) -> None:
        self.model = model
        self.args = args
        self.text = text
        self.generator = torch.Generator().manual_seed(args.seed)
        self.asked = 0
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Read other contexts."""
        args = self.args
        drawn = [
            question(self.text, args.length, args.facts, self.generator)
            for _ in range(args.contexts)
        ]
        self.cache = decoding.EvictionCache(Everything())
        contexts = torch.cat([q.context for q in drawn])
        self.model(contexts, cache=self.cache, use_cache=True, logits_to_keep=1)
        asked = torch.stack([q.asked for q in drawn])
        self.answers = torch.stack([q.answers for q in drawn])
        self.ids = torch.stack([asked, self.answers], dim=2).flatten(1)

    @torch.no_grad()
    def of(self, policy: decoding.EvictionPolicy) -> float:
        cache = copy.deepcopy(self.cache)
        for layer in cache.layers:
            assert isinstance(layer, PolicyLayer)
            layer.policy, layer.budget = policy, round(self.args.length * self.args.share)
            layer.evict_now()
        logits = self.model(self.ids, cache=cache, use_cache=True).logits[:, ::2]
        return -float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.answers.flatten())
        )

    def __call__(self, policy: decoding.EvictionPolicy) -> float:
        if self.asked and self.asked % self.args.population == 0:
            self.renew()
        self.asked += 1
        return self.of(policy)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = machine.facts(threads=args.threads)
    cli.announce(facts)
    model = decoding.attach(hf.AutoModelForCausalLM.from_pretrained(args.model).eval())
    text = corpus.Text()
    held_out = Fitness(model, argparse.Namespace(**{**vars(args), "seed": 10_000}), text.validation)
    fitness = Fitness(model, args, text.train)
    start = time.perf_counter()
    begin = decoding.EvictionPolicy()
    # Positive for all tokens to begin with: it is the budget that decides.
    begin.score.bias.fill_(1.0)
    print(f"zeros, held out: {held_out.of(begin):.4f}", flush=True)
    found = evolve(
        fitness,
        begin,
        generations=args.generations,
        population=args.population,
        sigma=args.sigma,
        seed=args.seed,
        centre_every=args.generations,
    )
    for number, each in enumerate(found.generations, 1):
        print(json.dumps({"generation": number, **each._asdict()}), flush=True)
    print(f"evolved, held out: {held_out.of(found.policy):.4f}")
    print(f"{found.generations[-1].evaluations} evaluations, {time.perf_counter() - start:.0f} s")
    found.policy.save(args.out, command=machine.command(), versions=facts["torch"])


if __name__ == "__main__":
    cli.run(main)
