"""What a trial trains: the user's model, batches, loss, score and optimizer, checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pamm_compile import checks
from pamm_compile.errors import InvalidOptionError, MeasurementError
from pamm_compile.inspect.undisturbed import refuse_without_values
from pamm_compile.private import aot, memory

Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module], float]
MakeOptimizer = Callable[[nn.Module], Optimizer | tuple[Optimizer, LRScheduler]]

MOST_UNSIZED = 16
"""Batches that are taken of held-out data of no known length, which may have no end."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What may be computed in: bfloat16 by autocast."""


@dataclass(frozen=True)
class Task:
    """What every arm of a trial does alike."""

    model: nn.Module
    """Copied for every arm, and never run."""
    batches: list[Any]
    """One a step."""
    held_out: list[Any]
    """Empty if the last steps' losses stand for them."""
    loss: Loss
    score: Score | None
    make_optimizer: MakeOptimizer
    clip: float | None
    dtype: torch.dtype
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def copied(self) -> nn.Module:
        """Return a copy of the model, to be trained."""
        try:
            model = copy.deepcopy(self.model)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InvalidOptionError(
                f"a trial trains copies of the model, and this one cannot be copied: {error}. Give "
                "a model for which copy.deepcopy(model) works."
            ) from error
        # As from_pretrained gives it. Where only parts are in eval mode, that is the user's choice.
        return model if model.training else model.train()

    def optimizer_of(self, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
        """Return the optimizer of a copy, and what changes its learning rate, if anything does."""
        made = self.make_optimizer(model)
        match made:
            case Optimizer():
                return made, None
            case (Optimizer() as optimizer, LRScheduler() as scheduler):
                return optimizer, scheduler
        raise InvalidOptionError(
            f"optimizer(model) returned {type(made).__name__}. It must return a torch.optim "
            "optimizer of the model's parameters, or a pair of it and a scheduler."
        )

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a model on one batch, which is moved to the model's device."""
        is_half = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half):
            loss = self.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise InvalidOptionError(
                f"loss(model, batch) returned {_described(loss)}. It must return a scalar tensor."
            )
        return loss

    def there(self, batch: Any) -> Any:
        """Return a batch on the model's device."""
        if isinstance(batch, Mapping):
            # Also what is no dict, such as a tokenizer's output.
            batch = dict(batch)
        return memory.with_tensors(batch, lambda tensor: tensor.to(self.device))

    def score_of(self, model: nn.Module) -> float | None:
        """Return the score of a model in eval mode, or None where none was asked for."""
        if self.score is None:
            return None
        given: object = self.score(model)
        if isinstance(given, Tensor) and given.numel() == 1:
            given = given.item()
        hint = "Higher is better; return the negative of an error."
        return checks.number("score(model)", given, "a number", hint)


def check_model(model: object) -> None:
    """Raise if a model cannot be trained, or is compiled already.

    Args:
        model: what the user gave.

    Raises:
        InvalidOptionError: it is no module, is compiled, or has nothing to train.
        MeasurementError: it has no values.
    """
    if not isinstance(model, nn.Module):
        raise checks.refusal("model", model, "a torch.nn.Module", "It is trained in copies.")
    for module in model.modules():
        if aot.compiled_module(module) is not None:
            raise InvalidOptionError(
                f"the model, or its {type(module).__name__}, is compiled already. Give the model "
                "as it is before torch.compile: a trial compiles a copy for every arm."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidOptionError(
            "no parameter of the model requires a gradient, so there is nothing to train. Give a "
            "model with trainable parameters."
        )
    refuse_without_values("trial()", model, ())


def make_task(
    model: nn.Module,
    batches: Any,
    *,
    steps: int,
    loss: Loss | None,
    held_out: Any,
    score: Score | None,
    optimizer: MakeOptimizer | None,
    lr: float,
    clip: float | None,
    dtype: str,
    seed: int,
) -> Task:
    """Check what a trial was given, and draw its batches.

    Args:
        model: as `trial`'s, and so is all the rest.

    Returns:
        The task.

    Raises:
        InvalidOptionError: something is not what it must be, or there are too few batches.
    """
    rate = checks.number("lr", lr, "a number above 0", "It is AdamW's highest learning rate.")
    if not 0 < rate < math.inf:
        raise checks.refusal("lr", lr, "a number above 0", "It is AdamW's highest learning rate.")
    hint = "It is the largest norm of all gradients together; None does not clip."
    if clip is not None and not checks.number("clip", clip, "a number above 0", hint) > 0:
        raise checks.refusal("clip", clip, "a number above 0, or None", hint)
    checks.choice("dtype", dtype, tuple(DTYPES))
    functions: dict[str, object] = {"loss": loss, "score": score, "optimizer": optimizer}
    for name, function in functions.items():
        if function is not None and not callable(function):
            hint = f"See help(pamm_compile.trial) for what {name} is called with."
            raise checks.refusal(name, function, "a function, or left out", hint)
    drawn = _drawn("batches", batches, steps)
    if len(drawn) < steps:
        raise InvalidOptionError(
            f"batches ended after {len(drawn)}, and steps={steps} need one each. Give more, "
            f"such as itertools.cycle(batches), or ask for at most {len(drawn)} steps."
        )
    kept_out = []
    if held_out is not None:
        most = len(held_out) if isinstance(held_out, Sized) else MOST_UNSIZED
        kept_out = _drawn("held_out", held_out, most)
        if not kept_out:
            raise InvalidOptionError("held_out has no batch. Give at least one, or leave it out.")
    return Task(
        model=model,
        batches=drawn,
        held_out=kept_out,
        loss=loss or loss_of_call,
        score=score,
        make_optimizer=optimizer or _adamw(rate, steps),
        clip=clip,
        dtype=DTYPES[dtype],
        seed=seed,
    )


def loss_of_call(model: nn.Module, batch: Any) -> Tensor:
    """Call a model with a batch, and return its loss.

    Equivalent to `model(**batch).loss` of a mapping, `model(*batch).loss` of a tuple or list, and
    `model(batch).loss` of anything else; what is returned may be the loss itself.

    Args:
        model: any.
        batch: what it is called with.

    Returns:
        A scalar.

    Raises:
        InvalidOptionError: there is no loss in what the model returns.
    """
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if isinstance(found, Tensor) and found.dim() == 0:
        return found
    raise InvalidOptionError(
        f"the model returned {_described(out)}, in which there is no scalar loss. Give "
        "loss=, a function of a model and a batch that returns one; models of Transformers need "
        "labels in the batch."
    )


def _drawn(name: str, given: Any, count: int) -> list[Any]:
    """Return the first batches of what a user gives: an iterable, or a function that makes one."""
    made = given() if callable(given) and not isinstance(given, Iterable) else given
    if isinstance(made, Mapping | Tensor | str) or not isinstance(made, Iterable):
        raise InvalidOptionError(
            f"{name} is {_described(made)}. It must be an iterable of batches, such as a list, a "
            "DataLoader or a generator, or a function that returns one."
        )
    # A copy of the list: what the user changes later is not ours.
    return list(islice(made, count))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {checks.shown(list(value))}"
    return f"of type {type(value).__name__}" if value is not None else "None"


def _adamw(rate: float, steps: int) -> MakeOptimizer:
    def make(model: nn.Module) -> tuple[Optimizer, LRScheduler]:
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
        warmup = max(1, steps // 10)

        def factor(step: int) -> float:
            done = max(0.0, (step - warmup) / max(1, steps - warmup))
            return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * done))

        return optimizer, LambdaLR(optimizer, factor)

    return make


def refuse_not_finite(step: int, loss: float) -> None:
    """Raise if exact training came to nothing, so that there is nothing to compare with."""
    if not math.isfinite(loss):
        raise MeasurementError(
            f"exact training's loss is {loss} in step {step + 1}, so there is nothing to compare "
            "with. Lower lr=, or check the batches and the loss."
        )
