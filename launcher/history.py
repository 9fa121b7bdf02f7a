"""The incarnations of a run: `incarnations.jsonl`, the `epoch` file, and what both add up to.

One line is appended when the ranks of a stage are started and one when they have left. A launcher
that was killed leaves a start without an end; the next one writes that end, as "lost".
"""

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cocoa_dist.manifest import write_atomic
from launcher.steplog import StepRecord, newest_first

INCARNATIONS_NAME = "incarnations.jsonl"
EPOCH_NAME = "epoch"
_EPOCH_NUMBER = re.compile(r"^local-(\d+)-")
_JOB_EPOCH = re.compile(r"^(\d+)\.(\d+)-\d+$")  # JOB.RESTART-N


class Verdict(StrEnum):
    """How an incarnation ended."""

    FINISHED = "finished"  # the stage is complete
    PREEMPTED = "preempted"  # told to leave; saved first if it could
    STOPPED = "stopped"  # somebody wrote STOP
    CRASH = "crash"
    LOST = "lost"  # the launcher was killed and could not say
    GIVEN_UP = "given_up"  # the crash that used up the attempts
    BAD_INPUT = "bad_input"  # a rank refused what it was given


class Incarnation(BaseModel):
    """One start of the ranks of a stage; the fields of the end are None while it runs."""

    model_config = ConfigDict(frozen=True)

    epoch: str
    stage: str
    from_step: int
    world_size: int
    started_at: float  # seconds since 1970
    found_step: int = 0  # last step of the stage in metrics.jsonl, before the trainer cut it
    replayed_steps: int = 0  # steps in metrics.jsonl after from_step, not counted before
    ended_at: float | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    step: int | None = None  # last logged step at the end

    @property
    def running(self) -> bool:
        """Whether its end is not written (yet)."""
        return self.verdict is None


def read_incarnations(run_dir: Path) -> list[Incarnation]:
    """Return all incarnations in the order of their starts; torn lines are skipped."""
    return list({item.epoch: item for item in _read_lines(run_dir)}.values())


def _read_lines(run_dir: Path) -> Iterator[Incarnation]:
    """Yield the starts and ends in the order in which they were written."""
    try:
        lines = (run_dir / INCARNATIONS_NAME).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield Incarnation.model_validate_json(line)
        except ValueError:
            continue


def clock_steps(run_dir: Path) -> dict[str, float]:
    """Return by how many seconds the clock of an incarnation is behind those before it.

    Lines are in the order in which they were written: a start that stands behind an end and is
    earlier by its time was written by a machine whose clock is behind, or was set back.
    """
    steps: dict[str, float] = {}
    latest = float("-inf")
    for item in _read_lines(run_dir):
        if item.epoch not in steps:
            steps[item.epoch] = max(0.0, latest - item.started_at)
        when = item.started_at if item.ended_at is None else item.ended_at
        latest = max(latest, when + steps[item.epoch])
    return {epoch: step for epoch, step in steps.items() if step}


def start_incarnation(
    run_dir: Path, *, epoch: str, stage: str, from_step: int, world_size: int
) -> Incarnation:
    """Append the start of an incarnation, with what it will replay. Call before the ranks start."""
    earlier = read_incarnations(run_dir)
    logged = next(_lines_of(run_dir, stage=stage), None)
    begun = Incarnation(
        epoch=epoch,
        stage=stage,
        from_step=from_step,
        world_size=world_size,
        started_at=time.time(),
        found_step=logged.step if logged else 0,
        replayed_steps=_count_replayed(run_dir, stage=stage, from_step=from_step, earlier=earlier),
    )
    _append(run_dir, begun)
    return begun


def end_incarnation(
    run_dir: Path,
    begun: Incarnation,
    *,
    verdict: Verdict,
    reason: str,
    ended_at: float | None = None,
) -> None:
    """Append the end of an incarnation."""
    newest = _newest_of(run_dir, epoch=begun.epoch)
    end = {
        "ended_at": time.time() if ended_at is None else ended_at,
        "verdict": verdict,
        "reason": reason,
        "step": newest.step if newest else begun.from_step,
    }
    _append(run_dir, begun.model_copy(update=end))


def end_lost_incarnations(run_dir: Path) -> list[Incarnation]:
    """Write the ends that a killed launcher could not write, and return those incarnations.

    Call with the lock held: then whoever started them is gone.
    """
    lost = [item for item in read_incarnations(run_dir) if item.running]
    for item in lost:
        newest = _newest_of(run_dir, epoch=item.epoch)
        end_incarnation(
            run_dir,
            item,
            verdict=Verdict.LOST,
            reason="the launcher was killed or its machine went down",
            ended_at=max(item.started_at, newest.time if newest else 0.0),
        )
    return lost


def new_epoch(run_dir: Path) -> str:
    """Name a new incarnation in the `epoch` file: from now on no earlier one can commit.

    The random end keeps two launchers apart on a file system whose locks do not reach far enough.
    """
    names = [item.epoch for item in read_incarnations(run_dir)]
    try:
        names.append((run_dir / EPOCH_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        pass
    numbers = [int(found[1]) for found in map(_EPOCH_NUMBER.match, names) if found]
    epoch = f"local-{max(numbers, default=0) + 1}-{secrets.token_hex(2)}"
    write_atomic(run_dir / EPOCH_NAME, epoch.encode())
    return epoch


class SupersededError(RuntimeError):
    """Another start of the run has taken it over; this one must not go on."""


def new_job_epoch(run_dir: Path, *, name: str, last: str | None) -> str:
    """Name a new incarnation of the start `name` (JOB.RESTART) of a job, as JOB.RESTART-N.

    `last` is the epoch this launcher named before. Raises SupersededError if the `epoch` file holds
    another one since, or one of a later start of the same job: a launcher on a node that was cut
    off must not fence those that took over.
    """
    path = run_dir / EPOCH_NAME
    current = path.read_text(encoding="utf-8") if path.is_file() else None
    if (last is not None and current != last) or (current and _is_later(current, than=name)):
        raise SupersededError(f"{run_dir} has been taken over by {current}; leaving it alone")
    earlier = [item.epoch for item in read_incarnations(run_dir)] + [current or ""]
    numbers = [int(e.rpartition("-")[2]) for e in earlier if e.startswith(f"{name}-")]
    epoch = f"{name}-{max(numbers, default=0) + 1}"
    write_atomic(path, epoch.encode())
    return epoch


def count_failures(incarnations: Sequence[Incarnation], *, stage: str, from_step: int) -> int:
    """Count the newest crashes in a row that began at (stage, from_step), across jobs.

    Interruptions are no crashes and end no row; giving up ends it, as whoever starts the run again
    has changed something.
    """
    failures = 0
    for item in reversed(incarnations):
        if (item.stage, item.from_step) != (stage, from_step):
            break
        if item.verdict is Verdict.CRASH:
            failures += 1
        elif item.verdict not in (Verdict.LOST, Verdict.PREEMPTED, None):
            break
    return failures


def _is_later(epoch: str, *, than: str) -> bool:
    """Whether an epoch is of a later start of the same job."""
    job, _, restart = than.rpartition(".")
    found = _JOB_EPOCH.match(epoch)
    return found is not None and found[1] == job and int(found[2]) > int(restart)


def count_restarts(incarnations: Sequence[Incarnation]) -> dict[str, int]:
    """Count the starts that followed an interruption, by how the one before had ended."""
    counts: dict[str, int] = {}
    for before in incarnations[:-1]:
        if before.verdict is Verdict.FINISHED:
            continue
        ended = Verdict.LOST if before.verdict is None else before.verdict
        reason = Verdict.CRASH if ended is Verdict.GIVEN_UP else ended
        counts[reason.value] = counts.get(reason.value, 0) + 1
    return counts


def _count_replayed(
    run_dir: Path, *, stage: str, from_step: int, earlier: Sequence[Incarnation]
) -> int:
    """Count logged steps after `from_step` that no start since has counted already.

    A trainer that dies before it cuts the file leaves the lines for the next start to find again.
    """
    order = {item.epoch: index for index, item in enumerate(earlier)}
    replayed = 0
    for line in _lines_of(run_dir, stage=stage):
        if line.step <= from_step:
            break
        since = earlier[order.get(line.epoch, -1) + 1 :]
        replayed += not any(item.stage == stage and item.from_step < line.step for item in since)
    return replayed


def _lines_of(run_dir: Path, *, stage: str) -> Iterator[StepRecord]:
    return (record for record in newest_first(run_dir) if record.stage == stage)


def _newest_of(run_dir: Path, *, epoch: str) -> StepRecord | None:
    """Return the last line of the newest incarnation; None if it has not logged anything."""
    newest = next(newest_first(run_dir), None)
    return newest if newest is not None and newest.epoch == epoch else None


def _append(run_dir: Path, incarnation: Incarnation) -> None:
    """Append one line durably; a torn line before it stays a line of its own."""
    path = run_dir / INCARNATIONS_NAME
    data = incarnation.model_dump_json().encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
