"""The run folder: what makes one, who holds it, and whether a recipe still fits it.

`resolved.yaml` is written last, so a folder that has it is a run folder. See claim.py for how one
is held.
"""

import fcntl
import os
import shutil
import socket
import time
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel

from cocoa_dist.config import (
    RunConfig,
    differences,
    dump_yaml,
    load_resolved,
)
from cocoa_dist.events import LAUNCHED, SUBMITTED, Diary
from cocoa_dist.manifest import write_atomic
from launcher.codestate import describe_code

RESOLVED_NAME = "resolved.yaml"
STOP_NAME = "STOP"
LOCK_NAME = ".lock"
MIN_FREE_BYTES = 50 * 10**6
_WRITTEN_BEFORE_RESOLVED = {LOCK_NAME, "recipe.yaml", "code.txt", "code", "submit", "logs"}


class RunFolderError(ValueError):
    """A folder that cannot be used for this run; the message says what to do instead."""


class Holder(BaseModel):
    """The launcher that holds a run folder."""

    pid: int
    host: str
    since: float  # seconds since 1970
    job: str | None = None  # SLURM job, without its restart count

    @staticmethod
    def of_this_process(*, job: str | None = None) -> "Holder":
        """Describe this process."""
        return Holder(pid=os.getpid(), host=socket.gethostname(), since=time.time(), job=job)


def is_run_folder(run_dir: Path) -> bool:
    """Whether a run was started in this folder."""
    return (run_dir / RESOLVED_NAME).is_file()


def require_run_folder(run_dir: Path) -> None:
    """Raise RunFolderError if no run was ever started in `run_dir`."""
    if not run_dir.exists():
        raise RunFolderError(f"{run_dir} does not exist: expected a run folder")
    if not is_run_folder(run_dir):
        raise RunFolderError(f"{run_dir} is not a run folder: it has no {RESOLVED_NAME}")


def check_usable(run_dir: Path) -> None:
    """Raise RunFolderError unless `run_dir` is a run folder, empty, or not there yet.

    Writes nothing. What a killed first start left behind counts as empty.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise RunFolderError(f"--run-dir {run_dir} is a file; expected a folder or a new name")
    try:
        names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    except OSError as error:
        raise RunFolderError(f"--run-dir {run_dir} cannot be read: {error.strerror}") from error
    foreign = sorted(name for name in names - _WRITTEN_BEFORE_RESOLVED if not name.endswith(".tmp"))
    if foreign and not is_run_folder(run_dir):
        raise RunFolderError(
            f"--run-dir {run_dir} is not empty and not a run folder (it has {foreign[0]!r} but no "
            f"{RESOLVED_NAME}); use a new or an empty folder"
        )
    parent = _existing_parent(run_dir)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(f"--run-dir {run_dir}: {parent} is not a folder one can write to")
    _check_free_space(run_dir, parent=parent)


def prepare(
    run_dir: Path, *, config: RunConfig, recipe_file: Path, submitted_at: float | None = None
) -> list[str]:
    """Make `run_dir` a run folder, or check that `config` fits the run that is in it.

    Call with the lock held. `submitted_at`: since when a new run costs time, in seconds since 1970;
    None for now. Returns the free differences that were adopted, `key: old -> new`.
    Raises RunFolderError if the recipe would change the numbers of a run that has begun.
    """
    adopted: list[str] = []
    new = not is_run_folder(run_dir)
    if not new:
        stored = load_resolved(run_dir / RESOLVED_NAME)
        adopted = _adoptable(stored, config, run_dir=run_dir)
    record_code(run_dir)
    if adopted or not is_run_folder(run_dir):
        write_atomic(run_dir / "recipe.yaml", recipe_file.read_bytes())
        write_atomic(run_dir / RESOLVED_NAME, dump_yaml(config).encode())
    if new:
        since = time.time() if submitted_at is None else submitted_at
        _note(run_dir, {"time": since, "kind": SUBMITTED})
    return adopted


def note_launch(run_dir: Path, *, at: float) -> None:
    """Note since when this launcher is at work: before that, the run waited for one."""
    _note(run_dir, {"time": at, "kind": LAUNCHED})


def _note(run_dir: Path, line: dict[str, object]) -> None:
    diary = Diary(run_dir)
    diary.append(line)
    diary.close()


def record_code(run_dir: Path) -> None:
    """Append the state of the code to `code.txt`, if it is not what is written there last."""
    path = run_dir / "code.txt"
    text = describe_code()
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not known.endswith(text):
        header = f"== {timestamp(time.time())} on {socket.gethostname()}\n"
        write_atomic(path, (known + header + text).encode())


def is_held(run_dir: Path) -> bool:
    """Whether a launcher holds the run folder now."""
    try:
        descriptor = os.open(run_dir / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def read_holder(run_dir: Path) -> Holder | None:
    """Return what the last holder wrote about itself, if it can be read."""
    try:
        return Holder.model_validate_json((run_dir / LOCK_NAME).read_bytes())
    except (OSError, ValueError):
        return None


def stop_note(run_dir: Path) -> str | None:
    """Return what the STOP file says; None without one."""
    path = run_dir / STOP_NAME
    if not path.exists():
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "no reason given"
    except OSError:
        return "no reason given"


def write_stop(run_dir: Path, *, user: str) -> str:
    """Write the STOP file and return what it says."""
    note = f"stopped by {user} on {socket.gethostname()} at {timestamp(time.time())}"
    write_atomic(run_dir / STOP_NAME, (note + "\n").encode())
    return note


def timestamp(seconds: float) -> str:
    """Format seconds since 1970 as local time, to the second, with the offset."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")


def _adoptable(stored: RunConfig, config: RunConfig, *, run_dir: Path) -> list[str]:
    changed = differences(stored, config, free=False)
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise RunFolderError(
            f"{run_dir} holds a run with other settings:\n{listed}\n"
            "use another --run-dir, or the old values"
        )
    return differences(stored, config, free=True)


def _check_free_space(run_dir: Path, *, parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        raise RunFolderError(
            f"--run-dir {run_dir}: {free / 1e6:.0f} MB free on its disk, at least "
            f"{MIN_FREE_BYTES / 1e6:.0f} MB needed; make room or use another --run-dir"
        )


def _existing_parent(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    absolute = path.absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
