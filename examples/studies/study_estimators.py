"""What decides the error of `Subspace`, and what else its bytes could buy.

    python examples/studies/study_estimators.py --hidden 512 --heads 8 --layers 2 --steps 100 \
        --lr 1e-3 --seed 0
    python examples/studies/study_estimators.py --table runs/estimators-512-seed*.json

Trains a small LLaMA exactly, keeps inputs X and output gradients dZ of every linear layer at the
last step, and compares each method's dW with dZᵀX: relative error, and the bias in it, which stays
when draws are averaged (error² = bias² + noise²). Methods get the same bytes a token at the inputs
of q, k, v, o, gate and up: as many directions or generators as fit, what is stored beside the
tokens included; at that of down the same number of them.

`Subspace` and `Pamm` are the package's own. Variants share its directions
(`principal_directions`) and code the coefficients here, as they are named:

    Subspace        coded as the package does
    near, stochastic    rounded to nearest, or stochastically, in place of dithered
    column, block=N     a scale a direction, or a direction and N tokens
    lead=S          a share S of the directions in 8 bits
    tail=S,damp=D   a share S of the directions random ones of the tail, weighted by its size
                    relative to theirs to the power D (PRAC: D = 1, unbiased)
    lottery=C       r of C·r directions, drawn with probabilities and reweighted: unbiased
    pamm=K          PAMM with K generators on what the directions leave
    stale=N         directions of N steps before
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from examples.benchmarks import cli, corpus, machine, models, tables, training
from examples.studies.subspace_variants import STORED, Estimate, Variants
from pamm_compile import Pamm, Size, Subspace
from pamm_compile.methods.base import Method

TARGETS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate, up",
    "up_proj": "gate, up",
    "down_proj": "down",
}
_SHARES_INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_KEPT = {"x": 1, "x1": 2, "x16": 17}
"""Names of captured inputs, and how many steps before the end they are of."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--steps", type=cli.positive, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bytes", type=float, nargs="+", default=[20, 35, 70], help="a token (default: 20 35 70)"
    )
    parser.add_argument("--draws", type=cli.positive, default=4, help="default: 4")
    parser.add_argument(
        "--captured", type=Path, help="where X and dZ are kept, so that training runs once"
    )
    parser.add_argument("--only", nargs="+", help="variants whose names contain one of these")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these records")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    cli.add_study_options(parser)
    return parser.parse_args(arguments)


def capture(args: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """Train exactly, and return inputs at some steps and output gradients at the last one."""
    model = models.study_model(args)
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    recording = False

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if recording:
                if name.rpartition(".")[2] not in _SHARES_INPUT_OF:
                    inputs[name] = given[0].detach().flatten(0, -2)
                output.register_hook(
                    lambda g: gradients.__setitem__(name, g.detach().flatten(0, -2))
                )

        return hook

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            module.register_forward_hook(hook_of(name))
    optimizer = training.optimizer_of(model, args.lr)
    data = training.batches(corpus.Text().train, "llama", args.batch, args.sequence, args.seed)
    found: dict[str, dict[str, Tensor]] = {}
    for step in range(args.steps):
        kept = [name for name, back in _KEPT.items() if step == max(0, args.steps - back)]
        recording = bool(kept)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        model(**next(data)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.update({name: dict(inputs) for name in kept})
    return {**found, "dz": gradients}


def bytes_a_token(name: str, available: float, tokens: int, features: int) -> float:
    """Return what the package's methods store; what a variant was given of the others."""
    if not name.startswith(("Pamm", "Subspace")):
        return available
    size = int(name.partition("=")[2].partition(",")[0])
    method: Method = Subspace(size)
    if name.startswith("Pamm"):
        method = Pamm(max(1.0, tokens / size))
    elif "8 bits" in name:
        method = Subspace(size, bits=8)
    elif "None" in name:
        method = Subspace(size, bits=None)
    return method.stored_bytes(Size(tokens, features, (4 * features,), STORED)) / tokens


def compare(
    captured: dict[str, dict[str, Tensor]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row a method, site and projection."""
    sites: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, dz in captured["dz"].items():
        head, _, last = name.rpartition(".")
        sites[f"{head}.{_SHARES_INPUT_OF.get(last, last)}"][last] = dz.float()
    rows = []
    for available in args.bytes:
        tokens = args.batch * args.sequence
        for name, make in Variants(available, tokens, args.hidden).methods().items():
            if args.only and not any(word in name for word in args.only):
                continue
            for number, (site, gradients) in enumerate(sites.items()):
                x, before = (captured[which][site].float() for which in ("x", "x16"))
                found = _errors(make, x, before, gradients, args.draws, args.seed, number)
                rows += [
                    {
                        "bytes": available,
                        "stored": bytes_a_token(name, available, tokens, x.shape[1]),
                        "method": name,
                        "site": site,
                        "target": TARGETS[projection],
                        "projection": projection,
                        **figures,
                    }
                    for projection, figures in found.items()
                ]
            print(f"{available:g} bytes: {name}", flush=True)
    return rows


def _errors(
    make: Callable[[Tensor, Tensor, torch.Generator], Estimate],
    x: Tensor,
    before: Tensor,
    gradients: dict[str, Tensor],
    draws: int,
    *key: int,
) -> dict[str, dict[str, float]]:
    exact = {name: dz.T @ x for name, dz in gradients.items()}
    sums = {name: torch.zeros_like(each) for name, each in exact.items()}
    squares: dict[str, list[float]] = defaultdict(list)
    for draw in range(draws):
        estimates = make(x, before, _generator(*key, draw))(list(gradients.values()))
        for name, estimate in zip(gradients, estimates, strict=True):
            sums[name] += estimate
            squares[name].append(_relative(estimate, exact[name]) ** 2)
    found = {}
    for name, each in squares.items():
        total, of_mean = statistics.fmean(each), _relative(sums[name] / draws, exact[name]) ** 2
        # The mean of D draws still has 1/D of the noise.
        noise = max(0.0, total - of_mean) * draws / (draws - 1) if draws > 1 else 0.0
        found[name] = {"error": total**0.5, "bias": max(0.0, total - noise) ** 0.5}
    return found


def _relative(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number * 7919 + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def text_table(records: list[dict[str, Any]]) -> str:
    """Return Markdown: per method and target the mean over seeds, layers and projections."""
    rows = [row for record in records for row in record["rows"]]
    targets = list(dict.fromkeys(TARGETS.values()))
    header = ["bytes a token", "method", *(f"{each}: error (bias)" for each in targets)]
    lines = []
    for available, method in dict.fromkeys((row["bytes"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["bytes"], row["method"]) == (available, method)]
        cells = []
        for target in targets:
            these = [row for row in mine if row["target"] == target]
            error, bias = (statistics.fmean(r[part] for r in these) for part in ("error", "bias"))
            cells.append(f"{error:.3f} ({bias:.3f})")
        lines.append([f"{available:g}", method, *cells])
    return "\n".join(tables.markdown(header, lines, left=2))


def main() -> None:
    args = parse()
    if args.table:
        print(text_table([json.loads(path.read_text()) for path in args.table]))
        return
    cli.prepare_study(args)
    torch.manual_seed(args.seed)
    if args.captured and args.captured.exists():
        captured = torch.load(args.captured)
    else:
        captured = capture(args)
        if args.captured:
            torch.save(captured, args.captured)
    rows = compare(captured, args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"estimators-{args.hidden}-seed{args.seed}.json"
    record = {"environment": machine.facts(), "options": cli.options(args), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{text_table([record])}\n\n{path}")


if __name__ == "__main__":
    cli.run(main)
