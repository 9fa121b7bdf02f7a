"""Where a run's wall time went: each second from its submission on has exactly one cause.

Read from files alone: `incarnations.jsonl` (the launcher's), `events.jsonl` (rank 0's diary, never
cut back), manifests. One cursor walks over the whole time, so that the causes add up to the wall
time whatever the files hold. See docs/metrics.md for what each cause means.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cocoa_dist.config import RunConfig
from cocoa_dist.events import EVENTS_NAME, LAUNCHED, SUBMITTED
from cocoa_dist.metrics import CAUSES
from launcher.advance import stage_states
from launcher.history import Incarnation, Verdict, clock_steps, read_incarnations

HANG_SECONDS = 60.0  # at least, without a step, before that counts as a hang
HANG_STEPS = 20  # median steps without a step
_HUNG = "HangError"  # in the reason of an incarnation that its watchdog ended
_LAUNCHER_GOES_ON = (Verdict.FINISHED, Verdict.CRASH)  # the next start is its own, as a rule
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


@dataclass
class Diary:
    """What `events.jsonl` tells: by incarnation, in the order in which it was written."""

    events: dict[str, list[Event]] = field(default_factory=dict)
    submitted: float | None = None  # seconds since 1970
    launches: list[float] = field(default_factory=list)  # since when launchers were at work


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
    steps = clock_steps(run_dir)
    incarnations = [_set_clock(item, steps) for item in read_incarnations(run_dir)]
    empty = dict.fromkeys(CAUSES, 0.0)
    if not incarnations:
        return Ledger(empty, 0.0, known=False)
    diary = read_diary(run_dir)
    for epoch, step in steps.items():
        moved = [replace(event, time=event.time + step) for event in diary.events.get(epoch, ())]
        diary.events[epoch] = moved
    stages = stage_states(config, run_dir)
    last = incarnations[-1]
    over = last.verdict in _OVER or all(state.complete for state in stages)
    until = last.ended_at if over and not live and last.ended_at is not None else now
    walk = _Walk(diary, live=live)
    walk.over_all(incarnations, until=until)
    if not live:  # what no checkpoint holds has to be done again
        for state in stages:
            walk.pieces.append(_Resume(state.stage, state.step))
    for span in _redone(walk.pieces):
        empty[span.cause] += span.seconds
    held = sum(
        item.world_size * max(0.0, walk.ends[item.epoch] - item.started_at) for item in incarnations
    )
    return Ledger(empty, held, known=bool(diary.events))


def _set_clock(item: Incarnation, steps: Mapping[str, float]) -> Incarnation:
    """Return an incarnation with its times as the clocks before it would have told them."""
    step = steps.get(item.epoch, 0.0)
    ended = None if item.ended_at is None else item.ended_at + step
    return item.model_copy(update={"started_at": item.started_at + step, "ended_at": ended})


def read_diary(run_dir: Path) -> Diary:
    """Read `events.jsonl`; lines that are torn or of another kind are left out."""
    diary = Diary()
    try:
        lines = (run_dir / EVENTS_NAME).read_bytes().splitlines()
    except OSError:
        return diary
    for line in lines:
        _take(line, diary)
    return diary


def _take(line: bytes, diary: Diary) -> None:
    try:
        fields = json.loads(line)
        if fields["kind"] == SUBMITTED and diary.submitted is None:
            diary.submitted = float(fields["time"])
        elif fields["kind"] == LAUNCHED:
            diary.launches.append(float(fields["time"]))
        if fields["kind"] not in ("phase", "beat"):
            return
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
        diary.events.setdefault(str(fields["epoch"]), []).append(event)
    except (ValueError, KeyError, TypeError):
        return


class _Walk:
    """Cuts the wall time into pieces, in order."""

    def __init__(self, diary: Diary, *, live: bool) -> None:
        self.diary, self.live = diary, live
        self.pieces: list[_Span | _Resume] = []
        self.ends: dict[str, float] = {}  # of incarnations, in seconds since 1970
        self._cursor = 0.0
        beats = [e for events in diary.events.values() for e in events if e.steps]
        typical = statistics.median(b.seconds / b.steps for b in beats) if beats else 0.0
        self._typical = typical
        self._patience = max(HANG_SECONDS, HANG_STEPS * typical)

    def over_all(self, incarnations: Sequence[Incarnation], *, until: float) -> None:
        """Walk from the submission, or from the first start, to `until`."""
        first, begin = incarnations[0].started_at, self.diary.submitted
        self._cursor = first if begin is None else min(begin, first)
        self._between(first, own=False)
        limits = [*(item.started_at for item in incarnations[1:]), until]
        for item, limit in zip(incarnations, limits, strict=True):
            last = item is incarnations[-1]
            self._over(item, limit=limit, live=self.live and last)
            own = self.live if last else item.verdict in _LAUNCHER_GOES_ON
            self._between(limit, own=own)

    def _between(self, end: float, *, own: bool) -> None:
        """Walk to `end` without ranks; `own`: the launcher before is at work, if no other is."""
        began = [launch for launch in self.diary.launches if self._cursor <= launch <= end]
        if began:
            self._to(max(began), "queue")
            own = True
        self._to(end, "start" if own else "queue")

    def _over(self, item: Incarnation, *, limit: float, live: bool) -> None:
        """Walk over one incarnation; what a zombie writes after `limit` is nobody's time.

        One without an end that is not `live` has ended with its last sign of life, unseen.
        """
        phase, begin = "start", self._cursor
        for event in self.diary.events.get(item.epoch, ()):
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
        if item.ended_at is not None:
            end = min(item.ended_at, max(limit, begin))
        else:
            end = limit if live else self._cursor
        self._tail(item, phase, end=end)
        self.ends[item.epoch] = end

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
