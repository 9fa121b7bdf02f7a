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
from types import FrameType, TracebackType
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from launcher.faults import Departure, choose_culprit, last_lines
from launcher.history import Verdict
from launcher.runfolder import RESOLVED_NAME

TRAINER = (sys.executable, "-m", "cocoa_dist.train")
OUTCOME_NAME = "outcome.json"
BAD_INPUT_CODE = 2
_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 0.5  # after the first death: what the others die of may be the cause
_TERM_SECONDS = 5.0  # between TERM and KILL for the ranks that a dead one leaves behind
_LEAVE_SECONDS = 300.0  # between the first rank that leaves with 0 and the last
_REPEAT_SECONDS = 0.2  # a second signal within this time is the same one (TERM and HUP together)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Outcome(BaseModel):
    """`outcome.json`: what the ranks agreed on before they left; rank 0 writes it."""

    model_config = ConfigDict(frozen=True)

    epoch: str
    stage: str
    step: int
    verdict: Literal["finished", "preempted", "stopped"]
    reason: str | None = None


@dataclass(frozen=True)
class Order:
    """One incarnation to run."""

    trainer: tuple[str, ...]
    run_dir: Path  # absolute
    stage: str
    epoch: str
    world_size: int
    threads: int

    def command(self) -> list[str]:
        """Return the command line of a rank, the same for all."""
        resolved = str(self.run_dir / RESOLVED_NAME)
        return [*self.trainer, resolved, "--stage", self.stage, "--run-dir", str(self.run_dir)]

    def environment(self, *, rank: int, port: int) -> dict[str, str]:
        """Return the environment of one rank: the launcher's, and what the ranks agree by."""
        return {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "COCOA_EPOCH": self.epoch,
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
        }

    def log_path(self, rank: int) -> Path:
        """Return where stdout and stderr of a rank go."""
        return self.run_dir / "logs" / self.epoch / f"{self.stage}.rank{rank}.log"


@dataclass(frozen=True)
class Ending:
    """How an incarnation ended; `log` is the file to read first, if there is one."""

    verdict: Verdict
    reason: str
    log: Path | None = None


class Interrupts:
    """Counts INT, TERM and HUP instead of dying of them, while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self.signal = signal.SIGTERM
        self._last = 0.0
        self._handlers: dict[signal.Signals, object] = {}

    @property
    def exit_code(self) -> int:
        """Return what a shell expects of a process that ended because of the signal."""
        return 128 + self.signal

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started by nohup
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.count == 0:
            self.signal = signal.Signals(number)
        if self.count == 0 or now - self._last > _REPEAT_SECONDS:
            self.count += 1
            self._last = now


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
    return _end_by_outcome(order)


def read_outcome(order: Order) -> Outcome | None:
    """Return what the ranks of this incarnation agreed on; None if they did not say."""
    try:
        outcome = Outcome.model_validate_json((order.run_dir / OUTCOME_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return outcome if (outcome.epoch, outcome.stage) == (order.epoch, order.stage) else None


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
            env=order.environment(rank=rank, port=port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_die_with_parent(),  # the launcher has no threads
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


def _end_by_outcome(order: Order) -> Ending:
    outcome = read_outcome(order)
    if outcome is None:
        reason = f"the ranks left with 0, but {OUTCOME_NAME} has nothing of this incarnation"
        return Ending(Verdict.CRASH, reason, order.log_path(0))
    return Ending(Verdict(outcome.verdict), outcome.reason or "", order.log_path(0))
