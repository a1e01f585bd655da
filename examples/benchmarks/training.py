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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise linearly over a tenth of the steps, then fall to a tenth of the peak along a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of all studies."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


@dataclasses.dataclass
class Run:
    """One model in training, alone or beside others."""

    name: str
    model: nn.Module
    loss: Loss
    """The forward pass, compiled or not."""
    optimizer: torch.optim.Optimizer
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, batch: Batch, rate: float) -> None:
        """Update the model once."""
        device = next(iter(batch.values())).device
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        synchronize(device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
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
