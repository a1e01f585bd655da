"""Train small language models with approximate weight gradients of several kinds, and compare.

    python examples/studies/quality.py --methods exact pamm:256 subspace:20 --seeds 0 1 2
    python examples/studies/quality.py --methods exact generators:32 --pretrain 300 --lr 5e-4
    python examples/studies/quality.py --table runs/quality.jsonl

choices.py says how methods are written; the package's own run as they ship. Only the weight
gradients of the projections are approximated; training is fp32 and eager, and the bytes are those
that a method would store of bfloat16 inputs. Every run is one line of JSON in --out; runs that are
already there are not repeated, so that a study may be interrupted. Losses are in nats a byte.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.benchmarks import cli, corpus, machine, models, tables, training
from examples.studies import choices, estimators
from examples.studies.choices import Choice
from pamm_compile.methods.base import Method
from pamm_compile.size import Size

TARGETS = {
    "qkv": r"\.(q|k|v)_proj$",
    "o": r"\.o_proj$",
    "gate+up": r"\.(gate|up)_proj$",
    "down": r"\.down_proj$",
    "mlp": r"\.(gate|up|down)_proj$",
    "qkv+mlp": r"\.(q|k|v|gate|up|down)_proj$",
    "linear": r"_proj$",
    "all but qkv": r"\.(o|gate|up|down)_proj$",
    "all but o": r"\.(q|k|v|gate|up|down)_proj$",
    "all but gate+up": r"\.(q|k|v|o|down)_proj$",
    "all but down": r"\.(q|k|v|o|gate|up)_proj$",
    "first layer": r"layers\.0\..*_proj$",
    "all but the first layer": r"layers\.[1-9]\d*\..*_proj$",
}
_LAST = 50
_DEFAULTS = {"optimizer": "adamw", "clip": 1.0, "average": 0.0, "warmup": 0}
"""Options that a record names only where they are others."""


class Coder:
    """What the projections of one input share: what is stored of it, once a step."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.method: Method | None = None
        self.outputs: list[int] = []
        self.step = 0
        self.stored_bytes = 0
        """Of the last step that was not exact."""
        self._of: Tensor | None = None
        self._stored: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the method stores of an input [..., n]."""
        if x is not self._of:
            assert self.method is not None
            flat = x.detach().flatten(0, -2)
            seed = estimators.seed_of(flat, self.step, self.number)
            self._stored = self.method.store(flat, seed, self.outputs)
            # As in training with bfloat16, though the arithmetic here is float32.
            size = Size(*flat.shape, tuple(self.outputs), torch.bfloat16)
            self.stored_bytes = self.method.stored_bytes(size)
            self._of = x
        return self._stored

    def forget(self) -> None:
        self._of, self._stored = None, ()


class _Linear(torch.autograd.Function):
    """F.linear whose weight gradient is a method's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, method: Method, *stored: Tensor) -> Tensor:
        ctx.method = method
        ctx.save_for_backward(weight, *stored)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *stored = ctx.saved_tensors
        (dz,) = grads
        (dw,) = ctx.method.weight_gradients(stored, [dz.flatten(0, -2)], [False])
        return dz @ weight, dw.to(weight.dtype), None, *([None] * len(stored))


class CodedLinear(nn.Module):
    """A linear layer without bias that may train on the approximation of its input."""

    def __init__(self, linear: nn.Linear, coder: Coder) -> None:
        super().__init__()
        assert linear.bias is None
        self.weight = linear.weight
        self.coder = coder
        coder.outputs.append(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.coder.method is None or not torch.is_grad_enabled():
            return F.linear(x, self.weight)
        stored = self.coder(x)
        out: Tensor = _Linear.apply(x, self.weight, self.coder.method, *stored)
        return out


def replace_projections(model: nn.Module, pattern: str) -> list[Coder]:
    """Replace the linear layers whose names match; those of one module and input share a coder."""
    coders: dict[tuple[str, str], Coder] = {}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(pattern, name)
    ]
    for name, linear in found:
        parent, _, child = name.rpartition(".")
        # o and down read another input than their siblings.
        kind = child if child in ("o_proj", "down_proj") else "first"
        coder = coders.setdefault((parent, kind), Coder(len(coders)))
        setattr(model.get_submodule(parent), child, CodedLinear(linear, coder))
    return list(coders.values())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=["exact", "pamm:256"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", choices=TARGETS, default="qkv")
    parser.add_argument("--steps", type=cli.positive, default=300)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=0, help="steps (default: a tenth)")
    parser.add_argument("--optimizer", choices=training.OPTIMIZERS, default="adamw")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of all gradients")
    parser.add_argument(
        "--average",
        type=float,
        default=0.0,
        help="validate the average of the weights that keeps so much of itself in a step",
    )
    parser.add_argument(
        "--pretrain",
        type=int,
        default=0,
        help="train exactly for so many steps on code first, then on prose by each method",
    )
    parser.add_argument("--validation-batches", type=cli.positive, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/quality.jsonl"))
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files hold instead")
    cli.add_study_options(parser)
    return parser.parse_args(arguments)


def train(
    model: nn.Module,
    coders: Sequence[Coder],
    choice: Choice,
    text: corpus.Text | corpus.Prose,
    steps: int,
    seed: int,
    args: argparse.Namespace,
) -> list[float]:
    """Train a model in place, and return the loss of every step."""
    optimizer = training.optimizer_of(model, args.lr, args.optimizer)
    run = training.Run(
        choice.text, model, lambda batch: model(**batch).loss, optimizer, clip=args.clip
    )
    average = training.Average(model, args.average)
    data = training.batches(text.train, "llama", args.batch, args.sequence, seed)
    for step in range(steps):
        for coder in coders:
            coder.method = None if choice.is_exact_in(step, steps) else choice.method
            coder.step = step
        run.step(next(data), training.learning_rate(step, steps, args.lr, args.warmup))
        average.update()
        for coder in coders:
            coder.forget()
    average.apply()
    return run.losses


def validate(model: nn.Module, text: corpus.Text | corpus.Prose, args: argparse.Namespace) -> float:
    data = training.batches(text.validation, "llama", args.batch, args.sequence, 0)
    return training.validate(
        lambda batch: model(**batch).loss, model, data, args.validation_batches
    )


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Return what two runs must share to be compared."""
    names = ("layers", "hidden", "heads", "batch", "sequence", "steps", "lr", "targets", "pretrain")
    others = [name for name, usual in _DEFAULTS.items() if getattr(args, name) != usual]
    return {name: getattr(args, name) for name in (*names, *others)}


def run_one(
    initial: nn.Module,
    choice: Choice,
    text: corpus.Text | corpus.Prose,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    started = time.perf_counter()
    model = copy.deepcopy(initial)
    coders = replace_projections(model, TARGETS[args.targets])
    losses = train(model, coders, choice, text, args.steps, seed + 1000 * args.pretrain, args)
    tokens = args.batch * args.sequence
    stored = [coder.stored_bytes for coder in coders if coder.stored_bytes]
    return {
        "method": choice.text,
        "seed": seed,
        "setting": setting(args),
        "bytes_per_token": max(stored) / tokens if stored else 2.0 * args.hidden,
        "train": statistics.fmean(losses[-_LAST:]),
        "validation": validate(model, text, args),
        "losses": [round(loss, 4) for loss in losses],
        "seconds": round(time.perf_counter() - started, 1),
        "environment": machine.facts(),
    }


def pretrained(text: corpus.Text | corpus.Prose, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return a model with random weights, trained exactly for the --pretrain steps."""
    torch.manual_seed(seed)
    model = models.study_model(args)
    if args.pretrain:
        exact = copy.copy(args)
        exact.lr = 2e-3
        train(model, [], choices.parse("exact"), text, args.pretrain, seed, exact)
    return model


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Return Markdown: one table a setting, one row a method, gaps paired by seed."""
    settings: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for run in runs:
        shared = {name: value for name, value in run["setting"].items() if name != "targets"}
        targets = run["setting"]["targets"]
        # The exact run is the same whatever would be compressed.
        name = run["method"] if targets == "qkv" else f"{run['method']} on {targets}"
        name = "exact" if run["method"] == "exact" else name
        settings.setdefault(json.dumps(shared), defaultdict(dict))[name][run["seed"]] = run
    parts = []
    for key, methods in settings.items():
        described = ", ".join(f"{name} {value}" for name, value in json.loads(key).items())
        exact = methods.get("exact", {})
        lines = [
            f"{described}:",
            "",
            "| method | bytes a token | validation loss by seed | above exact by seed | mean "
            "| standard error |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for method, seeds in methods.items():
            gaps = [
                run["validation"] - exact[seed]["validation"]
                for seed, run in sorted(seeds.items())
                if seed in exact and method != "exact"
            ]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            lines.append(
                f"| `{method}` | {next(iter(seeds.values()))['bytes_per_token']:.1f} | "
                + ", ".join(f"{run['validation']:.3f}" for _, run in sorted(seeds.items()))
                + " | "
                + (", ".join(f"{gap:+.3f}" for gap in gaps) or "-")
                + (f" | {statistics.fmean(gaps):+.3f} | {error:.3f} |" if gaps else " | - | - |")
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.table:
        print(table(run for path in args.table for run in tables.records(path)))
        return
    cli.prepare_study(args)
    methods = [choices.parse(method) for method in args.methods]
    # What a model is then tuned on it must not have seen before.
    text = corpus.Text(without=("pydoc_data",)) if args.pretrain else corpus.Text()
    tuned = corpus.Prose() if args.pretrain else text
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        known = {
            run["method"]
            for run in tables.records(args.out)
            if run["seed"] == seed and run["setting"] == setting(args)
        }
        wanted = [method for method in methods if method.text not in known]
        initial = pretrained(text, seed, args) if wanted else None
        for method in wanted:
            assert initial is not None
            run = run_one(initial, method, tuned, seed, args)
            with args.out.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(
                f"seed {seed}  {method.text:32} {run['bytes_per_token']:8.1f} bytes a token  "
                f"train {run['train']:.3f}  validation {run['validation']:.3f}  "
                f"{run['seconds']:.0f} s",
                flush=True,
            )
    print(f"\n{table(tables.records(args.out))}\n\n{args.out}")


if __name__ == "__main__":
    cli.run(main)
