"""predict_saved(): what the partition of a real compilation hands to backward, also of fakes."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config as functorch_config
from pamm_testing.forms import Attention, _sdpa
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import pamm_compile
from pamm_compile import measure_memory, predict_saved

TOKENS = BATCH * LENGTH


class Block(nn.Module):
    """Norm, attention and a residual sum: X of the projections is an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention(_sdpa())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


@pytest.mark.parametrize(
    ("compressed", "budget", "fixture"),
    [
        (True, 1.0, None),
        (True, 0.5, "no_code"),
        (False, 1.0, "no_code"),
        (False, 0.5, "no_code"),
    ],
)
def test_predicts_what_inductor_saves(
    budget: float, compressed: bool, fixture: str | None, request: pytest.FixtureRequest
) -> None:
    if fixture:
        request.getfixturevalue(fixture)
    model, x = Block(), torch.randn(BATCH, LENGTH, WIDTH)
    using = pamm_compile.backend(8, min_tokens=1) if compressed else "exact"
    with functorch_config.patch(activation_memory_budget=budget):
        predicted = predict_saved(model, x, using=using)
        compiled = torch.compile(model, backend=using if compressed else "inductor")
        measured = measure_memory(lambda: compiled(x), model=model)
    assert predicted.saved == measured.saved
    assert predicted.saved_bytes == measured.saved_bytes > 0
    assert len(predicted.report.compressed) == compressed


def test_of_fakes_is_that_of_real_tensors() -> None:
    using = pamm_compile.backend(8, min_tokens=1)
    real = predict_saved(Block(), torch.randn(BATCH, LENGTH, WIDTH), using=using)
    with FakeTensorMode():
        fake = predict_saved(Block(), torch.randn(BATCH, LENGTH, WIDTH), using=using)
    assert fake.saved == real.saved
    assert fake.report.sites == real.report.sites


def test_needs_no_memory() -> None:
    # 16 TiB of tokens; X of the projections is 4 KiB wide.
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(1024, 1024), nn.Sigmoid(), nn.Linear(1024, 1024))
        predicted = predict_saved(model, torch.randn(2**32, 1024), using="exact")
    assert predicted.saved_bytes == 2 * 2**32 * 1024 * 4


def test_saves_less_by_what_the_report_says() -> None:
    model, x = Block(), torch.randn(BATCH, LENGTH, WIDTH)
    exact = predict_saved(model, x, using="exact")
    pamm = predict_saved(model, x, using=pamm_compile.backend(8, min_tokens=1))
    (site,) = pamm.report.compressed
    assert exact.saved_bytes - pamm.saved_bytes == site.bytes_before - site.bytes_after > 0
    k = TOKENS // 8
    assert site.bytes_after == k * WIDTH * 4 + TOKENS * (1 + 4)
    kept = [(each.shape, each.dtype) for each in pamm.saved]
    assert ((k, WIDTH), "float32") in kept
    assert ((TOKENS,), "uint8") in kept


def test_none_stands_for_the_defaults_as_in_explain() -> None:
    model, x = Block(), torch.randn(4, 128, WIDTH)
    predicted = predict_saved(model, x)
    assert predicted.report.sites == pamm_compile.explain(model, x).sites
    with pytest.raises(pamm_compile.InvalidOptionError, match=r'using must be a backend .*"exact"'):
        predict_saved(model, x, using="inductor")  # type: ignore[arg-type]
