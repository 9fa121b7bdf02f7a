"""Who holds a run folder: one launcher at a time, by a lock and, under SLURM, by its job.

The lock is an flock on `.lock`, which ends with the process that holds it. Where locks do not
reach (a node cut off the network, another file system), the scheduler is asked whether the job
that wrote the file still lives; a job that waits in the queue keeps its claim.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.runfolder import LOCK_NAME, Holder, RunFolderError, read_holder, timestamp
from launcher.slurm.scheduler import job_state

_LOCK_WAIT_SECONDS = 1.0  # `status` holds a shared lock for an instant
_COMPLETING_WAIT_SECONDS = 90.0  # a job that is on its way out
_LEAVING = ("COMPLETING", "STAGE_OUT")


@contextmanager
def claimed(
    run_dir: Path, me: Holder, *, state_of: Callable[[str], str | None] = job_state
) -> Iterator[None]:
    """Hold the run folder; creates it if need be.

    `state_of` gives the state of a SLURM job in the queue, "" if it is not there, None if unknown.
    Raises RunFolderError naming process or job, host and time if another launcher holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked = _lock(descriptor)
        holder = read_holder(run_dir)
        state = _settled_state(holder, me, state_of=state_of)
        if not locked and holder is not None and holder.job is not None:
            locked = _lock(descriptor)  # it may have left while we asked
        if not _may_take(holder, me, locked=locked, state=state):
            raise RunFolderError(_describe(run_dir, holder, state=state))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, me.model_dump_json().encode(), 0)
        yield
    finally:
        os.close(descriptor)  # gives the lock back


def _may_take(holder: Holder | None, me: Holder, *, locked: bool, state: str | None) -> bool:
    """Whether the folder is ours to take.

    A job that the scheduler does not know any more has no right to its lock: the node it is on
    may be cut off. The same job's earlier start has none either.
    """
    if holder is None or holder.job is None:
        return locked
    if holder.job == me.job:
        return True
    return locked if state is None else state == ""


def _settled_state(
    holder: Holder | None, me: Holder, *, state_of: Callable[[str], str | None]
) -> str | None:
    """Return the state of the holder's job, once it is no longer on its way out."""
    if holder is None or holder.job is None or holder.job == me.job:
        return None
    deadline = time.monotonic() + _COMPLETING_WAIT_SECONDS
    while (state := state_of(holder.job)) in _LEAVING and time.monotonic() < deadline:
        time.sleep(1.0)
    return state


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _describe(run_dir: Path, holder: Holder | None, *, state: str | None) -> str:
    if holder is None:
        return f"{run_dir} is in use by another launcher"
    if holder.job is not None:
        how = f" ({state})" if state else ""
        return (
            f"{run_dir} belongs to job {holder.job}{how}, which took it on {holder.host} at "
            f"{timestamp(holder.since)}; let that job go on, or end it first: scancel {holder.job}"
        )
    return (
        f"{run_dir} is in use by process {holder.pid} on {holder.host} since "
        f"{timestamp(holder.since)}; wait for it, or end it with "
        f"`python -m launcher stop {run_dir}`"
    )
