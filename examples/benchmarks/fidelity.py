"""Compare approximate weight gradients with the exact ones while a model trains exactly.

    python examples/benchmarks/fidelity.py
    python examples/benchmarks/fidelity.py --hidden 512 --heads 8 --layers 2 --batch 8 --lr 1e-3

At some steps of exact training the inputs X and output gradients dZ of every Q, K and V projection
are kept, and dZᵀ X̂ of each method is compared with dZᵀ X: cosine, relative error, and how much of
the error is bias (it stays when many draws are averaged) and how much is noise. At the end rows of
one X are drawn in their first two principal components, coloured by generator.

estimators.py has the methods, and how they are written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from examples.benchmarks import cli, corpus, estimators, machine, models, training
from examples.benchmarks.estimators import Method

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_SHOWN_ROWS = 1500


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[
            "pamm:fill=16",
            "directions:fill=16",
            "directions:2+pamm:fill=16",
            "directions:4+pamm:fill=16",
            "pamm:16+pamm:fill=16",
            "rows:fill=16",
            "hidden:fill=16",
            "sketch:fill=16",
        ],
    )
    parser.add_argument("--steps", type=cli.positive, default=300)
    parser.add_argument(
        "--at", type=int, nargs="+", help="steps to compare at (default: five over the training)"
    )
    parser.add_argument("--draws", type=cli.positive, default=8, help="default: 8")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--picture", default="pamm:16", help="method to draw (default: pamm:16)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_study_options(parser)
    return parser.parse_args(arguments)


class Recorder:
    """Keeps input and output gradient of projections for one step."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.enabled = False
        for name, module in model.named_modules():
            if name.endswith(_PROJECTIONS):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.enabled:
                self.inputs[name] = inputs[0].detach().flatten(0, -2)
                output.register_hook(
                    lambda g: self.gradients.__setitem__(name, g.detach().flatten(0, -2))
                )

        return hook


def compare(
    method: Method, x: Tensor, gradients: dict[str, Tensor], key: tuple[int, ...], draws: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Compare a method's weight gradients with the exact ones, over several draws.

    Args:
        method: any.
        x: [b, n].
        gradients: dZ of each projection, [b, m].
        key: numbers that seed the draws.
        draws: how many.

    Returns:
        Per projection: the mean cosine and relative error of one draw, and the relative error's two
        parts, in the sense error² = bias² + noise²; and the bytes stored a token.
    """
    sums: dict[str, Tensor] = {}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in gradients}
    stored = 0
    exact = {name: dz.T @ x for name, dz in gradients.items()}
    for draw in range(draws):
        kept = method.store(x, estimators.generator_of(*key, draw), torch.bfloat16)
        stored = sum(each.bytes for each in kept)
        approximation = torch.stack([each.approximation for each in kept]).sum(0)
        for name, dz in gradients.items():
            estimate, true = dz.T @ approximation, exact[name]
            sums[name] = sums.get(name, 0) + estimate
            cosine = nn.functional.cosine_similarity(estimate.flatten(), true.flatten(), dim=0)
            found[name]["cosine"].append(cosine.item())
            found[name]["square"].append(((estimate - true).norm() / true.norm()).item() ** 2)
    results = {}
    for name, figures in found.items():
        total = statistics.fmean(figures["square"])
        of_mean = ((sums[name] / draws - exact[name]).norm() / exact[name].norm()).item() ** 2
        # The mean of D draws still has 1/D of the noise: E‖mean − true‖² = bias² + noise²/D.
        noise = max(0.0, total - of_mean) * draws / (draws - 1) if draws > 1 else 0.0
        results[name] = {
            "cosine": statistics.fmean(figures["cosine"]),
            "error": total**0.5,
            "bias": max(0.0, total - noise) ** 0.5,
            "noise": noise**0.5,
        }
    return results, stored / x.shape[0]


def measure(
    recorder: Recorder, methods: list[Method], step: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    layers: dict[str, list[str]] = defaultdict(list)
    for name in recorder.gradients:
        layers[name.rpartition(".")[0]].append(name)
    for number, names in enumerate(layers.values()):
        # Q, K and V share their input.
        x = recorder.inputs[names[0]]
        gradients = {name: recorder.gradients[name] for name in names}
        for method in methods:
            found, stored = compare(method, x, gradients, (args.seed, step, number), args.draws)
            rows += [
                {
                    "step": step,
                    "layer": number,
                    "projection": name.rpartition(".")[2],
                    "method": method.text,
                    "bytes_per_token": stored,
                    **figures,
                }
                for name, figures in found.items()
            ]
    return rows


def text_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: per method the mean over projections and layers, at every step."""
    steps = sorted({row["step"] for row in rows})
    lines = [
        "| method | bytes a token | "
        + " | ".join(f"cosine, step {step}" for step in steps)
        + " | lowest | error | bias | noise |",
        "|---|--:|" + "--:|" * (len(steps) + 4),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        last = [row for row in mine if row["step"] == steps[-1]]
        cosines = [
            statistics.fmean(row["cosine"] for row in mine if row["step"] == step) for step in steps
        ]
        lines.append(
            f"| `{method}` | {mine[0]['bytes_per_token']:.1f} | "
            + " | ".join(f"{cosine:.3f}" for cosine in cosines)
            + f" | {min(row['cosine'] for row in mine):.3f} | "
            + " | ".join(
                f"{statistics.fmean(row[part] for row in last):.2f}"
                for part in ("error", "bias", "noise")
            )
            + " |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for axis, projection in zip(axes, _PROJECTIONS, strict=True):
        axis.set_prop_cycle(color=colors)
        for method in dict.fromkeys(row["method"] for row in rows):
            by_step: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                if row["method"] == method and row["projection"] == projection:
                    by_step[row["step"]].append(row["cosine"])
            steps = sorted(by_step)
            means = [statistics.fmean(by_step[step]) for step in steps]
            axis.plot(steps, means, marker="o", markersize=3, label=method)
        axis.set(title=projection, xlabel="step", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("cosine with the exact gradient")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def picture(x: Tensor, method: Method, seed: int, title: str, path: Path) -> None:
    """Draw rows of X and their approximations in the first two principal components of X."""
    stored = method.store(x, estimators.generator_of(seed), torch.bfloat16)
    index = next((each.index for each in stored if each.index is not None), None)
    if index is None:
        raise SystemExit(f"--picture {method.text} has no generators to colour by")
    approximation = torch.stack([each.approximation for each in stored]).sum(0)
    center = x.mean(0)
    _, spread, components = torch.pca_lowrank(x - center, q=8, center=False)
    share = spread[:2].square().sum() / (x - center).square().sum()
    shown = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:_SHOWN_ROWS]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.8), sharex=True, sharey=True, layout="constrained"
    )
    for axis, values, name in zip(
        axes, (x, approximation), ("rows of X", "their approximations"), strict=True
    ):
        at = (values[shown] - center) @ components[:, :2]
        axis.scatter(at[:, 0], at[:, 1], c=index[shown] % 20, cmap="tab20", s=5, linewidths=0)
        axis.set(title=name, xlabel="first principal component")
    axes[0].set_ylabel("second")
    error = (approximation - x).norm() / x.norm()
    figure.suptitle(
        f"{title}, {method.text}: the plane holds {share:.0%} of X's variance; "
        f"relative error of X̂ {error:.2f}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse()
    cli.prepare_study(args)
    torch.manual_seed(args.seed)
    facts = machine.facts()
    methods = [estimators.parse(method) for method in args.methods]
    picture_method = estimators.parse(args.picture)
    last = args.steps - 1
    wanted = sorted(
        set(args.at or [0, args.steps // 10, args.steps // 3, 2 * args.steps // 3, last])
    )
    model = models.study_model(args)
    recorder = Recorder(model)
    text = corpus.Text()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    draws = torch.Generator().manual_seed(args.seed)
    rows: list[dict[str, Any]] = []
    losses = []
    for step in range(args.steps):
        recorder.enabled = step in wanted
        batch = corpus.draw(text.train, "llama", args.batch, args.sequence, draws)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if recorder.enabled:
            rows += measure(recorder, methods, step, args)
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"fidelity-{args.hidden}-seed{args.seed}"
    what = f"{args.layers} layers of width {args.hidden}, {args.batch * args.sequence:,} tokens"
    record = {
        "environment": facts,
        "options": cli.options(args),
        "rows": rows,
        "losses": losses,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, f"{what}, seed {args.seed}", stem.with_suffix(".png"))
    middle = f"model.layers.{args.layers // 2}.self_attn.q_proj"
    if middle in recorder.inputs:
        name = f"layer {args.layers // 2} after {args.steps} steps"
        shown = args.out / f"generators-{args.hidden}.png"
        picture(recorder.inputs[middle], picture_method, args.seed, name, shown)
    print(f"\n{what}, {args.draws} draws; error, bias and noise at the last step\n")
    print(f"{text_table(rows)}\n\n{stem}.json")


if __name__ == "__main__":
    cli.run(main)
