"""Training as every study does it: AdamW, warm-up and cosine, clipped gradients."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from examples.benchmarks import corpus
from examples.benchmarks.timing import in_turn, synchronize

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """Rise linearly, over a tenth of the steps unless told, then fall to a tenth of the peak.

    The fall is along a cosine.
    """
    warmup = warmup or max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


OPTIMIZERS = {"adamw": 1.0, "sgd": 100.0, "muon": 10.0}
"""Kinds of optimizers, and their learning rates by that of AdamW."""


class Together(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for each in optimizers for group in each.param_groups]
        super().__init__(groups, {})
        self._optimizers = optimizers
        # The same objects, so that a rate that is set here is theirs.
        self.param_groups = groups

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for each in self._optimizers:
            each.step()


def optimizer_of(model: nn.Module, rate: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """Return the optimizer of a study.

    Args:
        model: what is trained.
        rate: peak learning rate of AdamW.
        kind: "adamw"; "sgd", with momentum; or "muon", for the matrices of the blocks, with AdamW
            for all else.
    """
    scale = OPTIMIZERS[kind]
    parameters = dict(model.named_parameters())
    if kind == "sgd":
        group = {"params": list(parameters.values()), "scale": scale}
        return torch.optim.SGD([group], lr=scale * rate, momentum=0.9)
    inner = [n for n, p in parameters.items() if p.dim() == 2 and "layers." in n]
    matrices = [parameters.pop(name) for name in inner] if kind == "muon" else []
    rest = torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    if not matrices:
        return rest
    group = {"params": matrices, "scale": scale}
    return Together([rest, torch.optim.Muon([group], lr=scale * rate, weight_decay=0.1)])


class Average:
    """A running average of a model's weights, to be validated in place of the last ones.

    Args:
        model: in training.
        keep: share of the average that a step leaves; 0 averages nothing.
    """

    def __init__(self, model: nn.Module, keep: float) -> None:
        self._model, self._keep = model, keep
        self._average = [p.detach().clone() for p in model.parameters()] if keep else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step."""
        for average, weight in zip(self._average, self._model.parameters(), strict=False):
            average.lerp_(weight, 1 - self._keep)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average in place of the weights."""
        for average, weight in zip(self._average, self._model.parameters(), strict=False):
            weight.copy_(average)


@dataclasses.dataclass
class Run:
    """One model in training, alone or beside others."""

    name: str
    model: nn.Module
    loss: Loss
    """The forward pass, compiled or not."""
    optimizer: torch.optim.Optimizer
    clip: float = 1.0
    """Largest norm of all gradients together."""
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, batch: Batch, rate: float) -> None:
        """Update the model once."""
        device = next(iter(batch.values())).device
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        synchronize(device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def batches(
    text: Tensor, family: str, batch: int, sequence: int, seed: int, device: str = "cpu"
) -> Iterator[Batch]:
    """Yield batches of a text without end; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = corpus.draw(text, family, batch, sequence, generator)
        yield {name: each.to(device) for name, each in drawn.items()}


def train_side_by_side(
    runs: Sequence[Run],
    data: Iterator[Batch],
    steps: int,
    peak: float,
    until: float = math.inf,
    now: Callable[[], float] = time.time,
) -> int:
    """Train several models on the same batches, one step of each in turn.

    Args:
        runs: the models.
        data: batches.
        steps: how many, and what the learning rate's schedule is for.
        peak: learning rate.
        until: when to stop before that, by `now`.
        now: a clock.

    Returns:
        The steps that were done.
    """
    by_name = {run.name: run for run in runs}
    for step in range(steps):
        if now() > until:
            return step
        batch = next(data)
        for name in in_turn(list(by_name), step):
            by_name[name].step(batch, learning_rate(step, steps, peak))
    return steps


@torch.no_grad()
def validate(loss: Loss, model: nn.Module, data: Iterator[Batch], count: int) -> float:
    """Return the mean loss over batches; no method changes the forward pass."""
    was_training = model.training
    model.eval()
    losses = [loss(next(data)).item() for _ in range(count)]
    model.train(was_training)
    return statistics.fmean(losses)
