"""Runs one incarnation of one stage as N processes on this machine, and says how it ended.

Nothing of it survives the launcher: each rank leads a process group of its own, dies with the
launcher by the kernel's death signal, and a watchdog kills the groups' other members.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cocoa_dist.config import RunConfig
from launcher.backend import BAD_INPUT_CODE, OUTCOME_NAME, Ending, Order, end_by_outcome
from launcher.claim import claimed
from launcher.faults import Departure, choose_culprit, last_lines
from launcher.history import Verdict, new_epoch
from launcher.runfolder import Holder
from launcher.signals import Interrupts

TRAINER = (sys.executable, "-m", "cocoa_dist.train")
_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 0.5  # after the first death: what the others die of may be the cause
_TERM_SECONDS = 5.0  # between TERM and KILL for the ranks that a dead one leaves behind
_LEAVE_SECONDS = 300.0  # between the first rank that leaves with 0 and the last
_PAUSE_SECONDS = 1.0  # between a crash and the next attempt
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class LocalBackend:
    """Ranks as processes of this machine; the caller starts the run again if it was told to end."""

    world_size: int
    trainer: tuple[str, ...] = TRAINER
    leaves_when_preempted: bool = False
    size_option: str = "--nproc"

    @property
    def check_command(self) -> tuple[str, ...]:
        """Command that looks at the inputs of a recipe."""
        return self.trainer

    def describe(self) -> str:
        """Say where the ranks run."""
        return f"{self.world_size} processes"

    def hold(self, run_dir: Path) -> contextlib.AbstractContextManager[None]:
        """Hold the run folder by a lock of this process."""
        return claimed(run_dir, Holder.of_this_process())

    def new_epoch(self, run_dir: Path) -> str:
        """Name a new incarnation."""
        return new_epoch(run_dir)

    def failures_before(self, run_dir: Path, *, stage: str, from_step: int) -> int:
        """Return 0: whoever calls `run` again wants it tried again."""
        return 0

    def prepare(self, config: RunConfig, *, run_dir: Path, interrupts: Interrupts) -> Ending | None:
        """Do nothing: this machine is the one the launcher runs on."""
        return None

    def incarnate(
        self, order: Order, *, interrupts: Interrupts, tick: Callable[[], None]
    ) -> Ending:
        """Run an incarnation as child processes."""
        return run_incarnation(order, interrupts=interrupts, tick=tick)

    def review(self, ending: Ending, *, config: RunConfig, run_dir: Path) -> Ending:
        """Leave it at what the ranks said."""
        return ending

    def pause_seconds(self, failures: int) -> float:
        """Return a short pause: nothing here needs time to recover."""
        return _PAUSE_SECONDS


def rank_environment(order: Order, *, rank: int, port: int) -> dict[str, str]:
    """Return the environment of one rank: the launcher's, and what the ranks agree by."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(order.world_size),
        "LOCAL_WORLD_SIZE": str(order.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "COCOA_EPOCH": order.epoch,
        "OMP_NUM_THREADS": str(order.threads),
        "PYTHONUNBUFFERED": "1",
    }


def run_incarnation(order: Order, *, interrupts: Interrupts, tick: Callable[[], None]) -> Ending:
    """Start the ranks, wait until all have left, and return how it ended.

    `tick` is called several times a second. The first interrupt is passed on as TERM, a second
    one kills. When this returns or raises, no process of the incarnation is left.
    """
    (order.run_dir / OUTCOME_NAME).unlink(missing_ok=True)
    order.log_path(0).parent.mkdir(parents=True, exist_ok=True)
    with _Ranks(order) as ranks:
        told = False
        first_left: float | None = None
        while ranks.poll():
            if ranks.failed:
                return _end_after_death(ranks, told=told)
            if interrupts.count > 1:
                return Ending(Verdict.PREEMPTED, f"killed by a second {interrupts.signal.name}")
            if interrupts.count == 1 and not told:
                told = True
                ranks.send(signal.SIGTERM)
            if first_left is None and ranks.left:
                first_left = time.monotonic()
            if first_left is not None and time.monotonic() - first_left > _LEAVE_SECONDS:
                return _end_of_straggler(ranks)
            tick()
            time.sleep(_POLL_SECONDS)
        if ranks.failed:
            return _end_after_death(ranks, told=told)
    tick()
    return end_by_outcome(order)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Ranks:
    """The processes of one incarnation; leaving the context kills what is left of them."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._processes: list[subprocess.Popen[bytes]] = []
        self._cleanup = contextlib.ExitStack()
        self.left: list[int] = []  # ranks that are gone, in the order in which it was seen
        self.failed: list[Departure] = []  # those of them that did not leave with 0

    def __enter__(self) -> Self:
        try:
            announce = self._cleanup.enter_context(_watchdog())
            self._cleanup.callback(self._kill)
            port = free_port()
            for rank in range(self._order.world_size):
                self._processes.append(_start_rank(self._order, rank=rank, port=port))
                announce(self._processes[-1].pid)
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def poll(self) -> bool:
        """Note who is gone; return whether some rank still runs."""
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is None or rank in self.left:
                continue
            _kill_group(process.pid)  # workers that outlived their rank
            self.left.append(rank)
            if code != 0:
                self.failed.append(Departure(rank, code, self._order.log_path(rank)))
        return len(self.left) < len(self._processes)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the ranks that run; not to their workers, whom the ranks look after."""
        for rank, process in enumerate(self._processes):
            if rank not in self.left:
                process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Wait until all are gone, at most so long; return whether they are."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 2)
        return not self.poll()

    def running(self) -> list[int]:
        """Ranks that have not left."""
        return [rank for rank in range(len(self._processes)) if rank not in self.left]

    def log_path(self, rank: int) -> Path:
        """Return the log of a rank."""
        return self._order.log_path(rank)

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                _kill_group(process.pid)
                process.wait()


def _start_rank(order: Order, *, rank: int, port: int) -> subprocess.Popen[bytes]:
    with order.log_path(rank).open("ab") as log:
        return subprocess.Popen(
            order.command(),
            env=rank_environment(order, rank=rank, port=port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_die_with_parent(),  # one call, looked up before the fork
        )


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a child runs before exec so that the kernel kills it when we die."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after fork only the call is left to do
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return arm


@contextmanager
def _watchdog() -> Iterator[Callable[[int], None]]:
    """Run the watchdog; the value announces a process group to it."""
    script = str(Path(__file__).with_name("watchdog.py"))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert process.stdin is not None, "stdin is a pipe"
    pipe = process.stdin

    def tell(word: object) -> None:
        # Without its watchdog a run is still a run: the death signal reaches the ranks.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(f"{word}\n")
            pipe.flush()

    try:
        yield tell
    finally:
        tell("done")
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        process.wait()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _end_after_death(ranks: _Ranks, *, told: bool) -> Ending:
    """Let the other ranks show what they die of, then end them."""
    ranks.wait(_SETTLE_SECONDS)
    died: Sequence[Departure] = tuple(ranks.failed)
    ranks.send(signal.SIGTERM)
    ranks.wait(_TERM_SECONDS)
    refused = [item for item in died if item.code == BAD_INPUT_CODE]
    if refused:
        return Ending(Verdict.BAD_INPUT, last_lines(refused[0].log), refused[0].log)
    if told and all(item.code == -signal.SIGTERM for item in died):
        return Ending(Verdict.PREEMPTED, "told to leave before the ranks could save")
    culprit = choose_culprit(died)
    return Ending(Verdict.CRASH, culprit.describe(), culprit.log)


def _end_of_straggler(ranks: _Ranks) -> Ending:
    rank = ranks.running()[0]
    reason = f"rank {rank} still ran {_LEAVE_SECONDS:.0f} s after rank {ranks.left[0]} had left"
    return Ending(Verdict.CRASH, reason, ranks.log_path(rank))
