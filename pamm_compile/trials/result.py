"""What a trial found: as objects, as text, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pamm_compile.errors import MissingPackageError
from pamm_compile.inspect.measure import MemoryUse
from pamm_compile.report import Report
from pamm_compile.trials.picture import draw
from pamm_compile.trials.verdict import Figures, Gap, Quartiles, Slope, Verdict, verdict

EXACT, CONTROL = "exact", "exact, other order"


@dataclass(frozen=True)
class TrialArm:
    """One way to train, and what came of it."""

    name: str
    loss: float
    """On held-out data, or the mean of the last steps."""
    score: float | None
    """None where none was asked for."""
    memory: MemoryUse
    """Of forward and backward of one step, compiled."""
    time: Quartiles
    """Of a step by the exact arm's, in turn, after compiling."""
    losses: tuple[float, ...]
    """Of every training step."""
    seconds: tuple[float, ...]
    """Of every training step; the first one compiles."""
    report: Report | None
    """What is compressed; None if the arm is exact."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "name": self.name,
            "compressed_sites": len(self.report.compressed) if self.report else 0,
            "loss": self.loss,
            "score": self.score,
            "saved_bytes": self.memory.saved_bytes,
            "peak_bytes": self.memory.peak_bytes,
            "peak_source": self.memory.peak_source,
            "time_ratio": self.time.median,
            "time_quartiles": [self.time.low, self.time.high],
            "losses": self.losses,
            "times_s": self.seconds,
        }


@dataclass(frozen=True)
class Trial:
    """What `trial` found; printing it gives the table and the verdicts of `text()`."""

    arms: tuple[TrialArm, ...]
    """The exact arm, the control, and the compressed ones."""
    slope: Slope
    """Of the exact arm's loss, by step, over the last half."""
    held_out: int
    """Batches that `loss` is of; 0 if it is of the last training steps."""
    options: Mapping[str, Any]
    """How it was trained, as plain data."""

    def __getitem__(self, name: str) -> TrialArm:
        """Return the arm of a name."""
        return {arm.name: arm for arm in self.arms}[name]

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """For every compressed arm: whether its gap is real, and whether it is worth the time."""
        return {arm.name: verdict(self._figures(arm)) for arm in self.arms if arm.report}

    def _figures(self, arm: TrialArm) -> Figures:
        exact, control = self[EXACT], self[CONTROL]
        score = None
        if arm.score is not None and exact.score is not None and control.score is not None:
            score = Gap(arm.score - exact.score, abs(control.score - exact.score))
        return Figures(
            name=arm.name,
            loss=Gap(arm.loss - exact.loss, abs(control.loss - exact.loss)),
            slope=self.slope,
            steps=len(exact.losses),
            time=arm.time,
            saved=arm.memory.saved_bytes / max(1, exact.memory.saved_bytes),
            score=score,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: options, arms with every step, and the verdicts."""
        return {
            "options": dict(self.options),
            "held_out": self.held_out,
            "slope": {"value": self.slope.value, "error": _finite(self.slope.error)},
            "arms": [arm.to_dict() for arm in self.arms],
            "verdicts": {
                name: {"worth": each.worth.value, "sentence": each.sentence}
                for name, each in self.verdicts.items()
            },
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def text(self) -> str:
        """Return a Markdown table, one line an arm, what its columns mean, and the verdicts."""
        return shown(self.to_dict())

    __str__ = text

    def plot(self, path: str | Path) -> None:
        """Draw losses, gaps, and what each arm costs.

        Args:
            path: of a picture, in a format that matplotlib knows by its suffix.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        exact = self[EXACT]
        noise = abs(self[CONTROL].loss - exact.loss)
        costs = {
            arm.name: {
                "step time": arm.time.median,
                "saved bytes": arm.memory.saved_bytes / max(1, exact.memory.saved_bytes),
                "peak bytes": arm.memory.peak_bytes / max(1, exact.memory.peak_bytes),
            }
            for arm in self.arms
            if arm.report
        }
        gaps = {arm.name: arm.loss - exact.loss for arm in self.arms if arm.report}
        draw(Path(path), {arm.name: arm.losses for arm in self.arms}, gaps, noise, costs)

    def save(self, stem: str | Path) -> list[str]:
        """Write the JSON record, and the picture if matplotlib is installed.

        Args:
            stem: of the paths, without a suffix; folders are made.

        Returns:
            A sentence for each of the two: where it is, or why there is none.
        """
        stem = Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        record, picture = (stem.with_name(f"{stem.name}{end}") for end in (".json", ".png"))
        record.write_text(f"{self.to_json(1)}\n", encoding="utf-8")
        said = [f"wrote {record}"]
        try:
            self.plot(picture)
            said.append(f"wrote {picture}")
        except MissingPackageError as error:
            said.append(f"no picture: {error}")
        return said


def shown(record: Mapping[str, Any]) -> str:
    """Return the text of a trial's record.

    Args:
        record: as `Trial.to_dict` makes it.
    """
    exact, held_out = record["arms"][0], record["held_out"]
    has_score = exact["score"] is not None
    head = ["arm", "loss", "above exact", *(["score"] if has_score else [])]
    head += ["saved MiB", "peak MiB", "step time", "first step"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for arm in record["arms"]:
        cells = [arm["name"], f"{arm['loss']:.4f}", f"{arm['loss'] - exact['loss']:+.4f}"]
        cells += [f"{arm['score']:.4f}"] if has_score else []
        cells += [f"{arm[key] / 2**20:.1f}" for key in ("saved_bytes", "peak_bytes")]
        cells += [f"{arm['time_ratio']:.2f} ×", f"{arm['times_s'][0]:.1f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    of = f"{held_out} batches held out" if held_out else "the last tenth of the steps"
    lines += [
        "",
        f"loss: of {of}; saved: held for backward, parameters and buffers aside;",
        f"peak: of forward and backward, {exact['peak_source']};",
        "step time: by the exact arm's, median of ratios in turn; first step: with compiling,",
        "which both exact arms share",
        "",
        *(each["sentence"] for each in record["verdicts"].values()),
    ]
    return "\n".join(lines)


def _finite(number: float) -> float | None:
    """JSON knows no infinity."""
    return None if number == float("inf") else number
