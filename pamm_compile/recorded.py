"""A graph's report, kept on disk for the times a cache answers in our pass's place.

Reports lie beside Inductor's own cache, one file for each graph and set of guards, and travel with
`torch.compiler.save_cache_artifacts`. Nothing here stops a compilation: what cannot be written is
not kept, what cannot be read is unknown.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.graph.pipeline import Pipeline
from pamm_compile.private import aot, inductor
from pamm_compile.report import GraphReport, State

log = logging.getLogger("pamm_compile")

_FOLDER = "pamm_compile"


class RecordedReport:
    """What our pass found in a graph, now or when the cached entry was made.

    The key holds everything the pass looks at, its own sources included. What it guarded on about
    symbolic sizes is kept with each report, since a graph is compiled once for every outcome.

    Args:
        gm: Dynamo's graph.
        pipeline: the pass about to be handed to Inductor.
        inputs: of the graph.
    """

    def __init__(self, gm: GraphModule, pipeline: Pipeline, inputs: list[Any]) -> None:
        text = [pipeline.digest(), torch.__version__]
        # Code has no comments, which would name files and lines.
        text += [part.code for part in gm.modules() if isinstance(part, GraphModule)]
        text += [f"{k} {v}" for k, v in pipeline.parameter_names.items()]
        text += map(_describe, [*aot.symbolic_inputs(gm, inputs), *gm.parameters(), *gm.buffers()])
        text.append(f"{torch.is_grad_enabled()} {_autocast()}")
        self._digest = hashlib.sha256("\n".join(text).encode()).hexdigest()
        self._symbols = aot.backed_symbols(inputs)

    def settle(self, made: GraphReport | None) -> GraphReport:
        """Keep the report that the pass made, or return the one kept when it last ran.

        Args:
            made: what the pass found; None if it did not run, for Inductor runs it on every graph
                that no cache has.

        Returns:
            The report, its state unknown if the pass did not run and none was kept.
        """
        if made is not None:
            with _ignored("report not kept"):
                self._keep(made)
            return made
        with _ignored("no report read"):
            for path in sorted(self._folder().glob(f"{self._digest}-*.json")):
                with _ignored(str(path)):
                    if kept := self._read(path):
                        return kept
        return GraphReport(state=State.UNKNOWN)

    def _folder(self) -> Path:
        return Path(inductor.cache_dir()) / _FOLDER

    def _keep(self, made: GraphReport) -> None:
        record = {"guards": aot.shape_guards(self._symbols), "report": made.to_dict()}
        checksum = _checksum(record)
        name = f"{self._digest}-{checksum[:16]}.json"
        data = {**record, "sha256": checksum}
        inductor.carry_along(f"{_FOLDER}/{name}", data)
        self._folder().mkdir(parents=True, exist_ok=True)
        _write(self._folder() / name, json.dumps(data))

    def _read(self, path: Path) -> GraphReport | None:
        data = json.loads(path.read_text())
        record = {"guards": data["guards"], "report": data["report"]}
        # What somebody else wrote, or half wrote, does not have the checksum.
        intact = data["sha256"] == _checksum(record)
        if not intact or not aot.holds(data["guards"], self._symbols):
            return None
        inductor.carry_along(f"{_FOLDER}/{path.name}", data)
        return GraphReport.from_dict(data["report"])


@contextlib.contextmanager
def _ignored(what: str) -> Iterator[None]:
    """Go on whatever is raised: a report is worth no compilation."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # a full disk, no permission, files of any content
        log.debug("%s: %r", what, error)


def _describe(each: Any) -> str:
    if not isinstance(each, torch.Tensor):
        return str(each)
    return f"{each.dtype} {list(each.shape)} {each.device} {each.requires_grad}"


def _autocast() -> list[str]:
    # What Dynamo's graph does not say: it was entered outside.
    return [
        f"{kind} {torch.get_autocast_dtype(kind)}"
        for kind in ("cpu", "cuda", "xpu")
        if torch.is_autocast_enabled(kind)
    ]


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Replace a file at once, with the permissions that the user's mask gives new files."""
    # Other processes may compile the same graph: rename is atomic, write is not. Not a named
    # temporary file of Python's: nobody else may read those, and a cache may be a group's.
    draft = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
