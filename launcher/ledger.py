"""Where a run's wall time went: each second from its submission on has exactly one cause.

Read from files alone: `incarnations.jsonl` (the launcher's), `events.jsonl` (rank 0's diary, never
cut back), manifests. One cursor walks over the whole time, so that the causes add up to the wall
time whatever the files hold. See docs/metrics.md for what each cause means.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cocoa_dist.config import RunConfig
from cocoa_dist.events import EVENTS_NAME, SUBMITTED
from cocoa_dist.metrics import CAUSES
from launcher.advance import stage_states
from launcher.history import Incarnation, Verdict, read_incarnations

HANG_SECONDS = 60.0  # at least, without a step, before that counts as a hang
HANG_STEPS = 20  # median steps without a step
_HUNG = "HangError"  # in the reason of an incarnation that its watchdog ended
_LAUNCHER_GOES_ON = (Verdict.FINISHED, Verdict.CRASH)  # the next start is its own
_OVER = (Verdict.STOPPED, Verdict.GIVEN_UP, Verdict.BAD_INPUT)  # until somebody acts
_CAUSE_OF_PHASE = {
    "start": "start",
    "restore": "restore",
    "checkpoint": "checkpoint",
    "evaluation": "evaluation",
}


@dataclass(frozen=True)
class Ledger:
    """Seconds by cause; every cause is there, and they add up to `wall_seconds`."""

    seconds: Mapping[str, float]
    rank_seconds: float  # ranks were held, added over ranks
    known: bool  # there is a diary; without one nothing is known to be productive

    @property
    def wall_seconds(self) -> float:
        """Time since the submission, to the end of a run that is over."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """Productive share of the wall time; None before any has passed, or without a diary."""
        wall = self.wall_seconds
        return self.seconds["productive"] / wall if wall > 0 and self.known else None


@dataclass(frozen=True)
class Event:
    """One line of the diary: a phase that begins, or steps that were done."""

    time: float  # seconds since 1970; of a beat, its end
    stage: str
    step: int
    phase: str = ""  # "" for a beat
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    longest: float = 0.0  # of the steps


@dataclass(frozen=True)
class _Span:
    """A piece of the wall time. `steps` > 0: productive, the steps up to `step` of `stage`."""

    cause: str
    seconds: float
    stage: str = ""
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class _Resume:
    """From here on, the steps of `stage` behind `step` that were done before are done again."""

    stage: str
    step: int


def read_ledger(run_dir: Path, config: RunConfig, *, now: float, live: bool) -> Ledger:
    """Add up where the time went until `now`; `live`: a launcher is at work.

    A run that is done, stopped or given up ends with its last incarnation.
    """
    incarnations = sorted(read_incarnations(run_dir), key=lambda item: item.started_at)
    empty = dict.fromkeys(CAUSES, 0.0)
    if not incarnations:
        return Ledger(empty, 0.0, known=False)
    diary, submitted = read_events(run_dir)
    stages = stage_states(config, run_dir)
    last = incarnations[-1]
    over = last.verdict in _OVER or all(state.complete for state in stages)
    until = last.ended_at if over and not live and last.ended_at is not None else now
    walk = _Walk(diary, live=live)
    walk.over_all(incarnations, begin=submitted, until=until)
    if not live:  # what no checkpoint holds has to be done again
        for state in stages:
            walk.pieces.append(_Resume(state.stage, state.step))
    for span in _redone(walk.pieces):
        empty[span.cause] += span.seconds
    held = sum(
        item.world_size * max(0.0, (item.ended_at or until) - item.started_at)
        for item in incarnations
    )
    return Ledger(empty, held, known=bool(diary))


def read_events(run_dir: Path) -> tuple[dict[str, list[Event]], float | None]:
    """Return the diary by incarnation, and when the run was submitted, if that is written down.

    Lines that are torn or of another kind are left out.
    """
    submitted: float | None = None
    found: dict[str, list[Event]] = {}
    try:
        lines = (run_dir / EVENTS_NAME).read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        parsed = _parse(line)
        if isinstance(parsed, float):
            submitted = parsed if submitted is None else submitted
        elif parsed is not None:
            found.setdefault(parsed[0], []).append(parsed[1])
    return found, submitted


def _parse(line: bytes) -> tuple[str, Event] | float | None:
    try:
        fields = json.loads(line)
        if fields["kind"] == SUBMITTED:
            return float(fields["time"])
        if fields["kind"] not in ("phase", "beat"):
            return None
        event = Event(
            time=float(fields["time"]),
            stage=str(fields["stage"]),
            step=int(fields["step"]),
            phase=str(fields.get("phase", "")),
            steps=int(fields.get("steps", 0)),
            seconds=float(fields.get("seconds", 0.0)),
            waited=float(fields.get("waited", 0.0)),
            longest=float(fields.get("longest", 0.0)),
        )
        return str(fields["epoch"]), event
    except (ValueError, KeyError, TypeError):
        return None


class _Walk:
    """Cuts the wall time into pieces, in order."""

    def __init__(self, diary: Mapping[str, Sequence[Event]], *, live: bool) -> None:
        self.diary, self.live = diary, live
        self.pieces: list[_Span | _Resume] = []
        self._cursor = 0.0
        beats = [e for events in diary.values() for e in events if e.steps]
        typical = statistics.median(b.seconds / b.steps for b in beats) if beats else 0.0
        self._typical = typical
        self._patience = max(HANG_SECONDS, HANG_STEPS * typical)

    def over_all(
        self, incarnations: Sequence[Incarnation], *, begin: float | None, until: float
    ) -> None:
        """Walk from `begin`, or from the first start, to `until`."""
        first = incarnations[0].started_at
        self._cursor = first if begin is None else min(begin, first)
        self._to(first, "queue")
        before: Incarnation | None = None
        limits = [*(item.started_at for item in incarnations[1:]), until]
        for item, limit in zip(incarnations, limits, strict=True):
            if before is not None:
                own = before.verdict in _LAUNCHER_GOES_ON
                self._to(item.started_at, "start" if own else "queue")
            self._over(item, limit=limit)
            before = item
        self._to(until, "start" if self.live else "queue")

    def _over(self, item: Incarnation, *, limit: float) -> None:
        """Walk over one incarnation; what a zombie writes after `limit` is nobody's time."""
        phase = "start"
        for event in self.diary.get(item.epoch, ()):
            if event.time > limit:
                break
            if event.steps:
                self._beat(event, phase=phase)
                phase = "train"
                continue
            self._to(event.time, _CAUSE_OF_PHASE.get(phase, "unknown"))
            phase = event.phase
            if phase == "train":
                self.pieces.append(_Resume(event.stage, event.step))
        self._tail(item, phase, end=limit if item.ended_at is None else item.ended_at)

    def _beat(self, beat: Event, *, phase: str) -> None:
        """Walk to the end of a beat: what lies before its steps belongs to the phase."""
        seconds = min(beat.seconds, max(0.0, beat.time - self._cursor))
        before = _CAUSE_OF_PHASE.get(phase, "unknown")
        self._to(beat.time - seconds, before)
        waited = min(beat.waited, seconds)
        self._to(self._cursor + waited, "data_wait")
        if beat.longest > self._patience:  # suspended, or a collective that came back
            self._to(min(self._cursor + beat.longest - self._typical, beat.time), "hang")
        self._to(beat.time, "productive", beat)

    def _tail(self, item: Incarnation, phase: str, *, end: float) -> None:
        """Walk from the last event of an incarnation to its end."""
        left = end - self._cursor
        if phase != "train":
            self._to(end, _CAUSE_OF_PHASE.get(phase, "unknown"))
        elif left > self._patience or _HUNG in (item.reason or ""):
            self._to(end, "hang")
        else:
            self._to(end, "productive" if item.running and self.live else "replay")

    def _to(self, time: float, cause: str, beat: Event | None = None) -> None:
        """Move the cursor forward, never back."""
        seconds = time - self._cursor
        if seconds <= 0:
            return
        self._cursor = time
        if beat is None:
            self.pieces.append(_Span(cause, seconds))
        else:
            self.pieces.append(_Span(cause, seconds, beat.stage, beat.step, beat.steps))


def _redone(pieces: Iterable[_Span | _Resume]) -> Iterator[_Span]:
    """Turn productive time into `replay` where its steps were done again later."""
    kept_up_to: dict[str, int] = {}  # of each stage, what every later resume has kept
    for piece in reversed(list(pieces)):
        if isinstance(piece, _Resume):
            known = kept_up_to.get(piece.stage, piece.step)
            kept_up_to[piece.stage] = min(known, piece.step)
            continue
        if not piece.steps:
            yield piece
            continue
        lost = piece.step - kept_up_to.get(piece.stage, piece.step)
        share = min(max(lost, 0), piece.steps) / piece.steps
        yield _Span("replay", share * piece.seconds)
        yield _Span(piece.cause, (1.0 - share) * piece.seconds)
