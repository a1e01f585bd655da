"""Draw right answers by bytes of the cache, from what budgets.py recorded.

python examples/benchmarks/decoding/picture.py docs/benchmarks/decoding-bytes.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from examples.benchmarks import cli
from examples.benchmarks.tables import records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("records", type=Path, help="what budgets.py --bytes --out wrote")
    parser.add_argument("--out", type=Path, help="default: beside the records, as .png")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    of: dict[str, dict[float, list[float]]] = {}
    for record in records(args.records):
        by_share = of.setdefault(record["method"], {})
        by_share.setdefault(record["share"], []).append(record["accuracy"])
    whole = statistics.mean(of.pop("full")[1.0])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(whole, color="grey", linewidth=1, label="whole cache")
    for method, by_share in of.items():
        shares = sorted(by_share)
        means = [statistics.mean(by_share[share]) for share in shares]
        line = "--" if "kvpress" in method else "-"
        axes.plot(shares, means, line, marker="o", markersize=4, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shares, [f"1/{1 / share:.0f}" for share in shares])
    axes.set_xlabel("bytes by those of the whole cache")
    axes.set_ylabel("right answers")
    axes.set_ylim(0, 1.03)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    out = args.out or args.records.with_suffix(".png")
    figure.savefig(out, dpi=120)
    print(f"drawn in {out}")


if __name__ == "__main__":
    cli.run(main)
