"""What was matched, declined and saved: as objects, as text, as JSON."""

from __future__ import annotations

import enum
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# A long run may compile graphs without end; the oldest are forgotten.
_KEPT_GRAPHS = 1024


class State(enum.StrEnum):
    """What is known of a compiled graph."""

    TRAINING = "training"
    """It has a backward pass, and what was found in it is in the report."""
    INFERENCE = "inference"
    """It has no backward pass, and is left alone."""
    OWN_GRADIENTS = "own gradients"
    """It computes gradients itself, as torch.func.grad does, and is left alone."""
    UNKNOWN = "unknown"
    """A cache returned it; what was found in it when it was compiled was not kept."""


@dataclass(frozen=True)
class Remembered:
    """What of a site's weight gradients is remembered from step to step, and where they arrive."""

    rule: int
    """The place of its method among the rules."""
    weights: tuple[tuple[int, bool], ...]
    """Per weight, the input of Dynamo's graph that it is, and whether it is [n, m], not [m, n]."""
    outputs: tuple[int, ...]
    """m_p of every weight."""
    nbytes: int
    """Held from step to step."""

    @classmethod
    def from_dict(cls, data: dict[str, Any] | None) -> Remembered | None:
        """Build one from what `dataclasses.asdict` and JSON made of it."""
        if data is None:
            return None
        weights = tuple((int(place), bool(flip)) for place, flip in data["weights"])
        return cls(data["rule"], weights, tuple(data["outputs"]), data["nbytes"])


@dataclass(frozen=True)
class SiteReport:
    """One projection input: compressed, or the reason why not."""

    parameters: tuple[str, ...]
    """Names of the weights whose gradients are made from this input."""
    shape: tuple[int, ...]
    """Of the input X as the projections read it, (tokens, features); 0 tokens where their number is
    unknown before the graph runs."""
    dtype: str
    method: str
    """How it is stored, such as "k = 64"; empty if declined."""
    generators: int
    """k of a method that keeps k rows of X; else 0."""
    bytes_before: int
    """Of X."""
    bytes_after: int
    """Of what is stored, and of X where it stays saved; equal to `bytes_before` if declined."""
    compressed: bool
    reason: str | None = None
    """Name of a `pamm_compile.Reason` if declined."""
    detail: str = ""
    time: float | None = None
    """Of making the weight gradients, by a model of it, as a multiple of exactly; None if exact."""
    remembered: Remembered | None = None
    """What the method remembers from step to step; None where every step is alike."""


@dataclass(frozen=True)
class Note:
    """A decline that concerns no single input, such as a graph without attention."""

    reason: str
    what: str
    detail: str = ""


@dataclass(frozen=True)
class GraphReport:
    """What was found in one compiled graph."""

    sites: tuple[SiteReport, ...] = ()
    notes: tuple[Note, ...] = ()
    state: State = State.TRAINING

    @property
    def training(self) -> bool:
        """Whether it has a backward pass, as far as is known."""
        return self.state is State.TRAINING

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphReport:
        """Build a report from what `dataclasses.asdict` and JSON made of one."""
        sites = (
            SiteReport(
                **{
                    **s,
                    "parameters": tuple(s["parameters"]),
                    "shape": tuple(s["shape"]),
                    "remembered": Remembered.from_dict(s.get("remembered")),
                }
            )
            for s in data["sites"]
        )
        return cls(tuple(sites), tuple(Note(**n) for n in data["notes"]), State(data["state"]))

    @classmethod
    def merged(cls, reports: Iterable[GraphReport]) -> GraphReport:
        """Return what several passes found in one training graph as one report."""
        reports = list(reports)
        return cls(
            tuple(site for report in reports for site in report.sites),
            tuple(note for report in reports for note in report.notes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line: how many sites, bytes before and after, what was declined."""
        if self.state is not State.TRAINING:
            return _LEFT_ALONE[self.state]
        done = [s for s in self.sites if s.compressed]
        before, after = sum(s.bytes_before for s in done), sum(s.bytes_after for s in done)
        line = f"{len(done)} of {len(self.sites)} sites, {_size(before)} → {_size(after)}"
        reasons = [s.reason for s in self.sites if s.reason] + [n.reason for n in self.notes]
        if reasons:
            counts = (f"{r} ×{reasons.count(r)}" for r in dict.fromkeys(reasons))
            line += f"; {len(reasons)} declined: {', '.join(counts)}"
        return line


def memories(report: GraphReport) -> list[Remembered]:
    """Return what is remembered for a graph, once for all sites of the same weights."""
    found = {site.remembered for site in report.sites if site.remembered is not None}
    return sorted(found, key=lambda each: (each.rule, each.weights))


_LEFT_ALONE = {
    State.INFERENCE: "no backward pass: graph left as it is",
    State.OWN_GRADIENTS: "the graph computes gradients itself: left as it is",
    State.UNKNOWN: "unknown: a cache returned the graph, but not what was found in it",
}


class Report:
    """What a backend compiled, graph by graph.

    Printing it gives the table of `text()`.
    """

    def __init__(self, graphs: Iterable[GraphReport] = ()) -> None:
        self._graphs: deque[GraphReport] = deque(graphs, maxlen=_KEPT_GRAPHS)

    def add(self, graph: GraphReport) -> None:
        """Append the report of one graph."""
        self._graphs.append(graph)

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self._graphs.clear()

    @property
    def graphs(self) -> tuple[GraphReport, ...]:
        """One report per compiled graph, oldest first."""
        # A snapshot at once: another thread may add while this one reads.
        return tuple(self._graphs)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all graphs."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def compressed(self) -> tuple[SiteReport, ...]:
        """The sites that are compressed."""
        return tuple(site for site in self.sites if site.compressed)

    @property
    def declined(self) -> tuple[SiteReport, ...]:
        """The sites that stay exact."""
        return tuple(site for site in self.sites if not site.compressed)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Declines that concern no single input."""
        return tuple(note for graph in self.graphs for note in graph.notes)

    @property
    def bytes_before(self) -> int:
        """Bytes of the inputs of the compressed sites."""
        return sum(site.bytes_before for site in self.compressed)

    @property
    def bytes_after(self) -> int:
        """Bytes of what replaces them: generators, index and scale."""
        return sum(site.bytes_after for site in self.compressed)

    @property
    def bytes_remembered(self) -> int:
        """Bytes that methods hold from step to step, beside what a step saves."""
        return sum(each.nbytes for graph in self.graphs for each in memories(graph))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: totals, and every graph with its sites and notes."""
        return {
            "compressed": len(self.compressed),
            "declined": len(self.declined),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_remembered": self.bytes_remembered,
            "graphs": [graph.to_dict() for graph in self.graphs],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def text(self) -> str:
        """Return an aligned table, one line a site, and the totals."""
        if not self._graphs:
            return "nothing compiled yet"
        header = ("weights", "tokens × features", "dtype", "method", "dW time", "before", "after")
        rows = [_row(site) for site in self.sites]
        lines = _table(header, rows) if rows else []
        for note in dict.fromkeys(self.notes):
            detail = f" ({note.detail})" if note.detail else ""
            lines.append(f"{note.what}: {note.reason}{detail}")
        training = [graph for graph in self.graphs if graph.training]
        unknown = sum(graph.state is State.UNKNOWN for graph in self.graphs)
        if unknown:
            lines.append(f"{unknown} graph(s) {_LEFT_ALONE[State.UNKNOWN]}")
        lines.append(
            f"{len(self.compressed)} of {len(self.sites)} sites compressed in {len(training)} "
            f"training graph(s): {_size(self.bytes_before)} → {_size(self.bytes_after)}"
        )
        if self.bytes_remembered:
            lines.append(f"{_size(self.bytes_remembered)} are held from step to step")
        return "\n".join(lines)

    __str__ = text


def _row(site: SiteReport) -> tuple[str, ...]:
    shape = " × ".join(str(size) if size else "?" for size in site.shape)
    head = (brief(site.parameters), shape, site.dtype)
    detail = f" ({site.detail})" if site.detail else ""
    if site.compressed:
        sizes = (_size(site.bytes_before), _size(site.bytes_after) + detail)
        time = "-" if site.time is None else f"{site.time:.2f} ×"
        return (*head, site.method, time, *sizes)
    return (*head, "-", "-", _size(site.bytes_before), f"{site.reason}{detail}")


def brief(names: Sequence[str]) -> str:
    """Return names joined, what they begin and end with written once: a.{q,k,v}.weight."""
    if len(names) < 2:
        return "".join(names)
    parts = [name.split(".") for name in names]
    head = 0
    while all(len(p) > head + 1 for p in parts) and len({p[head] for p in parts}) == 1:
        head += 1
    tail = 0
    while all(len(p) > head + tail + 1 for p in parts) and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    middle = [".".join(p[head : len(p) - tail]) for p in parts]
    prefix, suffix = parts[0][:head], parts[0][len(parts[0]) - tail :]
    return ".".join([*prefix, "{" + ",".join(middle) + "}", *suffix])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["─" * width for width in widths]
    numeric = (False, True, False, True, True, True, False)
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (header, rule, *rows)
    ]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
