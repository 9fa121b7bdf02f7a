"""The run's diary: `events.jsonl`, phases and heartbeats of rank 0, never cut back.

`metrics.jsonl` tells the history that counts; this file tells what happened, so that steps which
were lost and done again can be counted after the process that did them has died. One line per
change of phase and per heartbeat: times are seconds since 1970, durations seconds.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_dist.metrics import JsonLines

EVENTS_NAME = "events.jsonl"
SUBMITTED = "submitted"  # the first line, the launcher's: from here on the run costs time
LAUNCHED = "launched"  # the launcher's: from here on one is at work


class Diary(JsonLines):
    """The file; a line that a killed writer left torn stays a line of its own."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / EVENTS_NAME)

    def append(self, record: dict[str, Any]) -> None:
        """Append one line. Raises OSError if the disk is full."""
        if self._descriptor is None:
            self._end_torn_line()
        super().append(record)

    def _end_torn_line(self) -> None:
        if not self.path.is_file() or not self.path.stat().st_size:
            return
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


@dataclass
class _Beat:
    """Steps since the last heartbeat."""

    steps: int = 0
    step: int = 0  # the last one
    seconds: float = 0.0  # inside steps, waiting for data included
    waited: float = 0.0  # of it, for data
    longest: float = 0.0  # of the steps


class Events:
    """Writes the diary of one incarnation of a stage. Raises OSError if the disk is full."""

    def __init__(self, run_dir: Path, *, stage: str, epoch: str, every_seconds: float) -> None:
        """`every_seconds`: at least this long between two heartbeats."""
        self._lines = Diary(run_dir)
        self._who = {"stage": stage, "epoch": epoch}
        self._every = every_seconds
        self._beat = _Beat()
        self._last = time.monotonic()

    def phase(self, name: str, *, step: int) -> None:
        """Note that a phase begins after `step`; steps since the last heartbeat come first."""
        self.flush()
        self._append({"kind": "phase", "phase": name, "step": step})

    def step(self, step: int, *, seconds: float, waited: float) -> None:
        """Note a step; written down if the last heartbeat is long enough ago."""
        beat = self._beat
        beat.steps, beat.step = beat.steps + 1, step
        beat.seconds, beat.waited = beat.seconds + seconds, beat.waited + waited
        beat.longest = max(beat.longest, seconds)
        if time.monotonic() - self._last >= self._every:
            self.flush()

    def flush(self) -> None:
        """Write the heartbeat of the steps since the last one, if there were any."""
        beat, self._beat = self._beat, _Beat()
        if beat.steps:
            self._append(
                {
                    "kind": "beat",
                    "steps": beat.steps,
                    "step": beat.step,
                    "seconds": round(beat.seconds, 4),
                    "waited": round(beat.waited, 4),
                    "longest": round(beat.longest, 4),
                }
            )

    def note(self, kind: str, **facts: Any) -> None:
        """Note something else that happened: `saved`, `save_failed`."""
        self._append({"kind": kind, **facts})

    def close(self) -> None:
        """Write what is pending and close the file."""
        self.flush()
        self._lines.close()

    def _append(self, fields: dict[str, Any]) -> None:
        self._last = time.monotonic()
        self._lines.append({"time": round(time.time(), 4), **fields, **self._who})
