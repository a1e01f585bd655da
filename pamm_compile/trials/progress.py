"""A trial's progress on a terminal, or in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24


class Bar:
    """One line that is written over again; in a log, a line for every tenth of the steps.

    Args:
        stream: to write to; the standard error stream if None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._start = time.perf_counter()
        self._after_first = 0.0
        self._longest = 0

    def __call__(self, done: int, steps: int, doing: str) -> None:
        """Show it.

        Args:
            done: steps that are.
            steps: of how many.
            doing: what goes on.
        """
        now = time.perf_counter()
        if done == 1:
            self._after_first = now
        filled = _WIDTH * done // steps
        line = f"trial [{'#' * filled}{'.' * (_WIDTH - filled)}] {done} of {steps} steps, {doing}"
        if 1 < done < steps:
            # The first step compiles, and says nothing of the rest.
            rest = (now - self._after_first) / (done - 1) * (steps - done)
            line += f", {rest:.0f} s left"
        if self._stream.isatty():
            self._longest = max(self._longest, len(line))
            print(f"\r{line:<{self._longest}}", end="", file=self._stream, flush=True)
        elif done * 10 // steps > (done - 1) * 10 // steps or done in (0, steps):
            print(line, file=self._stream, flush=True)

    def end(self) -> None:
        """Leave the line, and say how long it took."""
        line = f"trial: {time.perf_counter() - self._start:.0f} s"
        start = "\r" if self._stream.isatty() else ""
        print(f"{start}{line:<{self._longest}}", file=self._stream, flush=True)
