"""Signals to the launcher itself: counted, never died of, while it looks after ranks."""

import signal
import time
from types import FrameType
from typing import Self

_REPEAT_SECONDS = 0.2  # a second signal within this time is the same one (TERM and HUP together)
LEAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Counts INT, TERM, HUP and USR2 instead of dying of them, while it is entered.

    USR2 is what the batch script sends before the time limit: save, leave, be queued again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.signal = signal.SIGTERM  # the first one; a later INT, TERM or HUP replaces a USR2
        self._last = 0.0
        self._handlers: dict[signal.Signals, object] = {}

    @property
    def exit_code(self) -> int:
        """Return what a shell expects of a process that ended because of the signal."""
        return 128 + self.signal

    @property
    def asks_for_requeue(self) -> bool:
        """Whether all that came was the warning before the time limit."""
        return self.count > 0 and self.signal is signal.SIGUSR2

    def __enter__(self) -> Self:
        for number in (*LEAVE_SIGNALS, signal.SIGUSR2):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started by nohup
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.count == 0 or self.signal is signal.SIGUSR2:
            self.signal = signal.Signals(number)
        if self.count == 0 or now - self._last > _REPEAT_SECONDS:
            self.count += 1
            self._last = now
