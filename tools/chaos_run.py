"""A run that is being disturbed: started, watched, harmed at a chosen moment, compared at its end.

What tools/chaos.py is made of. Knows the run by its folder and by /proc alone, as an operator does.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from compare_runs import compare, read_steps  # noqa: E402

from cocoa_dist.manifest import step_folders  # noqa: E402
from cocoa_dist.metrics import METRICS_NAME, read_json_lines  # noqa: E402

FILL_THE_DISK = "fill the disk"
KINDS = {  # kind -> weight
    "kill a rank": 3,
    "kill the launcher": 3,
    "kill all": 3,
    "term the launcher": 2,
    "term a rank": 2,
    "stop a rank, then kill it": 1,
    "stop a rank, kill the launcher": 1,
    "kill all, flip a byte": 3,
    FILL_THE_DISK: 2,
}
MOMENTS = {"while starting": 1, "in a step": 2, "while saving": 4, "at a stage's end": 2}
PATIENCE = 600.0  # seconds without any progress before a run is given up
DEATHS_WITHOUT_CHECKPOINT = 2  # then a checkpoint is waited for: a launcher gives up after three
_STOPPED_SECONDS = 2.0  # a rank that was stopped is killed so much later
_FULL_SECONDS = 8.0  # a disk stays full, unless the launcher leaves earlier
_SAVE_SECONDS = 0.25  # a save takes about that long
_HAND_OVER_SECONDS = 2.0  # from the last save of a stage into the start of the next one
_START_SECONDS = 6.0  # how long ranks need to their first step
_ENDED_BY_SIGNAL = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
_NO_ROOM = 2
_GIVEN_UP = 93


class ChaosError(RuntimeError):
    """A run did what it must not do, or did not come back."""


@dataclass(frozen=True)
class Place:
    """Where in a run something happened; all as far as it could be seen from outside."""

    stage: str
    step: int  # the last one in the run's record
    saving: bool  # a checkpoint was being written


@dataclass
class Run:
    """One run folder that is being disturbed."""

    folder: Path
    command: list[str]
    log: Path  # what the launcher says, on another disk
    disk: Path | None = None  # a small file system of its own that the folder is on
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    since_checkpoint: int = 0  # deaths since the last new checkpoint
    known_checkpoints: int = 0  # at the last death
    old_stagings: set[Path] = field(default_factory=set)  # the next incarnation removes them
    was_full: bool = False  # the disk, since the launcher was started
    manual_steps: int = 0  # starts that nobody's signal explains

    def start(self) -> None:
        """Start the launcher, or go on with the run: one command for both."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)
        self.starts += 1
        self.was_full = False

    def left(self) -> bool:
        """Whether the launcher is gone."""
        return self.process is None or self.process.poll() is not None

    def steps(self) -> list[tuple[str, int]]:
        """Return the steps of the run's record."""
        with contextlib.suppress(ValueError, OSError):  # being rewritten
            return [(r["stage"], r["step"]) for r in read_json_lines(self.folder / METRICS_NAME)]
        return []

    def checkpoints(self) -> list[Path]:
        """Return all committed checkpoints."""
        return sorted((self.folder / "checkpoints").glob("*/step_*"))

    def stagings(self) -> set[Path]:
        """Return what saves are being written into, or were when they were killed."""
        return set((self.folder / "checkpoints").glob("*/.staging-step*"))

    def saving(self) -> bool:
        """Whether a checkpoint is being written that was not yet when the last death was over."""
        return bool(self.stagings() - self.old_stagings)

    def ended_stages(self) -> int:
        """Return in how many stages the last save has begun to write the stage's weights."""
        return len({p.parent.parent for p in (self.folder / "checkpoints").glob("*/*/weights.*")})

    def place(self) -> Place:
        """Return where the run is."""
        stage, step = (self.steps() or [("none", 0)])[-1]
        return Place(stage, step, self.saving())

    def processes(self, word: bytes) -> list[int]:
        """Return the ids of this run's processes that have a word on their command line."""
        mark, found = str(self.folder).encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if word in words and mark in words:
                        found.append(int(entry.name))
        return found

    def ranks(self) -> list[int]:
        """Return the process ids of the run's trainers."""
        return self.processes(b"cocoa_dist.train")

    def kill_all(self) -> None:
        """End every process of the run, also those of an earlier call of this tool."""
        for pid in (*self.processes(b"launcher"), *self.ranks()):
            send(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def wait_for(run: Run, moment: str, draw: random.Random) -> bool:
    """Wait until it is time to do harm; False if the run has ended before."""
    must_save = run.since_checkpoint >= DEATHS_WITHOUT_CHECKPOINT
    run.old_stagings = run.stagings()
    if moment == "while starting" and not must_save:
        return _sleep(run, draw.uniform(0.0, _START_SECONDS))
    steps, saved, ended = len(run.steps()), len(run.checkpoints()), run.ended_stages()
    wanted = draw.randint(1, 4)
    reached: Callable[[], bool]
    reached, linger = {
        "while starting": (lambda: True, _SAVE_SECONDS),
        "in a step": (lambda: len(run.steps()) >= steps + wanted, 0.2),
        "while saving": (run.saving, _SAVE_SECONDS),
        "at a stage's end": (lambda: run.ended_stages() > ended, _HAND_OVER_SECONDS),
    }[moment]
    deadline = time.monotonic() + PATIENCE
    while not (reached() and (not must_save or len(run.checkpoints()) > saved)):
        if run.left():
            return False
        if time.monotonic() > deadline:
            raise ChaosError(f"nothing new in {PATIENCE:.0f} s, waiting for: {moment}")
        time.sleep(0.005)
    return _sleep(run, draw.uniform(0.0, linger))


def _sleep(run: Run, seconds: float) -> bool:
    """Sleep; False if the run has ended meanwhile."""
    time.sleep(seconds)
    return not run.left()


def harm(run: Run, kind: str, draw: random.Random) -> Place | None:
    """Do it; returns where the run was, or None if there was nobody left to do it to."""
    assert run.process is not None
    launcher, ranks = run.process.pid, run.ranks()
    if "a rank" in kind and not ranks:
        return None
    place, saved = run.place(), len(run.checkpoints())
    run.since_checkpoint = 1 if saved > run.known_checkpoints else run.since_checkpoint + 1
    run.known_checkpoints = saved
    victim = draw.choice(ranks) if ranks else 0
    if kind == FILL_THE_DISK:
        _fill(run)
    elif kind in ("kill a rank", "term a rank"):
        send(victim, signal.SIGKILL if "kill" in kind else signal.SIGTERM)
    elif kind in ("kill the launcher", "term the launcher"):
        send(launcher, signal.SIGKILL if "kill" in kind else signal.SIGTERM)
    elif kind.startswith("stop a rank"):
        send(victim, signal.SIGSTOP)
        time.sleep(_STOPPED_SECONDS)
        send(victim if kind.endswith("kill it") else launcher, signal.SIGKILL)
    else:
        for pid in (launcher, *ranks):
            send(pid, signal.SIGKILL)
        if "flip" in kind:
            _flip_a_byte(run, draw)
    return place


def _fill(run: Run) -> None:
    """Leave no room on the run's disk for a while, or until the launcher has left over it."""
    assert run.disk is not None
    run.was_full = True
    filler = run.disk / "filler"
    deadline = time.monotonic() + _FULL_SECONDS
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < deadline and not run.left():
            with contextlib.suppress(OSError):
                while file.write(b"0" * 2**16):  # what is freed meanwhile is taken, too
                    pass
            time.sleep(0.02)
    filler.unlink()


def _flip_a_byte(run: Run, draw: random.Random) -> None:
    """Damage a file of the newest checkpoint, if it is not the only one of its stage."""
    run.process.wait() if run.process else None
    newest = max(run.checkpoints(), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None or len(step_folders(run.folder, stage=newest.parent.name)) < 2:
        return
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    victim = draw.choice(files)
    content = bytearray(victim.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    victim.write_bytes(content)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def settle(run: Run) -> bool:
    """Go on after a death: start the launcher again if it has left; True if the run is done.

    Raises ChaosError if it left with a code that what was done to it does not explain, or if its
    ranks outlive it.
    """
    assert run.process is not None
    time.sleep(0.3)
    code = run.process.poll()
    if code is None:
        return False
    deadline = time.monotonic() + PATIENCE
    while run.ranks():  # orphans see that the launcher is gone, and leave
        if time.monotonic() > deadline:
            raise ChaosError(f"ranks outlive their launcher: {run.ranks()}")
        time.sleep(0.02)
    if code == 0:
        return True
    explained = code in _ENDED_BY_SIGNAL or (code == _NO_ROOM and run.was_full)
    if not explained and code != _GIVEN_UP:
        said = run.log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ChaosError(f"the launcher left with {code}: {' '.join(said)}")
    run.manual_steps += not explained
    run.start()
    return False


def wait_for_the_end(run: Run) -> None:
    """Wait until a run that is no longer disturbed is done, starting it again where that is due."""
    deadline = time.monotonic() + PATIENCE
    while not settle(run):
        if time.monotonic() > deadline:
            raise ChaosError(f"not done {PATIENCE:.0f} s after the last death")


@dataclass(frozen=True)
class Verdict:
    """How a disturbed run differs from the undisturbed one."""

    steps: int = 0  # of the undisturbed run, compared one by one
    lost: int = 0  # uses of records
    repeated: int = 0
    first_difference: str = ""  # of losses, gradient norms, records or weights

    def describe(self) -> list[str]:
        """Return what is wrong, a line each."""
        found = [self.first_difference] if self.first_difference else []
        if self.lost or self.repeated:
            found.append(f"{self.lost} records lost, {self.repeated} repeated")
        return found


def judge(quiet: Run, harmed: Run, *, stages: Sequence[str]) -> Verdict:
    """Compare a run with the undisturbed one to the last bit: every step, record and weight."""
    left, right = read_steps(quiet.folder), read_steps(harmed.folder)
    found = [difference.describe() for difference in compare(left, right, tolerance=0.0)]
    for (stage, step), line in left.items():
        norm = right.get((stage, step), {}).get("grad_norm")
        if line["grad_norm"] != norm:
            found.append(f"{stage} step {step}: grad_norm {line['grad_norm']!r} and {norm!r}")
    lost = repeated = 0
    for stage in stages:
        before, after = _records(quiet, stage), _records(harmed, stage)
        used, now_used = Counter(chain(*before)), Counter(chain(*after))
        lost += (used - now_used).total()
        repeated += (now_used - used).total()
        if before != after:
            found.append(f"{stage}: other records, or in another order")
        if _weights(quiet, stage) != _weights(harmed, stage):
            found.append(f"{stage}: other final weights")
    return Verdict(len(left), lost, repeated, found[0] if found else "")


def _records(run: Run, stage: str) -> list[list[int]]:
    """Return the records of each step of a stage."""
    return [line["records"] for line in read_json_lines(run.folder / f"samples/{stage}.jsonl")]


def _weights(run: Run, stage: str) -> str:
    """Return the digest of a stage's final weights."""
    newest = step_folders(run.folder, stage=stage)[0]
    return hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()
