"""What a run says about itself in numbers: `metrics.jsonl`, and the names of what Prometheus sees.

`metrics.jsonl`: one object per optimizer step, appended by rank 0 in one write, cut back to the
checkpoint at a resume, so that it never holds two objects of one (stage, step) and always tells the
history that counts. METRICS and the words of its labels are declared in registry/.
"""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cocoa_dist.manifest import write_atomic
from cocoa_dist.registry import METRICS as METRICS
from cocoa_dist.registry import Kind as Kind
from cocoa_dist.registry import Metric as Metric
from cocoa_dist.registry import Source as Source
from cocoa_dist.registry import count_series as count_series
from cocoa_dist.registry.words import CAUSES as CAUSES
from cocoa_dist.registry.words import FAULTS as FAULTS
from cocoa_dist.registry.words import PHASES as PHASES
from cocoa_dist.registry.words import RESTART_REASONS as RESTART_REASONS
from cocoa_dist.registry.words import RUN_STATES as RUN_STATES
from cocoa_dist.registry.words import TIMED as TIMED

METRICS_NAME = "metrics.jsonl"


class JsonLines:
    """An append-only file of JSON objects, one a line; each append is one write call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Append one object. Raises OSError if the disk is full."""
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(self.path, flags, 0o644)
        line = (json.dumps(record) + "\n").encode()
        written = os.write(self._descriptor, line)
        if written != len(line):
            full = f"{os.strerror(errno.ENOSPC)} (wrote {written} of {len(line)} bytes)"
            raise OSError(errno.ENOSPC, full, str(self.path))

    def sync(self) -> None:
        """Make what was appended durable."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; a torn last line (a killed writer's) is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no JSON object ({error}); take that line out"
                ) from error


def cut_back(path: Path, *, stage: str, step: int) -> int:
    """Drop a stage's objects behind `step`; return how many. Objects without a stage count too.

    Called at a resume, before the first append: those steps will be done again. Other stages keep
    theirs, as they keep their checkpoints.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for record in read_json_lines(path):
        if record.get("stage", stage) == stage and record["step"] > step:
            dropped += 1
        else:
            kept.append(json.dumps(record))
    write_atomic(path, "".join(line + "\n" for line in kept).encode())
    return dropped
