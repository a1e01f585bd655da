"""The tables of training from random weights: what is compared, and what is left out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import pamm_compile
from examples.benchmarks import arms, tables
from examples.studies import choices, controls, quality, results, scratch
from examples.studies.scratch import Race, Row
from pamm_compile.rules import make_rules

BASE = {"hidden": 128, "steps": 300, "lr": 2e-3, "targets": "linear"}


def run(method: str, seed: int, loss: float, **others: Any) -> dict[str, Any]:
    setting = BASE | others
    return {
        "method": method,
        "seed": seed,
        "setting": setting,
        "validation": loss,
        "bytes_per_token": 14.0,
    }


EXACT = [run("exact", seed, 2.0 + seed) for seed in range(3)]


def test_gaps_are_paired_by_seed_and_setting() -> None:
    records = [*EXACT, *(run("subspace:20", seed, 2.1 + seed, targets="o") for seed in range(3))]
    records += [run("exact", seed, 5.0, optimizer="sgd") for seed in range(3)]
    records += [run("subspace:20", seed, 5.2, optimizer="sgd") for seed in range(3)]
    assert scratch.gaps(records, BASE, Row("", "subspace:20", "o")) == pytest.approx([0.1] * 3)
    sgd = Row("", "subspace:20", others=(("optimizer", "sgd"),))
    assert scratch.gaps(records, BASE, sgd) == pytest.approx([0.2] * 3)
    lines = scratch.table(records, BASE, [Row("o", "subspace:20", "o"), sgd])
    assert lines[2].startswith("| o | 14 | +0.100, +0.100, +0.100 | +0.100 ± 0.000 |")


RACE = Race("few", "rows:4", "o", 512, (200, 220), "whole-60m", "PAMM")
RACED = quality.setting(RACE.setting)
LONGER = {"steps": 220, "warmup": 20}


def test_two_seeds_are_no_row() -> None:
    records = [*EXACT, *(run("rows:4", seed, 3.0) for seed in range(2))]
    assert scratch.gaps(records, BASE, Row("", "rows:4")) == []
    assert len(scratch.table(records, BASE, [Row("few", "rows:4")])) == 2
    of_race = [{**each, "setting": RACED} for each in records]
    of_race += [{**each, "setting": RACED | LONGER} for each in records[3:]]
    assert len(list(scratch.steps_needed(of_race, RACE))) == 2
    assert scratch.raced(of_race, RACE, 0.8) == []


def test_steps_to_a_loss_follow_the_slope_between_two_lengths() -> None:
    """A method whose loss falls by a nat for every factor of e, and starts a tenth above."""
    # An exact run is found whatever would be approximated.
    records = [{**each, "setting": RACED | {"targets": "linear"}} for each in EXACT]
    for seed in range(3):
        records.append(run("rows:4", seed, 2.1 + seed, **RACED))
        records.append(run("rows:4", seed, 2.1 + seed - math.log(1.1), **RACED | LONGER))
    found = list(scratch.steps_needed(records, RACE))
    assert [seed for seed, *_ in found] == [0, 1, 2]
    for _, gap, needed in found:
        assert gap == pytest.approx(0.1)
        assert needed == pytest.approx(math.exp(0.1))
    assert scratch.raced(records, RACE, 0.8)[-3:] == ["0.800", "0.88, 0.88, 0.88", "0.88"]


def test_a_study_reads_the_records_of_every_width(tmp_path: Path) -> None:
    for width in (128, 256, 512):
        row = Row("", "rows:4", others=(("hidden", width),))
        setting = quality.setting(scratch.STUDY) | dict(row.others)
        lines = [
            json.dumps(run(method, seed, loss + seed, **setting))
            for method, loss in (("exact", 2.0), ("rows:4", 2.0 + 1 / width))
            for seed in range(3)
        ]
        with (tmp_path / scratch.file_of(row)).open("a") as file:
            file.write("\n".join([*lines, ""]))
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "quality-random-512.jsonl",
        "quality-random.jsonl",
    ]
    rows = [Row(str(n), "rows:4", others=(("hidden", n),)) for n in (128, 256, 512)]
    means = [line.split("|")[4].split()[0] for line in scratch.study(tmp_path, rows)[2:]]
    assert means == ["+0.008", "+0.004", "+0.002"]


def test_runs_of_one_length_have_the_slope_of_others() -> None:
    race = RACE._replace(lengths=(220,), slope="rows:8")
    records = [{**each, "setting": RACED} for each in EXACT]
    for seed in range(3):
        records.append(run("rows:4", seed, 2.05 + seed, **RACED | LONGER))
        records.append(run("rows:8", seed, 4.0, **RACED))
    assert not list(scratch.steps_needed(records, race))
    fewer = {"steps": 150, "warmup": 20}
    for seed in range(3):
        records.append(run("rows:8", seed, 4.0 + math.log(200 / 150), **RACED | fewer))
    for _, gap, needed in scratch.steps_needed(records, race):
        assert gap == pytest.approx(0.05)
        assert needed == pytest.approx(1.1 * math.exp(0.05))
    assert scratch.raced(records, race, 0.8)[3] == "220: +0.050, +0.050, +0.050"


def test_rows_are_run_by_the_command_that_their_tables_read() -> None:
    row = Row("", "rows:4", "o", (("optimizer", "sgd"), ("lr", 4e-3)))
    args = quality.parse(scratch.command(scratch.STUDY, row))
    wanted = quality.setting(scratch.STUDY) | dict(row.others) | {"targets": "o"}
    assert quality.setting(args) == wanted
    assert args.methods == ["rows:4"]


@pytest.mark.parametrize("race", scratch.RACES, ids=lambda race: race.label)
def test_races_store_a_tenth_of_the_inputs_and_time_arms_that_there_are(race: Race) -> None:
    assert 0 < scratch.share_of_bytes(race.method, race.setting) < 0.1
    assert arms.by_name(race.arm).approximates
    record = json.loads((results.RECORDS / race.timed / "benchmark.json").read_text())
    assert race.arm in record["models"][race.model]["arms"]
    for steps, row in zip(race.lengths, race.rows, strict=True):
        changed = {"steps": steps} | ({"warmup": race.warmup} if race.warmup else {})
        wanted = quality.setting(race.setting) | (changed if steps != scratch.STEPS else {})
        assert quality.setting(quality.parse(scratch.command(race.setting, row))) == wanted
    records = tables.records(results.RECORDS / race.record)
    assert list(scratch.steps_needed(records, race))
    # Exact runs are found by the command that would make them, so that none is made twice.
    exact = quality.setting(quality.parse(scratch.command(race.setting, Row("", "exact"))))
    assert any((each["method"], each["setting"]) == ("exact", exact) for each in records)
    if race.targets == "qkv":
        assert scratch.share_of_bytes(race.method, race.setting) == pytest.approx(7 / 1024, rel=0.1)
        return
    # What is timed finds and keeps as many directions as what is trained.
    trained, n = choices.parse(race.method).method, race.setting.hidden
    inner = {512: 1376, 1024: 2736}[n]
    assert isinstance(trained, controls.Shares)
    rules = {str(rule.target): rule.method for rule in make_rules(arms.by_name(race.arm).rules)}
    down, *_ = (method for target, method in rules.items() if "down_proj" in target)
    for features, outputs, timed in (
        (n, (n, n, n), rules["linear"]),
        (n, (n,), rules["linear"]),
        (n, (inner, inner), rules["linear"]),
        (inner, (n,), down),
    ):
        method = trained.of(features, outputs)
        assert isinstance(timed, pamm_compile.Subspace)
        assert timed.directions(features, outputs) == method.directions(features, outputs)
        assert timed == dataclasses.replace(method, rank=timed.rank)


def test_exact_stores_all_of_the_inputs() -> None:
    assert scratch.share_of_bytes("exact", RACE.setting) == 1
