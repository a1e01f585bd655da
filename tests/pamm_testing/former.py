"""Compare a training step of every model of the zoo with that of a former commit, bit by bit.

    PYTHONPATH=tests python -m pamm_testing.former a83a98f
    PYTHONPATH=tests python -m pamm_testing.former main --only "llama|gpt2" --dtype bfloat16

Both packages run the models and options of this checkout, operator by operator, each in a process
of its own. A row says what differs: the sites that are compressed, the blocks that are saved for
the backward pass, the loss, or gradients. The command fails if a row does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pamm_testing.forms import FORMS
from pamm_testing.zoo import TRANSFORMERS, Case

CHECKOUT = Path(__file__).parents[2]
CASES = [*TRANSFORMERS, *FORMS]
RULES = ("qkv=pamm:4", "linear=pamm:4", "linear=subspace:4")

Found = dict[str, Any]


class Each:
    """A Dynamo backend that compiles with several, since tracing takes most of the time."""

    def __init__(self, backends: Sequence[Callable[..., Any]]) -> None:
        self.backends = backends
        self.chosen = 0

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = [backend(gm, inputs) for backend in self.backends]
        return lambda *given: compiled[self.chosen](*given)


def digest(tensor: Tensor) -> str:
    """Return a name for the very bits of a tensor."""
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def steps(case: Case, dtype: torch.dtype) -> dict[str, Found]:
    """Return, by rule, what one step of a model compresses, saves and computes."""
    # Of whichever commit is on the path.
    import pamm_compile
    from pamm_compile.inspect.measure import saved_storages

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = case.build().train().to(dtype), case.batch()
    batch = {k: _cast(v, dtype) for k, v in batch.items()}
    backends = [pamm_compile.backend(rules=r, min_tokens=1, base="aot_eager") for r in RULES]
    for backend in backends:
        # Equal arguments may give the object that the model before was compiled with.
        backend.report.clear()
    each = Each(backends)
    compiled = torch.compile(model, backend=each)
    found = {}
    for each.chosen, (rule, backend) in enumerate(zip(RULES, backends, strict=True)):
        found[rule] = _step(case, model, compiled, batch, saved_storages)
        sites = backend.report.compressed
        found[rule]["sites"] = sorted([*site.parameters, site.method] for site in sites)
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _step(
    case: Case, model: nn.Module, compiled: Any, batch: Mapping[str, Any], saved: Any
) -> Found:
    losses: list[Tensor] = []

    def forward() -> Tensor:
        losses.append(case.loss(compiled(**batch)))
        return losses[-1]

    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    blocks = saved(forward, model=model)
    losses[-1].backward()
    return {
        "blocks": sorted(block.bytes for block in blocks),
        "loss": digest(losses[-1]),
        "gradients": {n: digest(p.grad) for n, p in model.named_parameters() if p.grad is not None},
    }


def differences(former: Found, now: Found) -> list[str]:
    """Return what differs between two steps, a sentence each."""
    if "error" in former or "error" in now:
        return [f"error: {former.get('error', 'none')} → {now.get('error', 'none')}"]
    said = []
    for title, one, other in (("gone", former, now), ("new", now, former)):
        said += [f"site {title}: {', '.join(s)}" for s in one["sites"] if s not in other["sites"]]
    if former["blocks"] != now["blocks"]:
        said.append(f"saved bytes: {sum(former['blocks'])} → {sum(now['blocks'])}")
    if former["loss"] != now["loss"]:
        said.append("loss")
    one, other = former["gradients"], now["gradients"]
    changed = [
        name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)
    ]
    if changed:
        said.append(f"gradients: {', '.join(changed)}")
    return said


def _run(cases: Sequence[Case], dtype: torch.dtype) -> None:
    """Print a line of JSON a model; in the process of either package."""
    torch.set_num_threads(1)
    for case in cases:
        found: dict[str, Found] = {}
        try:
            found = steps(case, dtype)
        except (RuntimeError, ValueError, TypeError) as error:
            lines = str(error).strip().splitlines() or [""]
            found = {rule: {"error": f"{type(error).__name__}: {lines[0][:200]}"} for rule in RULES}
        print(json.dumps({"model": case.name, "found": found}), flush=True)


def _in_a_process(package: Path, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    path = os.pathsep.join([str(package), str(CHECKOUT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pamm_testing.former", *arguments, "--run"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=package,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    assert process.returncode == 0, f"{package}: exit code {process.returncode}"


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The package of a commit, in a folder that goes again."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit, "pamm_compile"],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="pamm_testing.former", description=__doc__)
    parser.add_argument("commit", help="to compare with")
    parser.add_argument("--only", default="", help="a regular expression over names of models")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        cases = [case for case in CASES if re.search(given.only, case.name)]
        return _run(cases, getattr(torch, given.dtype))
    failed = 0
    arguments = [given.commit, "--only", given.only, "--dtype", given.dtype]
    with checked_out(given.commit) as package:
        pairs = zip(*(_in_a_process(p, arguments) for p in (package, CHECKOUT)), strict=True)
        for former, now in pairs:
            assert former["model"] == now["model"]
            for rule in RULES:
                said = differences(former["found"][rule], now["found"][rule])
                compressed = len(now["found"][rule].get("sites", []))
                verdict = "; ".join(said) or f"equal, {compressed} sites"
                print(f"{former['model']}, {rule}: {verdict}", flush=True)
                failed += bool(said)
    return sys.exit(bool(failed))


if __name__ == "__main__":
    main()
