"""What the examples share: models, options, and facts about the machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# torch.profiler's backend reads this when torch is imported, and else prints a line per start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import psutil
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import pamm_compile

MODELS = ("llama", "gpt2", "roberta")

_BYTES = 256


def build(args: argparse.Namespace) -> nn.Module:
    """Build one of Transformers' own classes from its configuration, with random weights."""
    # Three matrices of 8/3 · hidden do the work of two of 4 · hidden, as in LLaMA.
    gated = math.ceil(args.hidden * 8 / 3 / 32) * 32
    return make_model(
        args.model,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        inner=gated if args.model == "llama" else 4 * args.hidden,
        vocabulary=_BYTES + (args.model == "roberta"),
        positions=args.sequence,
        dropout=args.dropout,
    )


def make_model(
    family: str,
    *,
    hidden: int,
    layers: int,
    heads: int,
    inner: int,
    vocabulary: int,
    positions: int,
    dropout: float = 0.0,
) -> nn.Module:
    """Build one of Transformers' own classes, with random weights.

    Args:
        family: one of MODELS.
        hidden: features, n.
        layers: of the stack.
        heads: of attention.
        inner: features between the matrices of the MLP.
        vocabulary: tokens; at least 256 for `corpus.draw`, for "roberta" 257.
        positions: longest sequence.
        dropout: probability, everywhere the model has any.
    """
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads}
    if family == "llama":
        config = LlamaConfig(
            **shape,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            max_position_embeddings=positions,
            attention_dropout=dropout,
            use_cache=False,
        )
        return LlamaForCausalLM(config)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=hidden,
            n_inner=inner,
            n_layer=layers,
            n_head=heads,
            n_positions=positions,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        model = GPT2LMHeadModel(config)
        # Transformers would warn that it takes this for granted, and the warning breaks the graph.
        model.loss_type = "ForCausalLM"
        return model
    config = RobertaConfig(
        **shape,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        # Positions begin behind the padding token's number.
        max_position_embeddings=positions + 1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        type_vocab_size=1,
        use_cache=False,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return RobertaForMaskedLM(config)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs on what."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", choices=MODELS, default="llama")
    group.add_argument("--layers", type=positive, default=4)
    group.add_argument("--hidden", type=positive, default=128, help="features, n (default: 128)")
    group.add_argument("--heads", type=positive, default=4)
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--batch", type=positive, default=16, help="windows a step (default: 16)")
    group.add_argument(
        "--sequence", type=positive, default=256, help="bytes a window (default: 256)"
    )
    group.add_argument("--device", default=default_device(), help="default: %(default)s")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 is autocast, with float32 weights (default: float32)",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pamm_compile.backend` other than the ratio."""
    group = parser.add_argument_group("PAMM")
    group.add_argument(
        "--epsilon", type=float, help="drop tokens farther from their generator (default: ∞)"
    )
    group.add_argument("--sampling", choices=("stratified", "uniform"), default="stratified")
    group.add_argument("--min-generators", type=positive, default=1, help="least k (default: 1)")
    group.add_argument("--min-tokens", type=positive, default=256, help="default: 256")
    group.add_argument(
        "--targets",
        default="qkv",
        help="qkv, linear, or a regular expression for parameter names (default: qkv)",
    )
    group.add_argument("--mode", help="as torch.compile's, for every compiled run")


def positive(text: str) -> int:
    """Parse a positive integer."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return number


def make_backend(args: argparse.Namespace, ratio: float) -> pamm_compile.Backend:
    """Make the backend that the options ask for, with an empty report."""
    try:
        targets = args.targets if args.targets in ("qkv", "linear") else re.compile(args.targets)
    except re.error as error:
        raise SystemExit(f"--targets {args.targets} is no regular expression: {error}") from None
    backend = pamm_compile.backend(
        ratio=ratio,
        epsilon=args.epsilon,
        sampling=args.sampling,
        min_generators=args.min_generators,
        min_tokens=args.min_tokens,
        targets=targets,
        seed=args.seed,
    )
    # The same options give the same object: what it compiled before is not of this run.
    backend.report.clear()
    return backend


def run(main: Callable[[], None]) -> None:
    """Run an example; a mistaken option ends it with a sentence in place of a traceback."""
    try:
        main()
    except pamm_compile.InvalidOptionError as error:
        raise SystemExit(str(error)) from None


def prepare(args: argparse.Namespace) -> torch.device:
    """Check the device, set threads and seed."""
    if args.hidden % args.heads:
        raise SystemExit(f"--hidden {args.hidden} is not a multiple of --heads {args.heads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {args.device} does not work here: {error}") from error
    return device


def precision(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Return autocast, or nothing for float32."""
    if args.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.dtype))


def default_device() -> str:
    """Return the accelerator's type if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the machine and the versions that decide what a run measures."""
    facts = {"machine": f"{processor()}, {torch.get_num_threads()} threads"}
    facts["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    if torch.device(args.device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(args.device)
    facts["system"] = platform.platform(terse=True)
    facts["python"] = platform.python_version()
    for package in ("torch", "triton", "transformers", "pamm-compile"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "none"
    return facts


def announce(args: argparse.Namespace) -> dict[str, str]:
    """Print and return what `environment` finds."""
    facts = environment(args)
    print("\n".join(f"{name:13} {fact}" for name, fact in facts.items()))
    return facts


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise linearly over a tenth of the steps, then fall to a tenth of the peak along a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def commit() -> str | None:
    """Return the commit of the checkout that these examples are in, if they are in one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align rows, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["─" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, rule, *rows)
    )


def mebibytes(count: int) -> str:
    """Write a number of bytes in MiB."""
    return f"{count / 2**20:.1f}"
