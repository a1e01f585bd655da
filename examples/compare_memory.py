"""Measure one training step five ways: eager, torch.compile, with a memory budget, and with PAMM.

    python examples/compare_memory.py
    python examples/compare_memory.py --model gpt2 --hidden 768 --heads 12 --layers 12
    python examples/compare_memory.py --device cuda --dtype bfloat16 --hidden 2048 --heads 16

With an activation memory budget below 1, torch.compile recomputes what is cheap, among it most of
what PAMM would otherwise save: both are shown, alone and together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import common
import corpus
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pamm_compile


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=256.0, help="default: 256")
    parser.add_argument(
        "--budget", type=float, default=0.99, help="fraction of activation memory (default: 0.99)"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps per arm (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    common.add_model_options(parser)
    common.add_backend_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    device = common.prepare(args)
    facts = common.announce(args)
    model = common.build(args).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    what = f"{type(model).__name__}, {count:,} parameters"
    print(f"{'model':13} {what}, {args.batch * args.sequence:,} tokens a step, {args.dtype}\n")
    generator = torch.Generator().manual_seed(args.seed)
    batch = corpus.draw(corpus.Text().train, args.model, args.batch, args.sequence, generator)
    batch = {name: each.to(device) for name, each in batch.items()}

    def loss(model: nn.Module) -> Tensor:
        with common.precision(args):
            return model(**batch).loss

    backend = common.make_backend(args, args.ratio)
    with common.precision(args):
        report = pamm_compile.explain(model, using=backend, **batch)
    print(f"{report}\n")
    with tqdm(total=5, unit="arm", dynamic_ncols=True) as bar:

        def show(name: str) -> None:
            bar.set_description(name)
            bar.update()

        comparison = pamm_compile.compare_memory(
            model,
            loss,
            backend=backend,
            budget=args.budget,
            steps=args.steps,
            mode=args.mode,
            progress=show,
        )
    print(comparison)

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"compare-{args.model}.json"
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    record = {
        "environment": facts,
        "options": options,
        "parameters": count,
        "report": report.to_dict(),
        "comparison": comparison.to_dict(),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    common.run(main)
