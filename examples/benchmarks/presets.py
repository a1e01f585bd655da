"""What is run where, and the sizes that a machine of that kind holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from examples.benchmarks.models import SHAPES, Shape


@dataclass(frozen=True)
class Preset:
    """A choice of models, cut to size, and of how much to measure."""

    models: Mapping[str, tuple[Shape, int]]
    """Shape and sequences a step, by name of the model."""
    rounds: int
    quality: tuple[str, ...]
    """Models to train."""
    quality_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "float32"
    ratio: float = 256.0
    min_tokens: int = 256
    jobs: int = 1
    """Processes at once that measure memory; times are measured by one process alone."""
    left_out: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Name the models that this preset has no sizes for."""
        object.__setattr__(self, "left_out", tuple(n for n in SHAPES if n not in self.models))


def _tiny(name: str) -> Shape:
    shape = SHAPES[name]
    return shape._replace(width=64, layers=1, heads=2, inner=160, vocabulary=257, sequence=64)


def _cut(name: str, layers: int, vocabulary: int | None = None) -> Shape:
    shape = SHAPES[name]
    return shape._replace(layers=layers, vocabulary=vocabulary or shape.vocabulary)


PRESETS = {
    "ci": Preset(
        models={"llama-60m": (_tiny("llama-60m"), 8)},
        rounds=3,
        quality=("llama-60m",),
        quality_steps=3,
        seeds=(0, 1),
        ratio=32.0,
    ),
    # Text is bytes, so that 257 tokens do. Whole vocabularies would be most of the work here.
    "cpu": Preset(
        models={
            "llama-60m": (_cut("llama-60m", 4, 257), 8),
            "llama-350m": (_cut("llama-350m", 2, 257), 8),
            "gpt2": (_cut("gpt2", 2, 257), 2),
            "roberta": (_cut("roberta", 2, 257), 4),
        },
        rounds=10,
        quality=("llama-60m",),
        quality_steps=30,
    ),
    "gpu": Preset(
        models={
            "llama-60m": (_cut("llama-60m", 8), 64),
            "llama-1b": (_cut("llama-1b", 4), 64),
            "llama-350m": (_cut("llama-350m", 4), 64),
            "gpt2": (_cut("gpt2", 4), 16),
            "roberta": (_cut("roberta", 4), 32),
        },
        rounds=20,
        quality=("llama-60m",),
        quality_steps=200,
        dtype="bfloat16",
        jobs=6,
    ),
}
