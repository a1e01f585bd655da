"""The operators that draw rows: schemas, values, and what they keep generated code from."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from pamm_testing.zoo import BATCH, LENGTH, WIDTH
from torch import Tensor, nn
from torch._inductor.utils import get_code, run_and_get_code
from torch.nn import functional as F

import pamm_compile
from pamm_compile.methods import register_lowerings, sampling
from pamm_compile.methods.draws import content_seed, sample_rows, site_seeds
from pamm_compile.methods.sampling import Sampling

OPERATORS = torch.ops.pamm


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (OPERATORS.content_seed.default, (torch.randn(65, 7), 3)),
        (OPERATORS.content_seed.default, (torch.randn(7, 65, dtype=torch.bfloat16).t(), 3)),
        (OPERATORS.site_seeds.default, (torch.tensor(12345), 5)),
        (OPERATORS.sample_rows.default, (65, 7, torch.tensor(12345), "stratified")),
        (OPERATORS.sample_rows.default, (65, 7, torch.tensor(12345), "uniform")),
    ],
)
def test_schemas(operator: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("how", ["stratified", "uniform"])
def test_compiled_draws_are_the_eager_ones_and_one_call_each(how: Sampling) -> None:
    register_lowerings()

    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        seed = content_seed(x, 5)
        return seed, sample_rows(x.shape[0], x.shape[0] // 5, seed, how)

    for x in (torch.randn(64, 16), torch.randn(16, 65).t()):
        found, (code,) = run_and_get_code(torch.compile(draw, fullgraph=True), x)
        seed = sampling.content_seed(x, 5)
        rows = sampling.sample_rows(x.shape[0], x.shape[0] // 5, seed, how)
        assert torch.equal(found[0], seed)
        assert torch.equal(found[1], rows)
        # No kernel: neither a hash nor a copy of X.
        assert "cpp_fused" not in code


def test_compiled_seeds_are_the_eager_ones() -> None:
    register_lowerings()
    seed = torch.tensor(2**31 - 7)
    expected = [sampling.site_seed(seed, number) for number in range(9)]
    assert all(map(torch.equal, site_seeds(seed, 9), expected))
    compiled = torch.compile(lambda s: [each + 0 for each in site_seeds(s, 9)])
    assert all(map(torch.equal, compiled(seed), expected))


class _Block(nn.Module):
    """Attention without a residual sum, which Inductor fuses over ever more layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


@inductor_config.patch(force_disable_caches=True)
def test_sites_share_their_kernels() -> None:
    """A third layer needs no kernel that the second has not."""

    def kernels(layers: int) -> set[str]:
        torch._dynamo.reset()
        model = nn.Sequential(*(_Block() for _ in range(layers)))
        compiled = torch.compile(model, backend=pamm_compile.backend(ratio=4, min_tokens=1))
        x = torch.randn(BATCH, LENGTH, WIDTH)

        def look() -> None:
            # Nothing is compiled, and what stands in for compiled code returns nothing.
            with contextlib.suppress(AttributeError):
                compiled(x)

        # Of the forward pass, where sites draw their rows.
        code = "\n".join(get_code(look))
        assert code.count("torch.ops.pamm.assign") >= layers
        sources = re.findall(r"cpp_pybinding\(\[.*?\], r?'''(.*?)'''", code, re.S)
        return {re.sub(r"\w*fused\w*", "", source) for source in sources}

    assert kernels(3) == kernels(2)
