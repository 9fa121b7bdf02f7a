"""How a run stands, from its folder alone; fast enough to be asked every second.

Writes nothing and asks no process: manifests, the newest lines of `metrics.jsonl`,
`incarnations.jsonl` and whether the lock is held say everything.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from cocoa_dist.config import RunConfig, load_resolved
from launcher.advance import Decision, Done, StageState, Start, decide, stage_states
from launcher.history import Incarnation, Verdict, count_restarts, read_incarnations
from launcher.ledger import read_ledger
from launcher.runfolder import RESOLVED_NAME, is_held, require_run_folder
from launcher.steplog import StepRecord, median_step_seconds, newest_first

State = Literal["pending", "running", "preempted", "stalled", "stopped", "given_up", "done"]
MIN_STALL_SECONDS = 60.0
STALL_STEPS = 20  # median steps without a sign of life
_RECENT_STEPS = 50


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest readable checkpoint of the stage that is furthest on."""

    stage: str
    step: int
    age_seconds: float


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint of a stage that scores best, as far as its newest one knows."""

    measure: str
    step: int
    value: float


@dataclass(frozen=True)
class StageStatus:
    """One stage; `seconds` and `loss` are of its newest checkpoint."""

    stage: str
    state: Literal["pending", "current", "done"]
    step: int
    target_step: int
    wall_seconds: float
    productive_seconds: float
    loss: dict[str, float]
    best: BestCheckpoint | None  # only if evaluation.keep_best names a measure


@dataclass(frozen=True)
class Status:
    """What `status --json` prints, field by field (DESIGN 14)."""

    run: str  # name of the folder
    recipe: str
    state: State
    stage: str
    step: int  # reached if it runs, else where it goes on
    target_step: int
    epoch: str | None  # newest incarnation
    restarts: dict[str, int]  # by how the incarnation before had ended
    replayed_steps: int
    goodput: float | None  # productive share of the wall time since the submission
    seconds: dict[str, float]  # the wall time by cause, see ledger.py
    last_checkpoint: LastCheckpoint | None
    eta_seconds: float | None  # to the end of the run, if all steps take as long as the recent ones
    stages: tuple[StageStatus, ...]
    quarantined: dict[str, int]  # uses of records that could not be used, by kind
    loader_restarts: int  # because a process of a loader had died

    def as_json(self) -> dict[str, Any]:
        """Return plain values for json.dumps."""
        return asdict(self)


def read_status(
    run_dir: Path, *, held_elsewhere: bool = False, now: Callable[[], float] = time.time
) -> Status:
    """Read how the run in `run_dir` stands.

    `held_elsewhere`: a launcher is at work where its lock cannot be seen, as SLURM says.

    Raises RunFolderError if it is not a run folder, ConfigError if its recipe cannot be read.
    """
    require_run_folder(run_dir)
    config = load_resolved(run_dir / RESOLVED_NAME)
    held = held_elsewhere or is_held(run_dir)
    decision = decide(config, run_dir)
    stages = stage_states(config, run_dir)
    current = next((state for state in stages if not state.complete), stages[-1])
    incarnations = read_incarnations(run_dir)
    newest = incarnations[-1] if incarnations else None
    after = _lines_after_checkpoint(run_dir, current=current, newest=newest, held=held)
    recent = list(islice(newest_first(run_dir), _RECENT_STEPS))
    checkpoint = _last_checkpoint(stages, now=now())
    state = _state(decision, held=held, newest=newest)
    if state == "running" and _silence(recent, newest, checkpoint, now=now()) > _patience(recent):
        state = "stalled"
    step = max([current.step, *(line.step for line in after)])
    ledger = read_ledger(run_dir, config, now=now(), live=held)
    return Status(
        run=run_dir.resolve().name,
        recipe=config.name,
        state=state,
        stage=current.stage,
        step=step,
        target_step=current.target_step,
        epoch=newest.epoch if newest else None,
        restarts=count_restarts(incarnations),
        replayed_steps=sum(item.replayed_steps for item in incarnations),
        goodput=None if ledger.goodput is None else round(ledger.goodput, 4),
        seconds={cause: round(spent, 2) for cause, spent in ledger.seconds.items()},
        last_checkpoint=checkpoint,
        eta_seconds=_eta(config, state, stages, recent, current=current, step=step),
        stages=tuple(
            _stage_status(item, current=current, step=step, started=newest is not None)
            for item in stages
        ),
        quarantined=count_quarantined(run_dir),
        loader_restarts=count_loader_restarts(run_dir),
    )


def count_quarantined(run_dir: Path) -> dict[str, int]:
    """Count the uses of records that could not be used, by kind, most frequent first."""
    kinds: Counter[str] = Counter()
    for path in (run_dir / "quarantine").glob("*.jsonl"):
        with path.open("rb") as file:
            kinds.update(kind for line in file if (kind := _fault_kind(line)))
    return dict(kinds.most_common())


def count_loader_restarts(run_dir: Path) -> int:
    """Count how often ranks started their loader again; what ended its processes is told there."""
    files = (run_dir / "loader_deaths").glob("*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in files)


def _fault_kind(line: bytes) -> str | None:
    """Return what a line of a quarantine file is counted under; None if it is not whole."""
    try:
        return str(json.loads(line).get("kind", "other"))
    except (ValueError, AttributeError):
        return None


def _state(decision: Decision, *, held: bool, newest: Incarnation | None) -> State:
    """Return the state, stalls aside.

    A run that nobody holds and that ended by a crash of its launcher is "preempted": the same
    command goes on. One whose input was refused is "given_up": somebody has to change something.
    """
    if isinstance(decision, Done):
        return "done"
    if held:
        return "running"
    if not isinstance(decision, Start) or (newest and newest.verdict is Verdict.STOPPED):
        return "stopped"
    if newest is None:
        return "pending"
    if newest.verdict in (Verdict.GIVEN_UP, Verdict.BAD_INPUT):
        return "given_up"
    return "preempted"


def _lines_after_checkpoint(
    run_dir: Path, *, current: StageState, newest: Incarnation | None, held: bool
) -> list[StepRecord]:
    """Return the steps that a running incarnation logged since the newest checkpoint."""
    if not held or newest is None or current.complete:
        return []
    lines = takewhile(lambda line: line.epoch == newest.epoch, newest_first(run_dir))
    own = takewhile(lambda line: line.stage == current.stage, lines)
    return list(takewhile(lambda line: line.step > current.step, own))


def _last_checkpoint(stages: Sequence[StageState], *, now: float) -> LastCheckpoint | None:
    for state in reversed(stages):
        if state.manifest is not None:
            age = max(0.0, now - state.manifest.created_at)
            return LastCheckpoint(stage=state.stage, step=state.step, age_seconds=round(age, 1))
    return None


def _silence(
    recent: Sequence[StepRecord],
    newest: Incarnation | None,
    checkpoint: LastCheckpoint | None,
    *,
    now: float,
) -> float:
    """Return the seconds since the last sign of life: a step, a start or a checkpoint."""
    signs = [recent[0].time] if recent else []
    if newest is not None:
        signs.append(newest.started_at if newest.ended_at is None else newest.ended_at)
    ages = [now - sign for sign in signs] + ([checkpoint.age_seconds] if checkpoint else [])
    return min(ages, default=0.0)


def _patience(recent: Sequence[StepRecord]) -> float:
    """Return the seconds without a sign of life after which a run counts as stalled."""
    return max(MIN_STALL_SECONDS, STALL_STEPS * (median_step_seconds(recent) or 0.0))


def _eta(
    config: RunConfig,
    state: State,
    stages: Sequence[StageState],
    recent: Sequence[StepRecord],
    *,
    current: StageState,
    step: int,
) -> float | None:
    if state == "done":
        return 0.0
    seconds = median_step_seconds(recent)
    if state != "running" or seconds is None:
        return None
    later = [item for item in stages if not item.complete and item is not current]
    steps = current.target_step - step + sum(item.target_step - item.step for item in later)
    return round(steps * seconds, 1)


def _stage_status(
    state: StageState, *, current: StageState, step: int, started: bool
) -> StageStatus:
    manifest = state.manifest
    best = manifest.best if manifest else None
    here = state is current and started
    return StageStatus(
        stage=state.stage,
        state="done" if state.complete else "current" if here else "pending",
        step=step if state is current else state.step,
        target_step=state.target_step,
        wall_seconds=manifest.wall_seconds if manifest else 0.0,
        productive_seconds=manifest.productive_seconds if manifest else 0.0,
        loss=dict(manifest.loss) if manifest else {},
        best=BestCheckpoint(best.measure, best.step, best.value) if best else None,
    )
