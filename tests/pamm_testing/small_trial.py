r"""A byte-level LLaMA for `pamm-compile trial`; the record of docs/benchmarks is made so.

    PYTHONPATH=tests pamm-compile trial pamm_testing.small_trial:make --steps 100 --lr 0.002 \
        --out docs/benchmarks/trial-small
"""

from __future__ import annotations

import itertools
from typing import Any

from examples.benchmarks import corpus, models, training

WIDTH, LAYERS, HEADS, WINDOWS, BYTES = 128, 2, 4, 8, 256
HELD_OUT = 8


def make() -> dict[str, Any]:
    """Return what `pamm-compile trial` asks for."""
    text = corpus.Text()
    shape = models.Shape("llama", WIDTH, LAYERS, HEADS, models.study_inner(WIDTH), 256, BYTES)
    held_out = training.batches(text.validation, "llama", WINDOWS, BYTES, 0)
    return {
        "model": models.build(shape),
        "batches": training.batches(text.train, "llama", WINDOWS, BYTES, 0),
        "held_out": list(itertools.islice(held_out, HELD_OUT)),
    }
