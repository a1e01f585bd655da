"""Inductor's caches: another option or another source must miss, the same must hit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pamm_compile

_SCRIPT = """
import json, sys
import torch
import pamm_compile
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

torch.manual_seed(0)
model = Block()
backend = pamm_compile.backend(ratio=int(sys.argv[1]), min_tokens=1)
torch.compile(model, backend=backend)(torch.randn(2, 256, 32)).square().mean().backward()
rank = torch.linalg.matrix_rank(model.qkv.weight.grad.double(), rtol=1e-5).item()
hits = {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")}
aot = dict(counters["aot_autograd"])
print(json.dumps({"rank": rank, "inductor": hits, "aot": aot, "report": backend.report.to_dict()}))
"""


def _copy(destination: Path) -> Path:
    # What one process runs must be what the next does, whatever is edited meanwhile.
    shutil.copytree(Path(pamm_compile.__file__).parent, destination / "pamm_compile")
    return destination


def _run(cache: Path, ratio: int, package: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(ratio)],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_processes_that_share_a_cache(tmp_path: Path) -> None:
    cache, plain = tmp_path / "cache", _copy(tmp_path / "plain")
    first = _run(cache, 256, plain)
    assert first["rank"] == 2
    assert first["aot"].get("autograd_cache_hit", 0) == 0

    # Another ratio is another graph, whatever the cache holds.
    other = _run(cache, 64, plain)
    assert other["rank"] == 8
    assert other["aot"].get("autograd_cache_hit", 0) == 0

    # The same ratio is answered by the cache, with the report of the run that filled it.
    again = _run(cache, 256, plain)
    assert again["rank"] == 2
    assert again["aot"]["autograd_cache_hit"] == 1
    assert again["report"] == first["report"]
    assert again["report"]["compressed"] == 1

    # An edited source misses, be it only a template's.
    edited = _copy(tmp_path / "edited")
    kernels = edited / "pamm_compile" / "methods" / "pamm" / "triton"
    with (kernels / "tiles.py").open("a") as source:
        source.write("\n# edited\n")
    missed = _run(cache, 256, edited)
    assert missed["aot"].get("autograd_cache_hit", 0) == 0
    assert missed["inductor"].get("fxgraph_cache_hit", 0) == 0
