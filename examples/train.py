"""Train a small byte-level language model with and without PAMM, and compare.

    python examples/train.py                        LLaMA, ratio 256, a few minutes on two cores
    python examples/train.py --ratio 64 256 512     several ratios beside one exact run
    python examples/train.py --model gpt2 --device cuda --dtype bfloat16

The text is the Python standard library's own sources, the models are Transformers' own classes,
and nothing is downloaded. All runs start from the same weights and see the same batches; their
steps alternate, so that step times are compared under the same conditions.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import common
import corpus
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pamm_compile

EXACT = "torch.compile"
_LAST = 50


@dataclasses.dataclass
class Run:
    """One of the models that train side by side."""

    name: str
    model: nn.Module
    compiled: nn.Module
    optimizer: torch.optim.Optimizer
    backend: pamm_compile.Backend | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ratio",
        type=float,
        nargs="+",
        default=[256.0],
        help="tokens per generator, one or several (default: 256)",
    )
    parser.add_argument("--steps", type=common.positive, default=300, help="default: 300")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile, too")
    parser.add_argument(
        "--validation-batches", type=common.positive, default=16, help="default: 16"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    common.add_model_options(parser)
    common.add_backend_options(parser)
    return parser.parse_args(arguments)


def make_runs(args: argparse.Namespace, device: torch.device) -> list[Run]:
    initial = common.build(args).to(device)
    # Dynamo keeps compiled code per function, and all runs share theirs.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(args.ratio) + 2)

    def run(name: str, backend: Any) -> Run:
        model = copy.deepcopy(initial)
        compiled = (
            model if backend is None else torch.compile(model, backend=backend, mode=args.mode)
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        ours = backend if isinstance(backend, pamm_compile.Backend) else None
        return Run(name, model, compiled, optimizer, ours)

    runs = [run(EXACT, "inductor")]
    runs += [run(f"PAMM {ratio:g}", common.make_backend(args, ratio)) for ratio in args.ratio]
    if args.eager:
        runs.append(run("eager", None))
    return runs


def loss_of(model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> Tensor:
    with common.precision(args):
        return model(**batch).loss


def train_step(
    run: Run, batch: dict[str, Tensor], rate: float, seed: int, args: argparse.Namespace
) -> None:
    device = torch.device(args.device)
    # The same dropout in every run.
    torch.manual_seed(seed)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    common.synchronize(device)
    start = time.perf_counter()
    run.optimizer.zero_grad()
    loss = loss_of(run.compiled, batch, args)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    common.synchronize(device)
    run.times.append(time.perf_counter() - start)
    run.losses.append(loss.item())


def train(runs: list[Run], text: corpus.Text, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    with tqdm(total=args.steps, unit="step", dynamic_ncols=True) as bar:
        for step in range(args.steps):
            batch = corpus.draw(text.train, args.model, args.batch, args.sequence, generator)
            batch = {name: each.to(args.device) for name, each in batch.items()}
            # Each goes first in turn: the first finds other caches than the rest.
            first = step % len(runs)
            for run in runs[first:] + runs[:first]:
                if step == 0:
                    bar.set_description(f"compiling {run.name}")
                seed = args.seed * args.steps + step
                train_step(run, batch, common.learning_rate(step, args.steps, args.lr), seed, args)
            bar.set_description("training")
            bar.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in runs})
            bar.update()


@torch.no_grad()
def validate(run: Run, text: corpus.Text, args: argparse.Namespace) -> float:
    """Return the loss on batches that are the same for every run, without torch.compile.

    PAMM changes no forward pass, so that nothing needs to be compiled for it.
    """
    generator = torch.Generator().manual_seed(0)
    run.model.eval()
    losses = []
    for _ in range(args.validation_batches):
        batch = corpus.draw(text.validation, args.model, args.batch, args.sequence, generator)
        batch = {name: each.to(args.device) for name, each in batch.items()}
        losses.append(loss_of(run.model, batch, args).item())
    run.model.train()
    return statistics.fmean(losses)


def summarize(run: Run, exact: Run, text: corpus.Text, args: argparse.Namespace) -> dict[str, Any]:
    """Return a run's figures, other than those that need the exact run's."""
    generator = torch.Generator().manual_seed(0)
    batch = corpus.draw(text.train, args.model, args.batch, args.sequence, generator)
    batch = {name: each.to(args.device) for name, each in batch.items()}
    run.optimizer.zero_grad()
    memory = pamm_compile.measure_memory(
        lambda: loss_of(run.compiled, batch, args), model=run.model, warmup=0
    )
    # The first step compiles.
    pairs = list(zip(run.times, exact.times, strict=True))
    sites = run.backend.report.compressed if run.backend else ()
    return {
        "name": run.name,
        "ratio": run.backend.options.ratio if run.backend else None,
        "generators": sorted({site.generators for site in sites}),
        "compressed_sites": len(sites),
        "train_loss": statistics.fmean(run.losses[-_LAST:]),
        "validation_loss": validate(run, text, args),
        "saved_bytes": memory.saved_bytes,
        "peak_bytes": memory.peak_bytes,
        "peak_source": memory.peak_source,
        "time_ratio": statistics.median(mine / its for mine, its in pairs[1:] or pairs),
        "losses": run.losses,
        "times_s": run.times,
    }


def text_table(results: list[dict[str, Any]], steps: int) -> str:
    exact = results[0]
    rows = [
        (
            each["name"],
            ",".join(map(str, each["generators"])) or "-",
            f"{each['train_loss']:.3f}",
            f"{each['validation_loss']:.3f}",
            f"{each['validation_gap']:+.3f}" if each is not exact else "-",
            common.mebibytes(each["saved_bytes"]),
            common.mebibytes(each["peak_bytes"]),
            f"{each['time_ratio']:.2f} ×",
        )
        for each in results
    ]
    header = ("run", "k", "train", "validation", "gap", "saved MiB", "peak MiB", "step time")
    return "\n".join(
        [
            common.table(header, rows),
            f"k: generators. train: loss over the last {min(_LAST, steps)} steps. "
            "gap: validation loss above the exact run's.",
            "saved: held for backward, parameters aside. "
            f"peak: of forward and backward; {exact['peak_source']}.",
            f"step time: by the exact run's, median of {max(1, steps - 1)} paired ratios.",
        ]
    )


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    exact = results[0]
    window = max(1, len(exact["losses"]) // 30)
    for number, each in enumerate(results):
        color = "black" if each is exact else f"C{number - 1}"
        steps, smooth = running_mean(each["losses"], window)
        top.plot(each["losses"], color=color, alpha=0.2, linewidth=0.8)
        top.plot(steps, smooth, color=color, label=each["name"])
        if each is not exact:
            difference = [a - b for a, b in zip(each["losses"], exact["losses"], strict=True)]
            bottom.plot(*running_mean(difference, window), color=color)
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set(title=title, ylabel="training loss, nats a byte")
    top.legend()
    bottom.set(xlabel="step", ylabel=f"above\n{EXACT}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(values: list[float], window: int) -> tuple[list[int], list[float]]:
    """Return steps, and the mean of the window that ends at each."""
    steps = list(range(window - 1, len(values)))
    return steps, [statistics.fmean(values[step - window + 1 : step + 1]) for step in steps]


def main() -> None:
    args = parse()
    device = common.prepare(args)
    started = time.perf_counter()
    facts = common.announce(args)
    text = corpus.Text()
    runs = make_runs(args, device)
    count = sum(parameter.numel() for parameter in runs[0].model.parameters())
    what = f"{type(runs[0].model).__name__}, {count:,} parameters"
    print(f"{'model':13} {what}, {args.batch * args.sequence:,} tokens a step, {args.dtype}")
    print(f"{'text':13} {len(text.train):,} bytes to train, {len(text.validation):,} to validate")

    train(runs, text, args)

    results = [summarize(run, runs[0], text, args) for run in runs]
    for each in results:
        for kind in ("train", "validation"):
            each[f"{kind}_gap"] = each[f"{kind}_loss"] - results[0][f"{kind}_loss"]
    for run in runs:
        if run.backend:
            print(f"\n{run.name}\n{run.backend.report}")
    print(f"\n{text_table(results, args.steps)}")

    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"train-{args.model}-seed{args.seed}"
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    record = {
        "environment": facts,
        "options": options,
        "parameters": count,
        "seconds": time.perf_counter() - started,
        "runs": results,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, f"{what}, seed {args.seed}", stem.with_suffix(".png"))
    print(f"\n{record['seconds']:.0f} s; wrote {stem}.json and {stem}.png")


if __name__ == "__main__":
    common.run(main)
