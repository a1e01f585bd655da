"""Tune a small byte-level LLaMA exactly and with approximate weight gradients, and compare.

    python examples/train.py                               a few minutes on two cores
    python examples/train.py --ratio 64 256 512            several ratios of the paper's PAMM
    python examples/train.py --rules "mlp=pamm:32"         other rules in place of the whole model
    python examples/train.py --pretrain 0 --steps 300      from random weights
    python examples/train.py --lora 8                      adapters of every linear layer, by PEFT
    python examples/train.py --device cuda --dtype bfloat16 --hidden 512 --heads 8

A first phase trains exactly on code (the Python standard library's sources); then every arm goes on
from those weights on prose (Python's reference documentation), on the same batches. Runs that start
from trained weights hardly drift apart, so that a gap of thousandths of a nat can be read; from
random weights nothing below a tenth can. Steps of the arms alternate, so that their times are of
the same minutes. The model is Transformers' own class, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile

WHOLE_MODEL = "linear=subspace"


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
    parser.add_argument("--ratio", type=float, nargs="*", default=[256], help="tokens a generator")
    parser.add_argument("--rules", default=WHOLE_MODEL, help=f"of the last arm: {WHOLE_MODEL}")
    parser.add_argument("--pretrain", type=int, default=200, help="exact steps on code first")
    parser.add_argument("--steps", type=int, default=100, help="steps of every arm")
    parser.add_argument("--lora", type=int, metavar="R", help="tune adapters of this rank alone")
    parser.add_argument("--lr", type=float, help="peak; default: 5e-4, or 2e-3 for new weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="features, n")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--sequence", type=int, default=256, help="bytes a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of table and plot")
    args = parser.parse_args(arguments)
    args.lr = args.lr or (5e-4 if args.pretrain and not args.lora else 2e-3)
    return args


def arms(args: argparse.Namespace) -> dict[str, Any]:
    """Return the backends to compare: exact, the paper's, and every linear layer."""
    chosen: dict[str, Any] = {"exact": "inductor"}
    for ratio in args.ratio:
        chosen[f"PAMM {ratio:g} on Q, K, V"] = pamm_compile.backend(ratio=ratio)
    name = "whole model" if args.rules == WHOLE_MODEL else args.rules
    chosen[name] = pamm_compile.backend(rules=args.rules)
    return chosen


def code(*, without: str = "") -> tuple[Tensor, Tensor]:
    """Return the standard library's sources as bytes, every 20th file to validate on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", without}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    texts = [(root / p).read_bytes() for p in paths if not left_out & set(Path(p).parts)]
    validation = texts[::20]
    del texts[::20]
    return as_bytes(b"".join(texts)), as_bytes(b"".join(validation))


def prose() -> tuple[Tensor, Tensor]:
    """Return Python's reference documentation as bytes, its last 20th to validate on."""
    text = as_bytes("\n".join(topics.topics.values()).encode())
    return text[: -len(text) // 20], text[-len(text) // 20 :]


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw(text: Tensor, generator: torch.Generator, args: argparse.Namespace) -> dict[str, Tensor]:
    starts = torch.randint(len(text) - args.sequence, (args.batch, 1), generator=generator)
    ids = text[starts + torch.arange(args.sequence)].long().to(args.device)
    return {"input_ids": ids, "labels": ids}


def make_run(name: str, backend: Any, initial: nn.Module, args: argparse.Namespace) -> Run:
    model = copy.deepcopy(initial)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    ours = backend if isinstance(backend, pamm_compile.Backend) else None
    if ours:
        # Equal options are one object, which may have compiled something before.
        ours.report.clear()
    return Run(name, model, compiled, optimizer, ours)


def loss_of(model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> Tensor:
    is_half = args.dtype == "bfloat16"
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=is_half):
        return model(**batch).loss


def train(runs: list[Run], text: Tensor, steps: int, lr: float, args: argparse.Namespace) -> None:
    """Train all runs, one step of each in turn: warm-up, then a cosine down to a tenth."""
    generator = torch.Generator().manual_seed(args.seed)
    warmup = max(1, steps // 10)
    for step in tqdm(range(steps), desc=", ".join(run.name for run in runs), dynamic_ncols=True):
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = lr * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * done))
        batch = draw(text, generator, args)
        # Whoever goes first finds other caches than the rest: each does in turn.
        first = step % len(runs)
        for run in runs[first:] + runs[:first]:
            run.optimizer.param_groups[0]["lr"] = rate
            start = time.perf_counter()
            run.optimizer.zero_grad()
            loss = loss_of(run.compiled, batch, args)
            loss.backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            # Reading the loss waits for the device.
            run.losses.append(loss.item())
            run.times.append(time.perf_counter() - start)


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, args: argparse.Namespace) -> float:
    """Return the loss on unseen batches, without torch.compile: no method changes the forward."""
    generator = torch.Generator().manual_seed(0)
    model.eval()
    losses = [loss_of(model, draw(text, generator, args), args).item() for _ in range(16)]
    model.train()
    return statistics.fmean(losses)


def summarize(run: Run, exact: Run, text: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    batch = draw(text, torch.Generator().manual_seed(0), args)
    run.optimizer.zero_grad()
    memory = pamm_compile.measure_memory(
        lambda: loss_of(run.compiled, batch, args), model=run.model, warmup=0
    )
    # The first steps compile.
    ratios = [a / b for a, b in zip(run.times, exact.times, strict=True)]
    return {
        "name": run.name,
        "compressed_sites": len(run.backend.report.compressed) if run.backend else 0,
        "validation_loss": validate(run.model, text, args),
        "saved_bytes": memory.saved_bytes,
        "peak_bytes": memory.peak_bytes,
        "peak_source": memory.peak_source,
        "time_ratio": statistics.median(ratios[2:] or ratios),
        "losses": run.losses,
        "times_s": run.times,
    }


def table(results: list[dict[str, Any]]) -> str:
    exact = results[0]
    lines = [
        "| arm | validation loss | above exact | saved MiB | peak MiB | step time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for each in results:
        gap = each["validation_loss"] - exact["validation_loss"]
        saved, peak = (each[f"{kind}_bytes"] / 2**20 for kind in ("saved", "peak"))
        lines.append(
            f"| {each['name']} | {each['validation_loss']:.4f} | {gap:+.4f} | {saved:.1f} "
            f"| {peak:.1f} | {each['time_ratio']:.2f} × |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    exact = results[0]["losses"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for each in results:
        top.plot(each["losses"], label=each["name"], linewidth=0.8)
        bottom.plot([a - b for a, b in zip(each["losses"], exact, strict=True)], linewidth=0.8)
    top.set(ylabel="training loss, nats a byte")
    top.legend()
    bottom.set(xlabel="step", ylabel="above exact")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    args = parse()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=math.ceil(args.hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        use_cache=False,
    )
    initial = LlamaForCausalLM(config).to(args.device).train()
    count = sum(parameter.numel() for parameter in initial.parameters())
    print(f"{count:,} parameters, {args.batch * args.sequence:,} tokens a step, {args.dtype}")
    if args.pretrain:
        exactly = make_run("exact, on code", "inductor", initial, args)
        # What the model is then tuned on it must not have seen.
        train([exactly], code(without="pydoc_data")[0], args.pretrain, 2e-3, args)
        initial = exactly.model
    if args.lora:
        # Adapters alone keep X for their A: the weights beside them are frozen.
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
        initial = get_peft_model(initial, adapters)
    seen, unseen = prose() if args.pretrain else code()
    # Dynamo keeps compiled code per function, and all runs share theirs.
    chosen = arms(args)
    torch._dynamo.config.recompile_limit = 8 + 2 * len(chosen)
    runs = [make_run(name, backend, initial, args) for name, backend in chosen.items()]
    train(runs, seen, args.steps, args.lr, args)
    results = [summarize(run, runs[0], unseen, args) for run in runs]
    for run in runs:
        if run.backend:
            print(f"\n{run.name}\n{run.backend.report}")
    print(f"\n{table(results)}")
    print(f"saved: held for backward, parameters aside; peak: {results[0]['peak_source']};")
    print("step time: by the exact run's, median of paired ratios")

    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"train-seed{args.seed}"
    record = {
        "options": {**vars(args), "out": str(args.out)},
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
        "runs": results,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, stem.with_suffix(".png"))
    print(f"\n{record['seconds']:.0f} s; wrote {stem}.json and {stem}.png")


if __name__ == "__main__":
    main()
