"""`pamm::buffer`: its schema, its values, and what it keeps generated code from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from pamm_compile.methods import register_lowerings
from pamm_compile.methods.buffers import buffer
from pamm_compile.methods.sampling import sample_rows


def test_schema() -> None:
    torch.library.opcheck(buffer, (torch.arange(6).view(2, 3),))


def test_rows_are_computed_once_for_all_that_read_them() -> None:
    register_lowerings()

    def read(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = sample_rows(x.shape[0], 8, seed, "stratified")
        return x[rows], x[rows].square().sum(1), rows * 2

    x, seed = torch.randn(64, 16), torch.tensor(12345)
    found, (code,) = run_and_get_code(torch.compile(read, fullgraph=True), x, seed)
    for mine, expected in zip(found, read(x, seed), strict=True):
        torch.testing.assert_close(mine, expected)
    # The stride of the hash that draws them.
    assert code.count(str(0x1E3779B9)) == 1
