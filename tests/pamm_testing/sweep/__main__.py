"""The command: see the package."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pamm_testing.sweep.catalogue import catalogue, preload
from pamm_testing.sweep.check import RULES, Row, check
from pamm_testing.sweep.steps import Architecture

WRONG = ("silent", "unlisted", "unchanged", "unknown names", "inputs", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pamm_testing.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="rows, one a line")
    parser.add_argument("--only", default="", help="a regular expression over names")
    parser.add_argument("--limit", type=float, default=300, help="seconds an architecture may take")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop")
    parser.add_argument("--trained", type=int, default=10**6, help="stop once so many trained")
    parser.add_argument("--layers", type=int, default=2, help="of every kind of layer, at least")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--summary", action="store_true", help="only sum up what is there")
    chosen = parser.parse_args()

    architectures = [a for a in catalogue(chosen.layers) if re.search(chosen.only, a.name)]
    if chosen.list:
        print(*(a.name for a in architectures), sep="\n")
        return
    preload()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    rows = _rows(chosen.out)
    done = {row["name"] for row in rows}
    end = time.monotonic() + 60 * chosen.minutes
    for architecture in architectures if not chosen.summary else ():
        trained = sum(row["status"] == "trained" for row in rows)
        if time.monotonic() > end or trained >= chosen.trained:
            break
        if architecture.name not in done:
            rows.append(in_a_process(architecture, chosen.limit))
            with chosen.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(_line(rows[-1]), flush=True)
    print(summary(rows))
    sys.exit(any(_is_wrong(row) for row in rows))


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def in_a_process(architecture: Architecture, limit: float) -> Row:
    """Check an architecture in a process of its own; that it hung or died is a row, too."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(architecture, sending))
    start = time.monotonic()
    process.start()
    sending.close()
    row: Row = {"name": architecture.name}
    try:
        row = receiving.recv() if receiving.poll(limit) else row | {"status": "hung"}
    except EOFError:
        process.join()
        row |= {"status": "died", "error": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiving.close()
    return row | {"seconds": round(time.monotonic() - start, 1), "torch": torch.__version__}


def _child(architecture: Architecture, sending: Connection) -> None:
    torch.set_num_threads(1)
    # Tracing makes objects by the million, and this process ends soon.
    gc.disable()
    sending.send(check(architecture))


def _is_wrong(row: Row) -> bool:
    return row["status"] in ("crashed", "died", "hung") or any(_wrong(row))


def _wrong(row: Row) -> Iterable[tuple[str, str, Any]]:
    for rules in RULES:
        for kind in WRONG:
            # Which weights are queries only the package's own matching tells.
            if row.get(rules, {}).get(kind) and (rules, kind) != ("qkv", "silent"):
                yield rules, kind, row[rules][kind]


def _line(row: Row) -> str:
    more = row.get("error", "") or "; ".join(f"{r} {k}: {', '.join(w)}" for r, k, w in _wrong(row))
    return f"{row['status']:8} {row['seconds']:6.1f} s  {row['name']}  {more}"[:400]


def summary(rows: list[Row]) -> str:
    """Return how many were tried and trained, and everything that is not as promised."""
    states = Counter(row["status"] for row in rows)
    libraries = Counter(r["name"].split("/")[0] for r in rows if r["status"] == "trained")
    lines = [
        f"{len(rows)} tried: " + ", ".join(f"{n} {state}" for state, n in states.most_common()),
        "trained: " + ", ".join(f"{n} of {library}" for library, n in libraries.most_common()),
    ]
    for kind in WRONG:
        found = [row for row in rows if any(k == kind for _, k, _ in _wrong(row))]
        lines.append(f"{kind}: {len(found)} {' '.join(row['name'] for row in found)}".rstrip())
    skipped = Counter(row.get("error", "")[:90] for row in rows if row["status"] == "skipped")
    lines += [f"skipped × {n}: {error}" for error, n in skipped.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
