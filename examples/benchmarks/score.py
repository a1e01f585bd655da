"""Time to a score: what an arm needs of the time in which exact training is as far.

    python examples/benchmarks/score.py                     # everything, hours
    python examples/benchmarks/score.py --task encoder --arm gradients
    python examples/benchmarks/score.py --times             # of a step, on a machine that is idle
    python examples/benchmarks/score.py --table

Two settings: "encoder" tunes a pretrained sentence encoder (examples/encoder.py), "scratch" trains
a byte-level LLaMA from random weights. Arms of a seed share weights, batches and their order. Exact
runs of several lengths, each with a schedule of its own, say how many exact steps a loss is worth:

    loss of an arm after N steps ── line through exact runs ── s exact steps
    time to exact's score = (N / s) · (time of a step by exact's)

Times of a step are paired: all arms take every batch in turn. Runs that --out holds are not made
again. Every arm has the learning rate of its own lowest loss.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:
    # Run by its path; see this package's docstring.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import pamm_compile
from examples import encoder
from examples.benchmarks import cli, corpus, machine, models, tables, training
from examples.benchmarks.score_arms import EXACT, LENGTHS, OURS, TIMED_ONLY, Arm
from examples.benchmarks.timing import in_turn, paired_ratios, seconds

Record = dict[str, Any]
SEEDS = 3
_BEHIND = 3
"""How many steps behind a nearly exact one timing begins: one whose bytes are measured is last."""


def tuning(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW over what is trained of a pretrained model."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return torch.optim.AdamW(trained, rate, weight_decay=0.01)


@dataclass(frozen=True)
class Task:
    """One setting."""

    name: str
    steps: int
    rates: tuple[float, ...]
    arms: dict[str, Arm]
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[Callable[..., Any], Any], Tensor]
    score: Callable[[nn.Module], dict[str, Any]]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    """Of what is trained, at a peak learning rate."""


_WIDTH, _LAYERS, _HEADS, _WINDOWS, _BYTES = 512, 2, 8, 8, 256


def _llama() -> nn.Module:
    sizes = (_WIDTH, _LAYERS, _HEADS, models.study_inner(_WIDTH), 256, _BYTES)
    return models.build(models.Shape("llama", *sizes))


def _windows(seed: int) -> Iterator[Any]:
    return training.batches(corpus.Text().train, "llama", _WINDOWS, _BYTES, seed)


def _validation(model: nn.Module) -> dict[str, float]:
    data = training.batches(corpus.Text().validation, "llama", _WINDOWS, _BYTES, 0)
    return {"loss": training.validate(lambda batch: model(**batch).loss, model, data, 32)}


TASKS = {
    "encoder": Task(
        "encoder",
        48,
        (2.5e-5, 5e-5, 1e-4),
        {**EXACT, **OURS, "lora": Arm("LoRA, r = 16, all linear layers", lora=16)},
        encoder.model,
        encoder.batches,
        lambda call, batch: call(*batch),
        encoder.score,  # type: ignore[arg-type]
        tuning,
    ),
    "scratch": Task(
        "scratch",
        120,
        (5e-4, 1e-3, 2e-3),
        {**EXACT, **OURS},
        _llama,
        _windows,
        lambda call, batch: call(**batch).loss,
        _validation,
        training.optimizer_of,
    ),
}


def made(task: Task, arm: Arm, seed: int, base: str) -> tuple[nn.Module, Callable[..., Any], Any]:
    """Return the model of an arm, it compiled, and by which backend."""
    torch.manual_seed(seed)
    model = task.model()
    if arm.lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=arm.lora, lora_alpha=2 * arm.lora, target_modules="all-linear")
        torch.manual_seed(seed)
        model.bert = get_peft_model(model.bert, adapters)  # type: ignore[arg-type, assignment]
    backend: Any = "inductor" if base == "inductor" else base
    if arm.rules is not None:
        backend = pamm_compile.backend(rules=arm.rules, goal=arm.goal, base=base)  # type: ignore[arg-type]
    return model, torch.compile(model, backend=backend), backend


def step(task: Task, model: nn.Module, call: Any, batch: Any, update: Any) -> None:
    """Take one step."""
    update.zero_grad()
    task.loss(call, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    update.step()


def train(task: Task, arm: Arm, seed: int, rate: float, base: str) -> nn.Module:
    """Return what an arm trains."""
    torch._dynamo.reset()
    model, call, _ = made(task, arm, seed, base)
    exact = torch.compile(model, backend=base)
    update, steps = task.optimizer(model, rate), round(arm.share * task.steps)
    data = task.batches(seed + 1000 * arm.order)
    for number in range(steps):
        for group in update.param_groups:
            group["lr"] = training.learning_rate(number, steps, rate) * group.get("scale", 1.0)
        step(task, model, exact if arm.is_exact(number, steps) else call, next(data), update)
    return model


def run(task: Task, name: str, seed: int, rate: float, base: str) -> Record:
    """Train one arm, and return its score."""
    started = time.perf_counter()
    model = train(task, task.arms[name], seed, rate, base)
    return {
        "task": task.name,
        "arm": name,
        "seed": seed,
        "rate": rate,
        "steps": round(task.arms[name].share * task.steps),
        **task.score(model),
        "base": base,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": machine.facts(),
    }


def times(task: Task, names: Sequence[str], rounds: int, base: str) -> Record:
    """Return the times of a step of several arms, which take the same batches in turn."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    arms = {**task.arms, **TIMED_ONLY}
    calls, saved, held = {}, {}, {}
    data = task.batches(0)
    batch = next(data)
    for name in names:
        with torch._functorch.config.patch(activation_memory_budget=arms[name].budget):
            model, call, backend = made(task, arms[name], 0, base)
            update = task.optimizer(model, 1e-5)
            # What remembers takes its other graph after these.
            for _ in range(arms[name].early + 2):
                step(task, model, call, batch, update)
        use = pamm_compile.measure_memory(
            lambda call=call: task.loss(call, batch), model=model, warmup=0
        )
        saved[name] = use.saved_bytes
        held[name] = backend.report.bytes_remembered if arms[name].rules else 0
        calls[name] = (model, call, update)
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        batch = next(data)
        for name in in_turn(list(names), round_):
            model, call, update = calls[name]
            one = functools.partial(step, task, model, call, batch, update)
            found[name].append(seconds(one, torch.device("cpu")))
    return {
        "task": task.name,
        "times_s": found,
        "saved_bytes": saved,
        "held_bytes": held,
        "environment": machine.facts(),
    }


def steps_worth(loss: float, curve: Sequence[tuple[int, float]]) -> float:
    """Return how many exact steps end at a loss, by the two exact runs whose losses are nearest.

    Args:
        loss: of an arm.
        curve: steps and losses of exact runs, at least two.
    """
    (n0, l0), (n1, l1) = sorted(curve, key=lambda point: abs(point[1] - loss))[:2]
    return n0 + (loss - l0) * (n1 - n0) / (l1 - l0)


def step_ratio(
    mine: Sequence[float], exact: Sequence[float], turns: int, early: float = 0.0
) -> float:
    """Return the time of a mean step by an exact one's: medians of paired ratios, by phase.

    Args:
        mine: times of an arm, as `times` measures them.
        exact: of exact steps, beside those.
        turns: after how many steps an arm's are alike again.
        early: share of the steps that are nearly exact for coming first.
    """
    ratios = paired_ratios(mine, exact)
    phases = [statistics.median(ratios[phase::turns]) for phase in range(turns)]
    return early * phases[-_BEHIND % turns] + (1 - early) * statistics.fmean(phases)


def best_rates(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Return, by task and arm, the learning rate whose runs end lowest.

    By the mean of all seeds where any rate was run with all, by seed 0 before.
    """
    losses: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for r in records:
        of = losses.setdefault((r["task"], r["arm"]), {}).setdefault(r["rate"], {})
        of[r["seed"]] = r["loss"]

    def order(of: dict[int, float]) -> tuple[bool, float]:
        whole = len(of) >= SEEDS
        return not whole, statistics.fmean(of.values()) if whole else of.get(0, math.inf)

    return {key: min(rates, key=lambda r: order(rates[r])) for key, rates in losses.items()}


def table(task: Task, records: Sequence[Record], least: int = SEEDS) -> list[str]:
    """Return the lines of a setting's table.

    Args:
        task: the setting, with the arms to show.
        records: of runs and of times; what was not timed has a dash.
        least: seeds that an arm must have to be shown; exact training needs all.
    """
    runs = [each for each in records if "loss" in each and each["task"] == task.name]
    clocks = [each for each in records if "times_s" in each and each["task"] == task.name]
    chosen = chosen_runs(task, runs, least)
    head = ["arm", "learning rate", "held loss", "above exact, by seed"]
    head += ["reciprocal rank"] if task.name == "encoder" else []
    head += ["a step", "saved MiB", "time to exact's score", "by seed"]
    exact = chosen.get("exact", {})
    if len(exact) < SEEDS:
        return tables.markdown(head, [])
    lengths = [chosen[name] for name in LENGTHS if len(chosen.get(name, ())) == SEEDS]
    curves = {
        seed: [(of[seed]["steps"], of[seed]["loss"]) for of in lengths] for seed in range(SEEDS)
    }
    rows = []
    for name, arm in {**task.arms, **TIMED_ONLY}.items():
        ratio, saved = _clock(clocks, name, arm, task.steps)
        # Recomputing changes no loss.
        of = exact if name in TIMED_ONLY else chosen.get(name)
        if of is None or (name in TIMED_ONLY and ratio is None):
            continue
        seeds = sorted(of)
        more = [of[s]["steps"] / steps_worth(of[s]["loss"], curves[s]) for s in seeds]
        is_length = name in LENGTHS[1:]
        taken = [] if ratio is None or is_length else [m * ratio for m in more]
        gaps = [of[s]["loss"] - exact[s]["loss"] for s in seeds]
        shown = [f"{gap:+.3f}" for gap in gaps]
        if len(seeds) < SEEDS:
            shown = [f"{gap} (seed {seed})" for gap, seed in zip(shown, seeds, strict=True)]
        row = [arm.label, f"{of[seeds[0]]['rate']:g}", _mean(of[s]["loss"] for s in seeds)]
        row.append("-" if of is exact else ", ".join(shown))
        if task.name == "encoder":
            row.append(_mean(of[s]["reciprocal rank"] for s in seeds))
        row += ["-" if ratio is None or is_length else f"{ratio:.2f}", saved or "-"]
        row.append(f"{statistics.fmean(taken):.2f}" if taken else "-")
        row.append(", ".join(f"{each:.2f}" for each in taken) or "-")
        rows.append(row)
    return tables.markdown(head, rows)


def chosen_runs(
    task: Task, runs: Sequence[Record], least: int = SEEDS
) -> dict[str, dict[int, Record]]:
    """Return the runs at the best learning rates, by arm and seed, where there are so many."""
    rates, found = best_rates(runs), {}
    for each in runs:
        arm = "exact" if each["arm"] in LENGTHS else each["arm"]
        if each["rate"] == rates.get((task.name, arm)):
            found.setdefault(each["arm"], {})[each["seed"]] = each
    return {name: of for name, of in found.items() if len(of) >= least}


def _mean(figures: Iterable[float]) -> str:
    return f"{statistics.fmean(figures):.4f}"


def _clock(
    clocks: Sequence[Record], name: str, arm: Arm, steps: int
) -> tuple[float | None, str | None]:
    # Paired with the exact steps of its own record.
    names = (name, arm.timed_as)
    timed = ((c, n) for n in names for c in reversed(clocks) if n in c["times_s"])
    clock, name = next(timed, ({}, ""))
    if not clock:
        return None, None
    # The most that any step saves.
    most = "exact" if arm.is_exact(0, steps) or arm.is_exact(steps - 1, steps) else name
    mine, exact = clock["times_s"][name], clock["times_s"]["exact"]
    counted = [clock["saved_bytes"][most], clock.get("held_bytes", {}).get(name, 0)]
    shown = " + ".join(tables.mebibytes(each) for each in counted if each)
    ratio = step_ratio(mine, exact, arm.turns, arm.early / steps)
    share = statistics.fmean(arm.is_exact(number, steps) for number in range(steps))
    return share + (1 - share) * ratio, shown


def wanted(task: Task, names: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield the arms and seeds to run, those with seed 0 first, which choose learning rates."""
    return ((n, seed) for seed in seeds for n in task.arms if not names or n in names)


def main(
    arguments: list[str] | None = None, tasks: Mapping[str, Task] = TASKS, doc: str | None = __doc__
) -> None:
    """Run the arms of some settings, or show their tables."""
    parser = cli.parser(doc)
    parser.add_argument("--task", choices=tuple(tasks), nargs="+", default=list(tasks))
    parser.add_argument("--arm", nargs="+", default=[], help="default: all")
    parser.add_argument("--seed", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument(
        "--rate", type=float, nargs="+", help="default: each setting's, then the best"
    )
    parser.add_argument("--times", action="store_true", help="measure the time of steps instead")
    parser.add_argument("--rounds", type=cli.positive, default=30)
    parser.add_argument("--table", action="store_true", help="print the tables of what there is")
    parser.add_argument("--least", type=cli.positive, default=SEEDS, help="seeds that --table asks")
    parser.add_argument("--threads", type=cli.positive, help="CPU threads (default: torch's)")
    parser.add_argument("--base", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--out", type=Path, default=Path("runs/score.jsonl"))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.task:
        task = tasks[name]
        if args.times:
            names = args.arm or [*(n for n in task.arms if n not in LENGTHS[1:]), *TIMED_ONLY]
            append(args.out, times(task, names, args.rounds, args.base))
        elif not args.table:
            _run_all(task, args)
        if args.table:
            found = table(task, tables.records(args.out), args.least)
            print("\n".join(found), flush=True)


def _run_all(task: Task, args: argparse.Namespace) -> None:
    for name, seed in wanted(task, args.arm, args.seed):
        runs = [each for each in tables.records(args.out) if "loss" in each]
        arm = "exact" if name in LENGTHS else name
        best = best_rates(runs).get((task.name, arm))
        is_chosen = seed > 0 or name in LENGTHS[1:]
        rates = args.rate or ([best] if is_chosen and best else task.rates)
        for rate in rates:
            key = {"task": task.name, "arm": name, "seed": seed, "rate": rate}
            if any(key.items() <= each.items() for each in runs):
                continue
            append(args.out, run(task, name, seed, rate, args.base))


def append(path: Path, record: Record) -> None:
    """Write a record behind others, and print what is short of it."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    shown = {n: v for n, v in record.items() if n not in ("environment", "times_s")}
    print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    cli.run(main)
