"""What Inductor generates of a step for a GPU, looked at without one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from pamm_testing.triton.fake_gpu import fake_inputs, generate
from torch import Tensor

from pamm_compile import GradientSubspace, Quantized, Size

MOST = 12
"""Kernels of a site in one step, forward and backward."""
METHOD = GradientSubspace(0.0625)
B, N, OUTPUTS = 16384, 2048, (2048, 2048, 2048)


def _site(outputs: tuple[int, ...]) -> list[Tensor]:
    def make() -> list[Tensor]:
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        rows = METHOD.directions(N, outputs)
        memory = torch.empty(rows, N, **bf16)
        return [torch.empty(B, N, **bf16), memory, *(torch.empty(B, m, **bf16) for m in outputs)]

    return fake_inputs(make)


def along(x: Tensor, memory: Tensor, *grads: Tensor) -> list[Tensor]:
    stored = METHOD.store_along(x, memory)
    return METHOD.weight_gradients_along(stored, memory, grads, [False] * len(grads))


def whole(x: Tensor, memory: Tensor, *grads: Tensor) -> list[Tensor]:
    """Every tenth step, as of a device without float8: the other takes fewer."""
    method = Quantized(8, float8=False)
    stored = method.store(x, torch.tensor(1), [grad.shape[1] for grad in grads])
    return method.weight_gradients(stored, grads, [False] * len(grads))


@pytest.mark.parametrize("step", [along, whole])
@pytest.mark.parametrize("outputs", [OUTPUTS, (2048,)])
def test_launches_of_one_site(step: Callable[..., list[Tensor]], outputs: tuple[int, ...]) -> None:
    launches = generate(step, _site(outputs)).launches("graph")
    assert 0 < len(launches) <= MOST


@pytest.mark.parametrize("outputs", [OUTPUTS, (2048,)])
def test_a_step_along_the_directions_is_matmuls_alone(outputs: tuple[int, ...]) -> None:
    generated = generate(along, _site(outputs))
    names = [re.sub(r"\W.*", "", each.split(".", 1)[-1]) for each in generated.launches("graph")]
    # A = X Qᵀ, a product with every dZ, and one with Q for all.
    assert names.count("mm") == len(outputs) + 2
    size = Size(B, N, outputs, torch.bfloat16, "cuda")
    assert len(names) == sum(each.launches for each in METHOD._along(size))
