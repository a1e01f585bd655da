"""Inductor's caches: another option or another source must miss, the same must hit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pamm_compile

_SCRIPT = """
import json, os, signal, sys
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

def die(event, arguments):
    # Files of the caches are written beside their places, and renamed.
    if event == "os.rename" and sys.argv[2] in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2]:
    sys.addaudithook(die)
for ratio in map(int, sys.argv[1].split()):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Block()
    backend = pamm_compile.backend(ratio=ratio, min_tokens=1)
    torch.compile(model, backend=backend)(torch.randn(2, 256, 32)).square().mean().backward()
    rank = torch.linalg.matrix_rank(model.qkv.weight.grad.double(), rtol=1e-5).item()
    hits = {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")}
    aot, report = dict(counters["aot_autograd"]), backend.report.to_dict()
    print(json.dumps({"rank": rank, "inductor": hits, "aot": aot, "report": report}))
"""


def _copy(destination: Path) -> Path:
    # What one process runs must be what the next does, whatever is edited meanwhile.
    shutil.copytree(Path(pamm_compile.__file__).parent, destination / "pamm_compile")
    return destination


def _start(
    cache: Path, ratios: str, package: Path, dies_at: str = "", prefix: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", _SCRIPT, ratios, dies_at],
        env=environment,
        cwd=package,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = _ended(process)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def _ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=300)
    finally:
        process.kill()


def _run(cache: Path, package: Path, **options: Any) -> dict[str, Any]:
    (result,) = _results(_start(cache, "256", package, **options))
    return result


@pytest.mark.slow
def test_processes_that_share_a_cache(tmp_path: Path) -> None:
    cache, plain = tmp_path / "cache", _copy(tmp_path / "plain")
    # Another ratio is another graph, whatever the cache holds.
    first, other = _results(_start(cache, "256 64", plain))
    assert [first["rank"], other["rank"]] == [2, 8]
    assert first["aot"].get("autograd_cache_hit", 0) == 0
    assert other["aot"].get("autograd_cache_hit", 0) == 0

    # The same ratio is answered by the cache, with the report of the run that filled it.
    again = _run(cache, plain)
    assert again["rank"] == 2
    assert again["aot"]["autograd_cache_hit"] == 1
    assert again["report"] == first["report"]
    assert again["report"]["compressed"] == 1

    # An edited source misses, be it only a template's.
    edited = _copy(tmp_path / "edited")
    kernels = edited / "pamm_compile" / "methods" / "pamm" / "triton"
    with (kernels / "tiles.py").open("a") as source:
        source.write("\n# edited\n")
    missed = _run(cache, edited)
    assert missed["aot"].get("autograd_cache_hit", 0) == 0
    assert missed["inductor"].get("fxgraph_cache_hit", 0) == 0


@pytest.mark.slow
@pytest.mark.everything
def test_two_processes_fill_a_cold_cache_at_once(tmp_path: Path) -> None:
    cache, package = tmp_path / "cache", _copy(tmp_path)
    started = [_start(cache, "256", package) for _ in range(2)]
    (one,), (other,) = [_results(each) for each in started]
    again = _run(cache, package)
    assert again["aot"]["autograd_cache_hit"] == 1
    assert one["rank"] == other["rank"] == again["rank"] == 2
    assert one["report"] == other["report"] == again["report"]
    assert again["report"]["compressed"] == 1


@pytest.mark.slow
@pytest.mark.everything
def test_a_process_is_killed_while_it_writes(tmp_path: Path) -> None:
    cache, package = tmp_path / "cache", _copy(tmp_path)
    # The first file of all, ours, and the last.
    for dies_at in ("/", "cache/pamm_compile/", "/aotautograd/"):
        killed = _start(cache, "256", package, dies_at)
        _ended(killed)
        assert killed.returncode == -signal.SIGKILL
    first, again = (_run(cache, package) for _ in range(2))
    assert again["aot"]["autograd_cache_hit"] == 1
    assert first["rank"] == again["rank"] == 2
    assert first["report"] == again["report"]
    assert again["report"]["compressed"] == 1


@pytest.mark.slow
@pytest.mark.everything
def test_a_filled_cache_is_read_only_but_for_its_locks(tmp_path: Path) -> None:
    """Without locks, and to compile anew, Inductor by itself needs to write."""
    # Permissions do not stop root.
    obey = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    if obey and shutil.which(obey[0]) is None:
        pytest.skip("root can write anywhere, and there is no setpriv to make it obey")
    cache, package = tmp_path / "cache", _copy(tmp_path)
    first = _run(cache, package)
    folders = [cache, *(each for each in cache.rglob("*") if each.is_dir())]
    locks = cache / "locks"
    for folder in folders:
        folder.chmod(0o777 if folder == locks else 0o555)
    before = sorted(cache.rglob("*"))
    try:
        again = _run(cache, package, prefix=obey)
    finally:
        for folder in folders:
            folder.chmod(0o777)
    assert again["aot"]["autograd_cache_hit"] == 1
    assert again["report"] == first["report"]
    assert [path for path in sorted(cache.rglob("*")) if locks not in path.parents] == [
        path for path in before if locks not in path.parents
    ]
