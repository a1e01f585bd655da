"""Compare approximate weight gradients with the exact ones while a model trains exactly.

    python examples/studies/fidelity.py
    python examples/studies/fidelity.py --hidden 512 --heads 8 --layers 2 --batch 8 --lr 1e-3

At some steps of exact training the inputs X and output gradients dZ of every projection of the
--targets are kept, and the weight gradients of each method are compared with dZᵀ X: cosine,
relative error, and how much of the error is bias (it stays when many draws are averaged) and how
much is noise. At the end rows of one X are drawn in their first two principal components, coloured
by generator. `pamm_compile.fidelity` does the same on a model and a batch of your own.

choices.py says how methods are written; the package's own run as they ship.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
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

from examples.benchmarks import cli, corpus, machine, models, tables, training
from examples.studies import choices, estimators
from examples.studies.choices import Choice
from pamm_compile.methods.base import Method
from pamm_compile.size import Size

GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
          "gate_proj": "gate, up", "up_proj": "gate, up", "down_proj": "down"}  # fmt: skip
"""Of projections that share an input, the name."""
TARGETS = {"qkv": ("qkv",), "linear": tuple(dict.fromkeys(GROUPS.values()))}
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
    parser.add_argument("--targets", choices=TARGETS, default="qkv")
    parser.add_argument("--steps", type=cli.positive, default=300)
    parser.add_argument(
        "--at", type=int, nargs="+", help="steps to compare at (default: five over the training)"
    )
    parser.add_argument("--draws", type=cli.positive, default=8, help="default: 8")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--picture", default="generators:16", help="method to draw (PAMM, k = 16)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: ./runs)")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_study_options(parser)
    return parser.parse_args(arguments)


class Recorder:
    """Keeps input and output gradient of projections for one step."""

    def __init__(self, model: nn.Module, groups: Sequence[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.enabled = False
        for name, module in model.named_modules():
            if GROUPS.get(name.rpartition(".")[2]) in groups:
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.enabled:
                self.inputs[name] = inputs[0].detach().flatten(0, -2)
                output.register_hook(
                    lambda g: self.gradients.__setitem__(name, g.detach().flatten(0, -2))
                )

        return hook

    def sites(self) -> Iterator[tuple[int, str, list[str]]]:
        """Yield layer, name of the group, and the projections that read one input."""
        found: dict[tuple[int, str], list[str]] = defaultdict(list)
        for name in self.gradients:
            layer = int(next(part for part in name.split(".") if part.isdigit()))
            found[layer, GROUPS[name.rpartition(".")[2]]].append(name)
        for (layer, group), names in sorted(found.items()):
            yield layer, group, names


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
        parts, in the sense error² = bias² + noise²; and the bytes stored a token, in bfloat16.
    """
    sums: dict[str, Tensor] = {}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in gradients}
    outputs = [dz.shape[1] for dz in gradients.values()]
    exact = {name: dz.T @ x for name, dz in gradients.items()}
    for draw in range(draws):
        stored = method.store(x, estimators.seed_of(x, *key, draw), outputs)
        flags = [False] * len(gradients)
        estimates = method.weight_gradients(stored, list(gradients.values()), flags)
        for name, estimate in zip(gradients, estimates, strict=True):
            true = exact[name]
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
    size = Size(*x.shape, tuple(outputs), torch.bfloat16)
    return results, method.stored_bytes(size) / x.shape[0]


def measure(
    recorder: Recorder, choices: Sequence[Choice], step: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Compare all methods on what one step left."""
    rows = []
    for layer, group, names in recorder.sites():
        x = recorder.inputs[names[0]]
        gradients = {name: recorder.gradients[name] for name in names}
        for choice in choices:
            key = (args.seed, step, layer)
            found, stored = compare(choice.method, x, gradients, key, args.draws)
            rows += [
                {
                    "step": step,
                    "layer": layer,
                    "group": group,
                    "projection": name.rpartition(".")[2],
                    "method": choice.text,
                    "bytes_per_token": stored,
                    **figures,
                }
                for name, figures in found.items()
            ]
    return rows


def group_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return Markdown: error of one draw and its bias at the last step, by group of projections."""
    last = max(row["step"] for row in rows)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"`{method}`"]
        for group in groups:
            of = [r for r in rows if (r["method"], r["group"], r["step"]) == (method, group, last)]
            error, bias, stored = (
                statistics.fmean(row[part] for row in of)
                for part in ("error", "bias", "bytes_per_token")
            )
            cells.append(f"{error:.2f} ({bias:.2f}), {stored:.0f}")
        lines.append(cells)
    return tables.markdown(["error (bias), bytes a token", *groups], lines)


def step_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return Markdown: per method the mean over projections and layers, at every step."""
    steps = sorted({row["step"] for row in rows})
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        last = [row for row in mine if row["step"] == steps[-1]]
        cosines = [
            statistics.fmean(row["cosine"] for row in mine if row["step"] == step) for step in steps
        ]
        stored = statistics.fmean(row["bytes_per_token"] for row in mine)
        lowest = min(row["cosine"] for row in mine)
        parts = [statistics.fmean(row[part] for row in last) for part in ("error", "bias", "noise")]
        cells = [*(f"{cosine:.3f}" for cosine in (*cosines, lowest)), *(f"{p:.2f}" for p in parts)]
        lines.append([f"`{method}`", f"{stored:.1f}", *cells])
    head = [*(f"cosine, step {step}" for step in steps), "lowest", "error", "bias", "noise"]
    return tables.markdown(["method", "bytes a token", *head], lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    projections = list(dict.fromkeys(row["projection"] for row in rows))
    figure, axes = plt.subplots(
        1, len(projections), figsize=(3.7 * len(projections), 3.8), sharey=True,
        layout="constrained",
    )  # fmt: skip
    colors = plt.get_cmap("tab20").colors
    for axis, projection in zip(axes, projections, strict=True):
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


def picture(x: Tensor, choice: Choice, seed: int, title: str, path: Path) -> None:
    """Draw rows of X and their approximations in the first two principal components of X."""
    stored = choice.method.store(x, estimators.seed_of(x, seed), [x.shape[1]])
    codes = (t for t in stored if not t.is_floating_point() and t.shape == x.shape[:1])
    index = next(codes, None)
    if index is None:
        raise SystemExit(f"--picture {choice.text} has no generators to colour by")
    approximation = estimators.approximation(choice.method, stored, x)
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
        f"{title}, {choice.text}: the plane holds {share:.0%} of X's variance; "
        f"relative error of X̂ {error:.2f}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse()
    cli.prepare_study(args)
    torch.manual_seed(args.seed)
    facts = machine.facts("cpu", args.threads)
    chosen = [choices.parse(method) for method in args.methods]
    drawn = choices.parse(args.picture)
    last = args.steps - 1
    wanted = sorted(
        set(args.at or [0, args.steps // 10, args.steps // 3, 2 * args.steps // 3, last])
    )
    model = models.study_model(args)
    recorder = Recorder(model, TARGETS[args.targets])
    text = corpus.Text()
    run = training.Run(
        "exact", model, lambda batch: model(**batch).loss, training.optimizer_of(model, args.lr)
    )
    data = training.batches(text.train, "llama", args.batch, args.sequence, args.seed)
    rows: list[dict[str, Any]] = []
    for step in range(args.steps):
        recorder.enabled = step in wanted
        run.step(next(data), training.learning_rate(step, args.steps, args.lr))
        if recorder.enabled:
            rows += measure(recorder, chosen, step, args)
            print(f"step {step}: loss {run.losses[-1]:.3f}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"fidelity-{args.hidden}-seed{args.seed}"
    what = f"{args.layers} layers of width {args.hidden}, {args.batch * args.sequence:,} tokens"
    record = {
        "environment": facts,
        "options": cli.options(args),
        "rows": rows,
        "losses": run.losses,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, f"{what}, seed {args.seed}", stem.with_suffix(".png"))
    middle = f"model.layers.{args.layers // 2}.self_attn.q_proj"
    if middle in recorder.inputs:
        name = f"layer {args.layers // 2} after {args.steps} steps"
        shown = args.out / f"generators-{args.hidden}.png"
        picture(recorder.inputs[middle], drawn, args.seed, name, shown)
    print(f"\n{what}, {args.draws} draws; error, bias and noise at the last step\n")
    print("\n".join([*step_table(rows), "", *group_table(rows)]))
    print(f"\n{stem}.json")


if __name__ == "__main__":
    cli.run(main)
