"""The tables and the picture of docs/decoding.md, from the records of this package's scripts."""

from __future__ import annotations

import re
import statistics
from typing import Any

from examples.benchmarks import tables, timing

Records = list[dict[str, Any]]


def budgets(records: Records) -> list[str]:
    """A row a method, a column a length and budget: shares of right answers, and their loss."""
    cells: dict[tuple[str, str], Records] = {}
    columns: dict[str, None] = {}
    for record in records:
        if record["method"] != "full":
            column = f"{_context(record)}: {record['budget']:,}"
            columns[column] = None
            cells.setdefault((record["method"], column), []).append(record)
    for column in columns:
        context = column.split(":")[0]
        full = [r for r in records if r["method"] == "full" and _context(r) == context]
        cells["all of it", column] = full
    methods = ["all of it", *dict.fromkeys(m for m, _ in cells if m != "all of it")]
    rows = [
        [method, *(_answers(cells.get((method, c), [])) for c in columns)] for method in methods
    ]
    return tables.markdown(["", *columns], rows)


def _context(record: dict[str, Any]) -> str:
    return f"{'GPT-2 ' if 'gpt2' in record['model'] else ''}{record['length']:,}"


def _answers(records: Records) -> str:
    if not records:
        return "-"
    shares = [f"{r['accuracy']:.2f}" for r in records]
    return f"{'–'.join(shares)}/{statistics.mean(r['answer_loss'] for r in records):.2f}"


def equal_bytes(records: Records) -> list[str]:
    """A row a method, a column a share of the whole cache's bytes; cells as in `budgets`."""
    shares = sorted({r["share"] for r in records if r["method"] != "full"}, reverse=True)
    of: dict[str, dict[float, Records]] = {}
    for record in records:
        of.setdefault(record["method"], {}).setdefault(record["share"], []).append(record)
    full = of.pop("full")[1.0]
    rows = [["whole cache", *(_answers(full) for _ in shares)]]
    best = sorted(of, key=lambda m: statistics.mean(r["answer_loss"] for r in of[m][shares[-1]]))
    rows += [[method, *(_answers(of[method][share]) for share in shares)] for method in best]
    return tables.markdown(["", *(f"1/{1 / share:.0f}" for share in shares)], rows)


def models(records: Records) -> list[str]:
    """A row for what `attach` and `factor_keys` say, with the types of models they say it of."""
    of: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for asked in ("caches", "factor_keys"):
            if asked in record:
                of.setdefault((asked, _reason(record[asked])), []).append(record["kind"])
        if "unbuilt" in record:
            of.setdefault(("neither", "not built tiny, or does not generate"), []).append(
                record["kind"]
            )
    rows = [
        [asked, answer, str(len(kinds)), ", ".join(kinds)]
        for (asked, answer), kinds in sorted(
            of.items(), key=lambda item: (item[0][0], item[0][1] != "yes", -len(item[1]))
        )
    ]
    return tables.markdown(["asked", "answer", "models", ""], rows, left=4)


def _reason(answer: str) -> str:
    """An answer without the names of classes."""
    name = r"\b[A-Z]\w*(?:ForCausalLM|LMHeadModel|Decoder|Model|Attention)\b"
    answer = re.sub(rf"\bof {name}", "of it", answer)
    answer = re.sub(rf"{name}(: |\.| )?", "", answer)
    return re.sub(r"; known are.*|: \[.*", "", answer)


def times(records: Records) -> list[str]:
    """A row an arm: its time by that of a static cache, at every length, and what it holds."""
    base = "full, static cache"
    of = {(r["arm"], r["length"]): r for r in records}
    arms, lengths = (list(dict.fromkeys(key[i] for key in of)) for i in (0, 1))
    longest: Any = max(lengths)

    def ratio(arm: Any, length: Any, base: str) -> str:
        if (arm, length) not in of:
            return "-"
        mine, theirs = (of[name, length]["seconds"] for name in (arm, base))
        found = timing.quartiles(timing.paired_ratios(mine, theirs))
        quartiles = f" ({found.low:.2f}–{found.high:.2f})" if length == longest else ""
        return f"{found.median:.2f}{quartiles}"

    rows = []
    for arm in arms:
        last = of[arm, longest]
        by_default = timing.paired_ratios(last["seconds"], of["full", longest]["seconds"])
        rows.append(
            [
                str(arm),
                *(ratio(arm, length, base) for length in lengths),
                f"{statistics.median(by_default):.2f}",
                f"{1000 * statistics.median(last['seconds']):.0f}",
                f"{last['cache_bytes'] / 2**20:.0f}",
            ]
        )
    header = ["", *(f"{length:,}" for length in lengths), "by default", "ms", "MiB"]
    return tables.markdown(header, rows)


def ranks(records: Records) -> list[str]:
    """A row a rank: losses of answers and of text, before and after fine-tuning, by model."""
    whole = [r for r in records if r.get("rank") is None and "from_nothing" not in r]
    of: dict[tuple[str, int], dict[bool, Records]] = {}
    for record in records:
        if "tuned" in record:
            by_tuning = of.setdefault((record["rotary"], record["rank"]), {})
            by_tuning.setdefault(bool(record["tuned"]), []).append(record)

    def cell(found: Records) -> str:
        return ", ".join(map(_losses, found))

    rows = [["whole", cell(whole), "-"]]
    rows += [[f"{r}, {rotary}", cell(v[False]), cell(v[True])] for (rotary, r), v in of.items()]
    return tables.markdown(["rank", "as factored", "fine-tuned"], rows)


def _losses(record: dict[str, Any]) -> str:
    return f"{record['accuracy']:.2f}/{record['answer_loss']:.2f}/{record['text_loss']:.3f}"


def thin(records: Records) -> list[str]:
    """Whole and thin keys trained from nothing, a row each."""
    both = [r for r in records if "from_nothing" in r]
    whole = next(r for r in both if r["rank"] is None)
    rows = [
        [
            "whole keys" if r["rank"] is None else f"{r['rank']} dimensions a head",
            f"{r['parameters']:,}",
            str(timing.quartiles(timing.paired_ratios(r["seconds"], whole["seconds"]))),
            f"{r['train_loss']:.2f}",
            _losses(r),
        ]
        for r in both
    ]
    return tables.markdown(["", "parameters", "step", "loss in training", "unseen"], rows)


def evolution(records: Records) -> list[str]:
    """The mean and the least loss of the candidates of some generations."""
    shown = [r for r in records if r["generation"] in (1, 5, 10, 20, 30, 40, 50)]
    rows = [
        [name, *(f"{-r[key]:.2f}" for r in shown)]
        for name, key in (("mean loss", "mean"), ("least", "best"))
    ]
    return tables.markdown(["generation", *(str(r["generation"]) for r in shown)], rows)
