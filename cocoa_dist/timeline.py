"""What happened in a run, moment by moment, read from its folder: for the live view and the report.

Starts and ends of incarnations (`incarnations.jsonl`), checkpoints, evaluations and saves that
failed (`events.jsonl`), records left out (`quarantine/`). Reads only; torn or strange lines are
left out, since somebody may be writing. Knows no torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cocoa_dist.events import EVENTS_NAME, SUBMITTED

INCARNATIONS_NAME = "incarnations.jsonl"
_TAIL_BYTES = 256 * 1024


class MomentKind(StrEnum):
    """What a moment is about."""

    SUBMITTED = "submitted"
    STARTED = "started"
    RESUMED = "resumed"
    FINISHED = "finished"  # a stage
    INTERRUPTED = "interrupted"  # preempted or stopped: told to leave
    FAILED = "failed"  # a crash, a launcher that was lost, input that was refused
    CHECKPOINT = "checkpoint"
    SAVE_FAILED = "save failed"
    EVALUATION = "evaluation"
    LEFT_OUT = "left out"  # records that could not be used


_ENDS = {
    "finished": MomentKind.FINISHED,
    "preempted": MomentKind.INTERRUPTED,
    "stopped": MomentKind.INTERRUPTED,
}


@dataclass(frozen=True)
class Moment:
    """Something that happened."""

    time: float  # seconds since 1970
    kind: MomentKind
    stage: str
    step: int
    text: str  # half a sentence, without stage and step


def read_timeline(run_dir: Path, *, whole: bool = True) -> list[Moment]:
    """Return what happened, oldest first.

    `whole`: all of it; else only what the last quarter of a megabyte of each file tells, which
    takes the same few milliseconds however long the run is.
    """
    limit = None if whole else _TAIL_BYTES
    moments = list(_incarnations(_objects(run_dir / INCARNATIONS_NAME, limit)))
    moments += _events(_objects(run_dir / EVENTS_NAME, limit))
    return sorted(moments, key=lambda moment: moment.time)


def read_left_out(run_dir: Path, *, times: Mapping[tuple[str, int], float]) -> list[Moment]:
    """Return the steps that had to leave records out, oldest first, one moment for each step.

    `times`: when each (stage, step) ended, from metrics.jsonl; other steps were lost and not kept.
    """
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for path in sorted((run_dir / "quarantine").glob("*.jsonl")):
        for line in _objects(path, None):
            where, kind = (str(line.get("stage")), line.get("step")), str(line.get("kind", "other"))
            if isinstance(where[1], int) and (where[0], where[1]) in times:
                kinds = counts.setdefault((where[0], where[1]), {})
                kinds[kind] = kinds.get(kind, 0) + 1
    moments = []
    for (stage, step), kinds in counts.items():
        text = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
        moments.append(Moment(times[stage, step], MomentKind.LEFT_OUT, stage, step, text))
    return sorted(moments, key=lambda moment: moment.time)


def _incarnations(lines: Sequence[Mapping[str, Any]]) -> Iterator[Moment]:
    """Yield starts, with the number of ranks, and ends, with their reason."""
    started: set[str] = set()
    ranks_before: int | None = None
    for line in lines:
        try:
            epoch, stage, ranks = str(line["epoch"]), str(line["stage"]), int(line["world_size"])
            began, from_step = float(line["started_at"]), int(line["from_step"])
            ended, verdict = line.get("ended_at"), line.get("verdict")
            if epoch not in started:
                started.add(epoch)
                text = f"on {ranks} ranks"
                if ranks_before not in (None, ranks):
                    text += f", before it were {ranks_before}"
                kind = MomentKind.RESUMED if from_step else MomentKind.STARTED
                yield Moment(began, kind, stage, from_step, text)
                ranks_before = ranks
            if verdict is not None and ended is not None:
                kind = _ENDS.get(str(verdict), MomentKind.FAILED)
                words = str(line.get("reason") or "").partition("\n")[0]
                if verdict != kind.value:
                    words = f"{str(verdict).replace('_', ' ')}: {words}".removesuffix(": ")
                yield Moment(float(ended), kind, stage, int(line.get("step") or 0), words)
        except (KeyError, TypeError, ValueError):
            continue


def _events(lines: Sequence[Mapping[str, Any]]) -> Iterator[Moment]:
    """Yield what rank 0 and the launcher wrote into the diary, phases of no interest left out."""
    for line in lines:
        try:
            kind, when = str(line["kind"]), float(line["time"])
            stage, step = str(line.get("stage", "")), int(line.get("step", 0))
            if kind == SUBMITTED:
                yield Moment(when, MomentKind.SUBMITTED, "", 0, "the run folder was made")
            elif kind == "saved":
                text = f"{int(line['bytes']) / 1e6:,.1f} MB"
                yield Moment(when, MomentKind.CHECKPOINT, stage, step, text)
            elif kind == "save_failed":
                text = str(line.get("reason", ""))
                yield Moment(when, MomentKind.SAVE_FAILED, stage, step, text)
            elif kind == "phase" and line.get("phase") == "evaluation":
                yield Moment(when, MomentKind.EVALUATION, stage, step, "on held-out data")
        except (KeyError, TypeError, ValueError):
            continue


def _objects(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Return the JSON objects of the last `limit` bytes of a file, None for all of it."""
    try:
        with path.open("rb") as file:
            start = 0 if limit is None else max(0, file.seek(0, 2) - limit)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines[1:] if start else lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
