"""`pamm-compile` on the command line: what would be compressed in a model, and what it costs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pamm_compile import checks
from pamm_compile.devices import DEVICES
from pamm_compile.errors import InvalidOptionError, PammError
from pamm_compile.inspect.compare import compare_memory
from pamm_compile.inspect.explain import explain
from pamm_compile.inspect.fidelity import fidelity
from pamm_compile.inspect.recommend import LIMITS, recommend
from pamm_compile.integrations.configurations import Asked, from_config
from pamm_compile.options import RECOMMENDED, Goal
from pamm_compile.private import memory
from pamm_compile.torch_backend import Backend, backend
from pamm_compile.trials.task import DTYPES
from pamm_compile.trials.trial import trial

_OF_TRIAL = ("model", "batches", "loss", "held_out", "score", "optimizer", "clip")
_STRICTEST = min(LIMITS, key=lambda task: LIMITS[task])
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model, and a batch to call it with."""

    model: nn.Module
    batch: dict[str, Any]

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the model on the batch."""
        return _loss_of(model(**self.batch))


def _loss_of(out: Any) -> Tensor:
    """Return what is trained on: the output's `loss`, or the mean square of a tensor."""
    found = getattr(out, "loss", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(out, Tensor):
        return out if out.dim() == 0 else out.float().square().mean()
    raise InvalidOptionError(
        f"the model returned {type(out).__name__}, which has no loss. Return a tensor, or an "
        "output with a `loss`; a batch of Transformers' models needs labels."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as on the command line, without the program's name; None reads them there.

    Returns:
        The exit status: 0, or 2 if an argument is not allowed.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        print(chosen.run(chosen))
    except PammError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _explain(chosen: argparse.Namespace) -> str:
    # Nothing is allocated, so that the model may be larger than the machine.
    with memory.fake_mode() if chosen.config else nullcontext():
        subject = _subject(chosen)
        report = explain(
            subject.model, using=_backend(chosen), device=chosen.times_on, **subject.batch
        )
    return report.to_json() if chosen.json else report.text()


def _fidelity(chosen: argparse.Namespace) -> str:
    subject = _subject(chosen)
    found = fidelity(
        subject.model,
        rules=chosen.rules or RECOMMENDED,
        draws=chosen.draws,
        loss=_loss_of,
        **subject.batch,
    )
    return found.to_json() if chosen.json else found.text()


def _recommend(chosen: argparse.Namespace) -> str:
    subject = _subject(chosen)
    asked = {"task": chosen.task, "max_error": chosen.max_error, "time": chosen.time}
    if all(each is None for each in asked.values()):
        asked["task"] = _STRICTEST
    found = recommend(
        subject.model,
        **asked,
        draws=chosen.draws,
        loss=_loss_of,
        **subject.batch,
    )
    return json.dumps(found.to_dict(), indent=2) if chosen.json else found.text()


def _compare(chosen: argparse.Namespace) -> str:
    subject = _subject(chosen)
    comparison = compare_memory(
        subject.model,
        subject.loss,
        backend=_backend(chosen),
        budget=chosen.budget,
        steps=chosen.steps,
        progress=lambda name: print(f"measuring {name} …", file=sys.stderr),
    )
    return comparison.to_json() if chosen.json else comparison.text()


def _trial(chosen: argparse.Namespace) -> str:
    if not chosen.subject:
        raise InvalidOptionError(
            "a model is needed: MODULE:FUNCTION, which returns a model and its batches."
        )
    try:
        # Before minutes of training rather than after.
        Path(chosen.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOptionError(f"--out={chosen.out!r} cannot be written: {error}.") from error
    torch.manual_seed(chosen.seed)
    given = _arguments_of_trial(chosen.subject, _made_by(chosen.subject))
    # What was left out stays as the package recommends it.
    asked = {"goal": chosen.goal, "min_tokens": chosen.min_tokens}
    common = {name: value for name, value in asked.items() if value is not None}
    arms = {f"ratio {ratio:g}": backend(ratio, **common) for ratio in chosen.ratio}
    arms |= {rules: backend(rules=rules, **common) for rules in chosen.rules}
    found = trial(
        **given,
        backend=arms or backend(**common),
        steps=chosen.steps,
        lr=chosen.lr,
        dtype=chosen.dtype,
        seed=chosen.seed,
    )
    wrote = found.save(chosen.out)
    return found.to_json() if chosen.json else "\n".join([found.text(), "", *wrote])


def _arguments_of_trial(name: str, made: object) -> dict[str, Any]:
    """Return what a user's function returned, as keyword arguments of `trial`."""
    match made:
        case (nn.Module(), _):
            return dict(zip(_OF_TRIAL, made, strict=False))
        case Mapping():
            for key in made:
                if key not in _OF_TRIAL:
                    raise checks.unknown_option(key, _OF_TRIAL)
            if "model" in made and "batches" in made:
                return dict(made)
            had = f"a mapping of {checks.shown(list(made))}"
        case _:
            had = type(made).__name__
    raise InvalidOptionError(
        f"{name} returned {had}: it must return a model and its batches, or a mapping of these, "
        f"under the names {', '.join(_OF_TRIAL)}, of which the first two are needed. "
        "help(pamm_compile.trial) explains them."
    )


def _backend(chosen: argparse.Namespace) -> Backend:
    return backend(rules=chosen.rules, goal=chosen.goal, min_tokens=chosen.min_tokens)


def _subject(chosen: argparse.Namespace) -> Subject:
    if bool(chosen.subject) == bool(chosen.config):
        raise InvalidOptionError(
            "one model is needed: either MODULE:FUNCTION, which returns a model and a batch, or "
            "--config path/to/config.json of a Transformers model."
        )
    if chosen.config:
        asked = Asked(chosen.batch, chosen.sequence, _DTYPES[chosen.dtype], chosen.device)
        model, batch = from_config(Path(chosen.config), asked, random=chosen.command != "explain")
        return Subject(model, batch)
    return _from_function(chosen.subject)


def _from_function(name: str) -> Subject:
    made = _made_by(name)
    match made:
        case (nn.Module() as model, Mapping() as batch):
            return Subject(model.train(), dict(batch))
    raise InvalidOptionError(
        f"{name} returned {type(made).__name__}: it must return a model and a batch, which is "
        "a mapping of keyword arguments."
    )


def _made_by(name: str) -> Any:
    """Return what a function returns that is named as MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise InvalidOptionError(f"{checks.shown(name)} is not allowed: write MODULE:FUNCTION.")
    # As `python -m` does: what lies in the current folder can be named.
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InvalidOptionError(f"{name!r} cannot be imported: {error}.") from error
    return make()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pamm-compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in _COMMANDS:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if name == "trial":
            _add_trial(command)
            continue
        _add_common(command)
        if name == "explain":
            text = f"show the times that a model of it gives: {', '.join(DEVICES)}"
            command.add_argument("--times-on", metavar="GPU", help=text)
        if name in ("fidelity", "recommend"):
            command.add_argument("--draws", type=int, default=4, help="of every method")
        if name == "recommend":
            limits = ", ".join(f"{limit:g} for {task}" for task, limit in LIMITS.items())
            text = f"what sets the error that is allowed: {limits} (default: {_STRICTEST})"
            command.add_argument("--task", choices=tuple(LIMITS), help=text)
            text = "relative error of a weight gradient that is allowed, in place of the task's"
            command.add_argument("--max-error", type=float, help=text)
            text = "of a step by an exact one's, in place of an error: the least error in so much"
            command.add_argument("--time", type=float, help=text)
        if name == "compare":
            command.add_argument("--budget", type=float, default=0.99, help="of the further arms")
            command.add_argument("--steps", type=int, default=10, help="timed steps of each arm")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "subject", nargs="?", metavar="MODULE:FUNCTION", help="returns a model and a batch"
    )
    command.add_argument("--config", help="a Transformers config.json; weights are random")
    text = f'such as "qkv=pamm:256, mlp=pamm:64"; without it, and without a goal, {RECOMMENDED}'
    command.add_argument("--rules", help=f"{text} for speed")
    command.add_argument("--goal", choices=get_args(Goal))
    command.add_argument("--min-tokens", type=int, default=256)
    command.add_argument("--batch", type=int, default=1, help="sequences, with --config")
    command.add_argument(
        "--sequence", type=int, help="tokens, with --config; 2,048 at most by default"
    )
    command.add_argument("--dtype", default="bfloat16", choices=tuple(_DTYPES))
    command.add_argument("--device", default="cpu")
    command.add_argument("--json", action="store_true", help="print JSON in place of a table")


def _add_trial(command: argparse.ArgumentParser) -> None:
    text = "returns a model and its batches, or these and more by name"
    command.add_argument("subject", nargs="?", metavar="MODULE:FUNCTION", help=text)
    command.add_argument("--steps", type=int, default=100, help="of every arm")
    text = "of a further arm each; without any, and without --ratio, pamm_compile.backend()"
    command.add_argument("--rules", nargs="*", default=[], help=text)
    text = "of PAMM, of a further arm each"
    command.add_argument("--ratio", type=float, nargs="*", default=[], help=text)
    command.add_argument("--goal", choices=get_args(Goal))
    command.add_argument("--min-tokens", type=int)
    command.add_argument("--lr", type=float, default=5e-4, help="of AdamW, at its highest")
    command.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16: autocast")
    command.add_argument("--seed", type=int, default=0, help="of what the function draws, too")
    text = "where the record and the picture go, without .json and .png"
    command.add_argument("--out", default="runs/trial", metavar="STEM", help=text)
    command.add_argument("--json", action="store_true", help="print JSON in place of a table")


Run = Callable[[argparse.Namespace], str]

_COMMANDS: tuple[tuple[str, Run, str], ...] = (
    ("explain", _explain, "Show what would be compressed, without computing anything."),
    ("fidelity", _fidelity, "Measure how close the weight gradients are, on a batch."),
    ("recommend", _recommend, "Choose the cheapest method of every target by its error."),
    ("compare", _compare, "Measure a step five ways: eager, compiled, and compressed."),
    ("trial", _trial, "Train exactly and compressed, side by side: is it worth it?"),
)
