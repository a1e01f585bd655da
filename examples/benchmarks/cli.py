"""Options that several scripts have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pamm_compile
from examples.benchmarks import machine


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    """Parse a positive integer."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return number


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return options as plain data."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the small model that the studies train."""
    group = parser.add_argument_group("model and data: Transformers' LLaMA on bytes of text")
    group.add_argument("--layers", type=positive, default=4)
    group.add_argument("--hidden", type=positive, default=128, help="features, n (default: 128)")
    group.add_argument("--heads", type=positive, default=4)
    group.add_argument("--batch", type=positive, default=16, help="windows a step (default: 16)")
    group.add_argument(
        "--sequence", type=positive, default=256, help="bytes a window (default: 256)"
    )
    group.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")


def parse_for_gpu(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    *,
    smoke: str,
    repeats: int,
    seconds: float,
    json: Path,
) -> argparse.Namespace:
    """Add the options of what times kernels, and parse; a CPU gets toy sizes or an error.

    Args:
        parser: with options of its own.
        arguments: None for the command line's.
        smoke: what --smoke runs.
        repeats, seconds, json: defaults.
    """
    parser.add_argument("--device", default=machine.default_device())
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--budget", type=float, default=seconds, help="seconds after which to end")
    parser.add_argument("--json", type=Path, default=json)
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.smoke:
        parser.error("these sizes are for a GPU; on a CPU add --smoke")
    return args


def prepare_study(args: argparse.Namespace) -> None:
    """Check the sizes, and set the threads."""
    if args.hidden % args.heads:
        raise SystemExit(f"--hidden {args.hidden} is not a multiple of --heads {args.heads}")
    if args.threads:
        torch.set_num_threads(args.threads)


def announce(facts: dict[str, Any]) -> None:
    """Print what `machine.facts` found."""
    print("\n".join(f"{name:13} {fact}" for name, fact in facts.items()), flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistaken option ends it with a sentence in place of a traceback."""
    try:
        main()
    except pamm_compile.InvalidOptionError as error:
        raise SystemExit(str(error)) from None
