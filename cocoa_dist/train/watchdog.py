"""Ends a rank that no longer gets anywhere, and leaves behind what it was doing.

A thread that wakes a few times a second. It needs the interpreter: code that hangs while it holds
the interpreter's lock is ended by the other ranks' watchdogs and the launcher.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Self

from cocoa_dist.runtime import EXIT_HUNG

TIMEOUT_SHARE = 0.9  # of a collective's timeout: before it fails with less to say
_TICK_SECONDS = 0.2
_MOST_SECONDS = 1.0  # that one tick counts: a process that was suspended does not hang
_PEER_GRACE = 0.05  # of the limit: a rank that waits lets the one that hangs leave first
_LAST_SECONDS = 30.0  # to write the stacks; the disk may be what hangs
_COLLECTIVE_FILES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/torch.py")
_PACKAGE = "/cocoa_dist/"
_EXCHANGE = ("cocoa_dist/distributed.py", "Exchange.read")  # no frame of torch's lies below it


class Watchdog:
    """Watches the thread that makes it; a context manager."""

    def __init__(self, *, seconds: float, stacks: Path, rank: int) -> None:
        """End the process when `seconds` pass between two beats; `stacks`: file for the dump."""
        self.seconds, self.stacks, self.rank = seconds, stacks, rank
        self._watched = threading.get_ident()
        self._phase = "starting"
        self._beats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def beat(self, phase: str) -> None:
        """Note that there was progress, and what comes now."""
        self._phase, self._beats = phase, self._beats + 1

    def _watch(self) -> None:
        last, seen, idle = time.monotonic(), self._beats, 0.0
        while not self._done.wait(_TICK_SECONDS):
            now = time.monotonic()
            idle = idle + min(now - last, _MOST_SECONDS) if self._beats == seen else 0.0
            last, seen = now, self._beats
            if idle < self.seconds:
                continue
            where = Whereabouts.of(sys._current_frames().get(self._watched))
            if where.collective and idle < (1.0 + _PEER_GRACE) * self.seconds:
                continue
            self._end(where, idle=idle)

    def _end(self, where: "Whereabouts", *, idle: float) -> None:
        """Dump all stacks, say where the rank was, and leave with a code of its own."""
        threading.Timer(_LAST_SECONDS, os._exit, [EXIT_HUNG]).start()
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("w") as file:
                file.write(f"rank {self.rank}, {self._phase}: {where.describe()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            kept = f"stacks of all threads in {self.stacks}"
        except OSError as error:
            kept = f"stacks could not be written: {error}"
        sys.stderr.write(
            f"HangError: no progress for {idle:.0f} s in {self._phase}: rank {self.rank} "
            f"{where.describe()}; {kept}\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_HUNG)


class Whereabouts:
    """Where a thread is: the collective it waits in, if any, and our own innermost function."""

    def __init__(self, *, collective: str, innermost: str, ours: str) -> None:
        self.collective, self.innermost, self.ours = collective, innermost, ours

    @staticmethod
    def of(frame: FrameType | None) -> "Whereabouts":
        """Read a thread's stack, from the innermost frame outwards."""
        collective = innermost = ours = ""
        while frame is not None:
            path, name = frame.f_code.co_filename, frame.f_code.co_name
            place = f"{name} ({Path(path).name}:{frame.f_lineno})"
            innermost = innermost or place
            if path.endswith(_COLLECTIVE_FILES) and not name.startswith("_"):
                collective = collective or name
            if path.endswith(_EXCHANGE[0]) and frame.f_code.co_qualname == _EXCHANGE[1]:
                collective = collective or _EXCHANGE[1]
            if _PACKAGE in path:
                ours = ours or place
            frame = frame.f_back
        return Whereabouts(collective=collective, innermost=innermost, ours=ours)

    def describe(self) -> str:
        """Return one phrase for a message; the launcher knows a waiting rank by its words."""
        caller = f", called by {self.ours}" if self.ours and self.ours != self.innermost else ""
        if self.collective:
            return f"waits for the other ranks in {self.collective}{caller}"
        return f"is in {self.innermost or 'no Python code'}{caller}"
