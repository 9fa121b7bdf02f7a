"""Reads `metrics.jsonl`: newest line first for status, new lines as they come for the display.

The file belongs to the trainer, which may cut or replace it at any time, and whose last line may
be torn: lines that are not whole are skipped.
"""

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS_NAME = "metrics.jsonl"
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as the trainer logged it."""

    stage: str
    step: int
    epoch: str  # incarnation that logged it
    time: float  # seconds since 1970, at the end of the step
    step_seconds: float
    loss: float | None
    samples: int = 0  # of all ranks
    tokens: int = 0  # of all ranks


def newest_first(run_dir: Path) -> Iterator[StepRecord]:
    """Yield the logged steps from the end of the file; reads no more than is asked for."""
    for line in _lines_backwards(run_dir / METRICS_NAME):
        record = parse(line)
        if record is not None:
            yield record


def parse(line: bytes) -> StepRecord | None:
    """Return the step of one line; None if the line is torn or not about a step."""
    try:
        fields = json.loads(line)
        loss = fields.get("loss")
        return StepRecord(
            stage=str(fields["stage"]),
            step=int(fields["step"]),
            epoch=str(fields.get("epoch", "")),
            time=float(fields.get("time") or 0.0),
            step_seconds=float(fields.get("step_seconds") or 0.0),
            loss=None if loss is None else float(loss),
            samples=int(fields.get("samples") or 0),
            tokens=int(fields.get("tokens") or 0),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def median_step_seconds(records: Sequence[StepRecord]) -> float | None:
    """Return the median wall seconds a step takes, from one step's end to the next one's.

    `records` are in the order of the file, or the reverse. None for fewer than two steps in a row.
    """
    gaps = [
        abs(b.time - a.time)
        for a, b in itertools.pairwise(records)
        if (a.stage, a.epoch) == (b.stage, b.epoch) and abs(b.step - a.step) == 1
    ]
    return statistics.median(gaps) if gaps else None


class Follower:
    """Gives the steps that were logged since the last look."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_NAME
        self._inode = 0
        self._offset = 0
        try:
            status = self._path.stat()
        except OSError:
            return
        self._inode, self._offset = status.st_ino, status.st_size

    def poll(self) -> list[StepRecord]:
        """Return new whole lines; after the file was cut or replaced, all of its lines."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = (parse(line) for line in whole.splitlines())
        return [record for record in records if record is not None]


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Yield the non-empty lines of a file from its end, reading it in chunks."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        position = file.seek(0, 2)
        rest = b""
        while position > 0:
            size = min(_CHUNK_BYTES, position)
            position -= size
            file.seek(position)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line.strip())
            rest = first
        if rest.strip():
            yield rest
