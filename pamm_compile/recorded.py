"""A graph's report, kept on disk for the times a cache answers in our pass's place."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from pamm_compile.graph.pipeline import Pipeline
from pamm_compile.private import inductor
from pamm_compile.report import GraphReport


class RecordedReport:
    """What our pass found in a graph, now or when the cached entry was made.

    The key holds everything the pass looks at, its own sources included.

    Args:
        gm: Dynamo's graph.
        pipeline: the pass about to be handed to Inductor.
        inputs: of the graph.
    """

    def __init__(self, gm: GraphModule, pipeline: Pipeline, inputs: list[Any]) -> None:
        text = [pipeline.uuid(), torch.__version__, gm.print_readable(print_output=False)]
        text += [f"{k} {v}" for k, v in pipeline.parameter_names.items()]
        for each in inputs:
            is_tensor = isinstance(each, torch.Tensor)
            text.append(
                f"{each.dtype} {list(each.shape)} {each.requires_grad}" if is_tensor else str(each)
            )
        text.append(str(torch.is_grad_enabled()))
        digest = hashlib.sha256("\n".join(text).encode()).hexdigest()
        self._path = Path(inductor.cache_dir()) / "pamm_compile" / f"{digest}.json"

    def settle(self, made: GraphReport | None) -> GraphReport:
        """Keep the report that the pass made, or return the one kept when it last ran."""
        if made is not None:
            self._write(made)
            return made
        if not self._path.exists():
            # Neither traced now nor before: AOTAutograd had nothing to differentiate.
            return GraphReport(training=False)
        return GraphReport.from_dict(json.loads(self._path.read_text()))

    def _write(self, made: GraphReport) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may compile the same graph: rename is atomic, write is not.
        with tempfile.NamedTemporaryFile(
            "w", dir=self._path.parent, suffix=".tmp", delete=False
        ) as file:
            json.dump(made.to_dict(), file)
        os.replace(file.name, self._path)
