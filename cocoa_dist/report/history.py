"""How a run went: where its wall time went, what happened when, and how fast it was.

Where the time went is the launcher's to say, and nothing here may import it: it is asked by its
command line, whose `status --json` people's scripts read too.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import cocoa_dist
from cocoa_dist.report.facts import RunFacts
from cocoa_dist.timeline import Moment, MomentKind, read_left_out, read_timeline

log = logging.getLogger("cocoa_dist.report")

_PATIENCE_SECONDS = 120.0
_ENDS = (MomentKind.FINISHED, MomentKind.INTERRUPTED, MomentKind.FAILED)
_BEGINS = (MomentKind.STARTED, MomentKind.RESUMED)
MOST_MOMENTS = 80


@dataclass(frozen=True)
class Stretch:
    """The time of one incarnation, in seconds since 1970."""

    stage: str
    begin: float
    end: float


@dataclass(frozen=True)
class History:
    """What the page tells about how the run went; `seconds` is empty where nobody could say."""

    seconds: Mapping[str, float]  # the wall time by cause, see docs/metrics.md
    goodput: float | None
    moments: Sequence[Moment]  # oldest first
    stretches: Sequence[Stretch]
    throughput: Mapping[str, Sequence[tuple[float, float]]]  # of each stage: step, tokens a second


def read_history(run: RunFacts) -> History:
    """Read how a finished run went; parts that its folder does not tell are empty."""
    seconds, goodput = ask_launcher(run.run_dir)
    times = {
        (str(line["stage"]), int(line["step"])): float(line["time"])
        for line in run.steps
        if line.get("time")
    }
    moments = [*read_timeline(run.run_dir), *read_left_out(run.run_dir, times=times)]
    moments.sort(key=lambda moment: moment.time)
    return History(
        seconds=seconds,
        goodput=goodput,
        moments=moments,
        stretches=stretches_of(moments),
        throughput={name: _tokens_a_second(run, name) for name in run.config.stages},
    )


def ask_launcher(run_dir: Path) -> tuple[dict[str, float], float | None]:
    """Return the wall time by cause, and the goodput; empty and None if the launcher cannot say."""
    command = [sys.executable, "-m", "launcher", "status", str(run_dir.absolute()), "--json"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(cocoa_dist.__file__).parents[1],
            capture_output=True,
            timeout=_PATIENCE_SECONDS,
            check=True,
        )
        found = json.loads(done.stdout)
        seconds = {str(cause): float(spent) for cause, spent in found["seconds"].items()}
        return seconds, None if found["goodput"] is None else float(found["goodput"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        log.warning("the page says nothing about goodput: %s", error)
        return {}, None


def stretches_of(moments: Sequence[Moment]) -> list[Stretch]:
    """Return when ranks were at work; one whose end nobody wrote ends with the next start."""
    found: list[Stretch] = []
    begun: Moment | None = None
    for moment in moments:
        if begun is not None and moment.kind in (*_ENDS, *_BEGINS):
            found.append(Stretch(begun.stage, begun.time, moment.time))
            begun = None
        if moment.kind in _BEGINS:
            begun = moment
    if begun is not None:
        found.append(Stretch(begun.stage, begun.time, moments[-1].time))
    return found


def told(moments: Sequence[Moment]) -> list[Moment]:
    """Return what the list shows: checkpoints in a row as one line, and no more than a page.

    Of a longer history its beginning and its end, with a line between them that says so.
    """
    lines: list[Moment] = []
    for (kind, stage), group in groupby(moments, key=lambda m: (m.kind, m.stage)):
        row = list(group)
        if kind in (MomentKind.CHECKPOINT, MomentKind.LEFT_OUT) and len(row) > 1:
            last = row[-1]
            text = f"{len(row)} times, first after step {row[0].step}; last: {last.text}"
            row = [Moment(last.time, kind, stage, last.step, text)]
        lines += row
    if len(lines) <= MOST_MOMENTS:
        return lines
    half = MOST_MOMENTS // 2
    left = len(lines) - 2 * half
    gap = Moment(lines[half].time, lines[half].kind, "", 0, f"... {left} more, not shown ...")
    return [*lines[:half], gap, *lines[-half:]]


def _tokens_a_second(run: RunFacts, stage: str) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), line["tokens"] / line["step_seconds"])
        for line in run.steps_of(stage)
        if line.get("tokens") and line.get("step_seconds")
    ]
