"""Time what methods do at a site on a GPU, beside what the model of the time predicts.

    python examples/benchmarks/method_times.py --json docs/benchmarks/gpu/methods.json   # minutes
    python examples/benchmarks/method_times.py --device cpu --smoke    # seconds, to see it run

At the three inputs of a layer of every model, in bfloat16 and 16,384 tokens: the exact weight
gradients, and in their place `store` and `weight_gradients` of each method, compiled. Steps of
`gradients` are of two kinds, and finding its directions is a third row: that runs eagerly, for all
sites that are alike together, once in ten steps. What is in a graph is timed in a CUDA graph, with
inputs that rotate through more memory than the cache holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from examples.benchmarks import cli, device_model, kernels, machine, tables
from examples.benchmarks.models import NAMES, SHAPES, Shape
from pamm_compile import GradientSubspace, devices, methods
from pamm_compile.methods.base import Method
from pamm_compile.size import Size

MODELS = ("llama-1b", "llama-350m", "llama-60m", "llama-7b")
METHODS = ("quantized:8", "subspace:0.125", "pamm:256")
RANKS = (0.125, 0.0625)
TINY = Shape("llama", 64, 1, 2, 96, 257, 32)
EXACT = "exact dW"


class Timed:
    """Inputs of one site, and the times of what may be done with them.

    Args:
        size: of the site.
        clock: of the device.
    """

    def __init__(self, size: Size, clock: kernels.Clock) -> None:
        self.size, self.clock = size, clock
        given = {"device": clock.device, "dtype": size.dtype}
        read = size.tokens * (size.features + sum(size.outputs)) * size.dtype.itemsize
        cache = torch.cuda.get_device_properties(clock.device).L2_cache_size if clock.is_gpu else 1
        self.sets = [
            (
                torch.randn(size.tokens, size.features, **given),
                [torch.randn(size.tokens, m, **given) for m in size.outputs],
            )
            for _ in range(kernels.sets_needed(read, cache))
        ]
        self.seed = torch.tensor(1, device=clock.device)
        self.flips = [False] * len(size.outputs)

    def exact(self) -> float:
        """Seconds of the exact weight gradients."""
        call = self.clock.compiled(lambda x, grads: [grad.T @ x for grad in grads])
        return self.clock.kernel([lambda x=x, g=g: call(x, g) for x, g in self.sets])

    def method(self, method: Method) -> float:
        """Seconds of a method whose steps are alike."""
        return self._both(
            lambda x: method.store(x, self.seed, self.size.outputs),
            lambda stored, grads: method.weight_gradients(stored, grads, self.flips),
        )

    def along(self, method: GradientSubspace) -> float:
        """Seconds of a step along remembered directions."""
        rows = method.directions(self.size.features, self.size.outputs)
        given = {"device": self.clock.device, "dtype": self.size.dtype}
        memory = torch.randn(rows, self.size.features, **given)
        return self._both(
            lambda x: method.store_along(x, memory),
            lambda stored, grads: method.weight_gradients_along(stored, memory, grads, self.flips),
        )

    def _both(self, store: Callable[..., Any], make: Callable[..., Any]) -> float:
        # Each for itself, as the two passes are: in one graph what is stored might not be written.
        forward, backward = self.clock.compiled(store), self.clock.compiled(make)
        stored = [tuple(each.clone() for each in forward(x)) for x, _ in self.sets]
        calls = [
            lambda kept=kept, g=g: backward(kept, g)
            for kept, (_, g) in zip(stored, self.sets, strict=True)
        ]
        return self.clock.kernel([lambda x=x: forward(x) for x, _ in self.sets]) + (
            self.clock.kernel(calls)
        )

    def finding(self, method: GradientSubspace, together: int) -> float:
        """Seconds of finding the directions of one site, of so many at once."""
        given = {"device": self.clock.device, "dtype": self.size.dtype}
        gradients = [
            torch.randn(together, m, self.size.features, **given) for m in self.size.outputs
        ]
        method.remember(gradients)
        taken = [
            kernels.seconds(lambda: method.remember(gradients), self.clock.device)
            for _ in range(self.clock.repeats)
        ]
        return sorted(taken)[len(taken) // 2] / together


Row = tuple[str, Callable[[Timed], float], Callable[[devices.DeviceFigures], float]]


def what_is_timed(size: Size) -> Iterator[Row]:
    """Yield of everything a name, how it is timed, and what the model says."""
    yield EXACT, Timed.exact, lambda device: devices.exact_seconds(size, device)
    for rank in RANKS:
        method = GradientSubspace(rank)
        name, together = f"gradients:{rank:g}", method.together(size)
        yield (
            f"{name}, a step along",
            lambda timed, method=method: timed.along(method),
            lambda device, method=method: method.along_seconds(size, device),
        )
        yield (
            f"{name}, finding, {together} at once",
            lambda timed, method=method, together=together: timed.finding(method, together),
            lambda device, method=method: method.finding_seconds(size, device),
        )
    for text in METHODS:
        method = device_model.method_of(text)
        yield (
            text,
            lambda timed, method=method: timed.method(method),
            lambda device, method=method: devices.site_seconds(method, size, device),
        )


def sites(smoke: bool) -> list[tuple[str, str, Size]]:
    """Return models, what is read, and the sizes, what matters most first."""
    if smoke:
        tiny = device_model.sizes(TINY, 512)
        return [("tiny", "gate, up", tiny["gate, up"])]
    return [
        (NAMES[model], name, size)
        for model in MODELS
        for name, size in device_model.sizes(SHAPES[model]).items()
    ]


HEAD = ("model", "input of", "what", "predicted µs", "measured µs", "measured by predicted")


def row(found: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    head = [found["model"], found["input"], found["what"]]
    if "error" in found:
        return [*head, "-", found["error"], "-"]
    measured, predicted = found["measured"], found["predicted"]
    if predicted is None:
        return [*head, "unknown device", f"{measured * 1e6:.0f}", "-"]
    shown = f"{measured / predicted:.2f}"
    return [*head, f"{predicted * 1e6:.0f}", f"{measured * 1e6:.0f}", shown]


def markdown(record: dict[str, Any]) -> str:
    """Write what was measured beside what is predicted."""
    facts = ", ".join(f"{name} {fact}" for name, fact in record["environment"].items())
    lines = tables.markdown(HEAD, [row(found) for found in record["rows"]], left=3)
    return "\n".join(["# Predicted and measured", "", f"`{record['command']}`", "", f"{facts}.",
                      "", *lines, ""])  # fmt: skip


def measure(
    chosen: list[tuple[str, str, Size]],
    clock: kernels.Clock,
    figures: devices.DeviceFigures | None,
    until: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Time everything of sites; what does not fit into the device loses itself alone.

    Args:
        chosen: of `sites`.
        clock: of the device.
        figures: of the device, for predictions.
        until: when to begin with nothing further, by `time.time`.
        done: gets every row.
    """
    for model, name, size in chosen:
        timed = Timed(size, clock)
        for what, call, predict in what_is_timed(size):
            if time.time() > until:
                return
            found: dict[str, Any] = {"model": model, "input": name, "what": what}
            try:
                found["measured"] = call(timed)
            except torch.OutOfMemoryError as error:
                found["error"] = str(error).splitlines()[0]
            else:
                found["predicted"] = None if figures is None else predict(figures)
            done(found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    return cli.parse_for_gpu(
        parser,
        arguments,
        smoke="one tiny site, which a CPU can run",
        repeats=20,
        seconds=600,
        json=Path("runs/method_times.json"),
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    methods.register_lowerings()
    until = time.time() + args.budget
    record: dict[str, Any] = {
        "command": machine.command(),
        "environment": machine.facts(args.device),
        "rows": [],
    }
    cli.announce(record["environment"])
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def done(found: dict[str, Any]) -> None:
        record["rows"].append(found)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print("  ".join(row(found)), flush=True)

    clock = kernels.Clock(args.device, 3 if args.smoke else args.repeats)
    figures = devices.at_hand(torch.device(args.device).type)
    measure(sites(args.smoke), clock, figures, until, done)
    print(f"wrote {args.json}")


if __name__ == "__main__":
    cli.run(main)
