"""A model of the time on a GPU: every site, and its share of a step. Nothing here is measured.

    python examples/benchmarks/device_model.py
    python examples/benchmarks/device_model.py --devices h100 mi300x --methods pamm:256 pamm:64

Times follow from data sheets and from what the kernels compile to (pamm_compile.devices,
pamm_compile/methods/pamm/triton/model.py), bfloat16, 16,384 tokens on a device. A step is taken to
be its matmuls and attention, forward and backward, at the share of the peak that is assumed of
matmuls: norms, the optimizer and communication are left out, so that shares of a real step are
smaller.

Steps in float8, by torchao's recipes, multiply forward and for dX in float8 in every block, and for
dW too unless the recipe keeps that in 16 bits; logits stay in 16 bits. Their casts are counted, as
kernels of their own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import cli, tables
from examples.benchmarks.models import DEVICE_TOKENS, NAMES, SHAPES, Shape
from pamm_compile.devices import (
    DEVICES,
    MATMUL_SHARE,
    DeviceFigures,
    device_named,
    exact_seconds,
    float8_cast,
    matmul_seconds,
    predicted_seconds,
    site_seconds,
)
from pamm_compile.methods.base import Method
from pamm_compile.methods.pamm.triton import model
from pamm_compile.methods.subspace.method import Subspace
from pamm_compile.rules import parse_rules
from pamm_compile.size import Cost, Size

MODELS = ("llama-60m", "llama-350m", "llama-1b", "llama-7b")
METHODS = (
    "pamm:1024",
    "pamm:256",
    "pamm:64",
    "subspace:0.0625",
    "subspace:0.125",
    "gradients:0.0625",
    "gradients:0.125",
    "quantized:8",
)
FLOAT8_METHODS = METHODS[1:]
HIGH_PRECISION_DW = "rowwise_with_gw_hp"
RECIPES = (HIGH_PRECISION_DW, "rowwise", "tensorwise")
RANKS = (0.0625, 0.125)
GENERATORS = (64, 128, 256, 512)
_SITES = {"q, k, v": 3, "gate, up": 2, "down": 1}


def method_of(text: str) -> Method:
    """Return the method that a rule's text stands for."""
    (rule,) = parse_rules(f"linear={text}")
    assert rule.method is not None
    return rule.method


def sizes(shape: Shape, tokens: int = DEVICE_TOKENS) -> dict[str, Size]:
    """Return the inputs of one layer whose weight gradients may be approximated."""
    n, inner = shape.width, shape.inner
    outputs = {"q, k, v": (n,) * 3, "gate, up": (inner,) * 2, "down": (n,)}
    return {
        name: Size(
            tokens, inner if name == "down" else n, out, torch.bfloat16, "cuda", alike=shape.layers
        )
        for name, out in outputs.items()
    }


def step_seconds(shape: Shape, device: DeviceFigures, tokens: int = DEVICE_TOKENS) -> float:
    """Return the model's time of an exact step: matmuls and attention."""
    n = shape.width
    weights = shape.layers * (4 * n * n + 3 * n * shape.inner) + n * shape.vocabulary
    # Causal: half of the scores; two matmuls forward, five backward.
    attention = shape.layers * 7 * tokens * shape.sequence * n
    return (6 * tokens * weights + attention) / (MATMUL_SHARE * device.half)


def float8_sizes(shape: Shape, recipe: str, tokens: int = DEVICE_TOKENS) -> dict[str, Size]:
    """Return the inputs of one layer that trains in float8."""
    if recipe == HIGH_PRECISION_DW:
        return sizes(shape, tokens)
    return {
        name: replace(
            size, casts=1, scales=1 if recipe == "tensorwise" else size.features, scaled=True
        )
        for name, size in sizes(shape, tokens).items()
    }


def float8_step_seconds(
    shape: Shape, device: DeviceFigures, recipe: str, tokens: int = DEVICE_TOKENS
) -> float:
    """Return the model's time of an exact step in float8: matmuls, their casts, and attention."""
    n, half, b = shape.width, torch.bfloat16, tokens
    inputs = float8_sizes(shape, recipe, b)
    output = replace(inputs["q, k, v"], outputs=(n,))
    reads = 2 if recipe == "tensorwise" else 1
    layer = 0.0
    for size in (*inputs.values(), output):
        m, count = sum(size.outputs), len(size.outputs)
        forward = Cost(2 * b * size.features * m, b * (size.features + 2 * m), count)
        layer += 2 * matmul_seconds(forward, device.float8, device)
        # X and dZ by rows, W once for either matmul.
        activations = float8_cast(b * (size.features + m), half, 1 + count, reads=reads)
        weights = float8_cast(2 * size.features * m, half, 2 * count)
        layer += predicted_seconds(activations + weights, device, half)
        layer += exact_seconds(size, device)
    attention = shape.layers * 7 * b * shape.sequence * n
    logits = 6 * b * n * shape.vocabulary
    return shape.layers * layer + (attention + logits) / (MATMUL_SHARE * device.half)


def _by_exact(method: Method, size: Size, device: DeviceFigures) -> str:
    return f"{site_seconds(method, size, device) / exact_seconds(size, device):.2f}"


def sites_table(device: DeviceFigures, methods: Sequence[str]) -> list[str]:
    """Return the lines of a table: exact microseconds of every site, and what each method takes."""
    rows = []
    for name in MODELS:
        for site, size in sizes(SHAPES[name]).items():
            exact = exact_seconds(size, device)
            times = [_by_exact(method_of(text), size, device) for text in methods]
            rows.append([NAMES[name], site, f"{exact * 1e6:.0f}", *times])
    return tables.markdown(["model", "input of", "exact, µs", *methods], rows, left=2)


def saved(
    shape: Shape, device: DeviceFigures, text: str, targets: Sequence[str] = tuple(_SITES)
) -> float:
    """Return the share of a step that a method saves, below 0 where it takes longer.

    Args:
        shape: the model.
        device: from `device_named`.
        text: the method, as in rules.
        targets: the inputs that it stands for.
    """
    method, inputs = method_of(text), sizes(shape)
    gains = [
        exact_seconds(inputs[t], device) - site_seconds(method, inputs[t], device) for t in targets
    ]
    return shape.layers * sum(gains) / step_seconds(shape, device)


def steps_table(device: DeviceFigures, methods: Sequence[str]) -> list[str]:
    """Return the lines of a table: what share of a step's time is saved, by method and targets."""
    rows = []
    for name in MODELS:
        shape = SHAPES[name]
        step = step_seconds(shape, device)
        for targets in (("q, k, v",), tuple(_SITES)):
            row = [NAMES[name], f"{step * 1e3:.1f}", "all" if len(targets) > 1 else targets[0]]
            exact = sum(exact_seconds(sizes(shape)[t], device) for t in targets)
            row.append(f"{100 * shape.layers * exact / step:.1f} %")
            row += [f"{100 * saved(shape, device, text, targets):+.1f} %" for text in methods]
            rows.append(row)
    header = ["model", "step, ms", "inputs of", "exact dW", *methods]
    return tables.markdown(header, rows, left=1)


def float8_table(device: DeviceFigures, methods: Sequence[str]) -> list[str]:
    """Return the lines of a table: what share of a float8 step is saved, by recipe and method."""
    rows = []
    for recipe in RECIPES:
        for name in MODELS:
            shape = SHAPES[name]
            step = float8_step_seconds(shape, device, recipe)
            inputs = float8_sizes(shape, recipe).values()
            exact = sum(exact_seconds(size, device) for size in inputs)
            row = [recipe, NAMES[name], f"{step * 1e3:.1f}"]
            row.append(f"{100 * shape.layers * exact / step:.1f} %")
            for text in methods:
                taken = sum(site_seconds(method_of(text), size, device) for size in inputs)
                row.append(f"{100 * shape.layers * (exact - taken) / step:+.1f} %")
            rows.append(row)
    header = ["recipe", "model", "step, ms", "exact dW", *methods]
    return tables.markdown(header, rows, left=2)


def joined_table(device: DeviceFigures, ranks: Sequence[float] = RANKS) -> list[str]:
    """Return the lines of a table: Subspace's matmul of dZ and coefficients in 16 bits, and float8.

    In float8 dZ is cast for it, as `Quantized` casts it. Coefficients, whose scales dZ takes over,
    are taken to be codes as they are stored, so that nothing decodes them.
    """
    rows = []
    for name in MODELS:
        shape = SHAPES[name]
        for rank in ranks:
            method = Subspace(rank)
            usual = float8 = casts = 0.0
            for size in sizes(shape).values():
                b, m, p = size.tokens, sum(size.outputs), len(size.outputs)
                r, half = method.directions(size.features, size.outputs), size.dtype
                decode = Cost(4 * b * r, b * r * (1 + half.itemsize), 1)
                usual += predicted_seconds(decode, device, half)
                product = Cost(2 * b * r * m, (b * m + p * b * r + r * m) * half.itemsize, p)
                usual += matmul_seconds(product, device.half, device)
                product = Cost(2 * b * r * m, b * (m + r) + r * m * half.itemsize, 1)
                float8 += matmul_seconds(product, device.float8, device)
                casts += predicted_seconds(float8_cast(b * m, half, p, reads=1), device, half)
            step = step_seconds(shape, device) / shape.layers
            saved = [f"{100 * (usual - each) / step:+.1f} %" for each in (float8 + casts, float8)]
            times = [f"{seconds * 1e6:.0f}" for seconds in (usual, float8, casts)]
            rows.append([NAMES[name], f"{rank:g}", *times, *saved])
    header = ["model", "rank", "in 16 bits, µs a layer", "in float8", "casts of dZ"]
    return tables.markdown([*header, "saved of a step", "were casts free"], rows, left=1)


def kernels_table(device: DeviceFigures) -> list[str]:
    """Return the lines of a table: microseconds of every kernel of two sites, and their bounds."""
    rows = []
    for b, n in ((16384, 2048), (131072, 512)):
        size = Size(b, n, (n,) * 3, torch.bfloat16, "cuda")
        for k in GENERATORS:
            times = model.site_times(size, k, device)
            shown = ", ".join(f"{t.name} {t.seconds * 1e6:.0f} ({t.bound})" for t in times)
            total = sum(t.seconds for t in times) * 1e6
            exact = exact_seconds(size, device) * 1e6
            rows.append([f"{b}×{n}", str(k), shown, f"{total:.0f}", f"{exact:.0f}"])
    header = ["b×n", "k", "kernels, µs (bound by)", "sum, µs", "exact dW, µs"]
    return tables.markdown(header, rows, left=3)


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--devices", nargs="+", default=list(DEVICES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as in rules")
    args: argparse.Namespace = parser.parse_args(arguments)
    for name in args.devices:
        device = device_named(name)
        print(f"\n## {device.name}: a model, not a measurement\n\n{device.source}\n")
        print("Kernels of one input of Q, K and V:\n")
        print("\n".join(kernels_table(device)))
        print("\nTime of a site by exact dW's:\n")
        print("\n".join(sites_table(device, args.methods)))
        print("\nShare of a step: what exact dW takes, and what is saved of the step:\n")
        print("\n".join(steps_table(device, args.methods)))
        if device.float8:
            print("\nThe same of a step in float8, every block's inputs but o's:\n")
            print("\n".join(float8_table(device, args.methods)))
            print("\nSubspace's matmul of dZ and coefficients:\n")
            print("\n".join(joined_table(device)))


if __name__ == "__main__":
    main()
