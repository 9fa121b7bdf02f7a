"""When the next call may go out.

So many a minute, not while the endpoint asks to wait, and one at a time while nothing but failures
comes back.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

_SLICE = 0.2  # seconds: so soon a wait notices that the run is to stop


@dataclass(frozen=True)
class Patience:
    """How failures are borne. Pauses are in seconds."""

    tries: int = 6  # of one request, before its picture is left for another run
    pause: float = 1.0  # after the first failure; doubled after each, half of it by chance
    longest_pause: float = 60.0
    breaker_failures: int = 12  # in a row, of any requests, before all wait
    breaker_trips: int = 6  # waits in a row, each twice as long, before the run stops
    longest_wait: float = 900.0  # that the endpoint may ask for


class NothingWorksError(ValueError):
    """The endpoint has failed for so long that going on is no use."""


class Pace:
    """Lets calls pass. One for all calls of a run; made and used inside its event loop."""

    def __init__(
        self, *, requests_per_minute: float, patience: Patience, check: Callable[[], None]
    ) -> None:
        """`requests_per_minute`: 0 for no limit. `check` raises when the run is to stop."""
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._patience, self._check = patience, check
        self._next = self._not_before = 0.0
        self._failures = self._trips = 0
        self._refused = 0  # requests, while none has been answered
        self._has_worked = False
        self._probe = asyncio.Lock()
        self.why = ""  # all are waiting; "": they are not

    @asynccontextmanager
    async def call(self) -> AsyncIterator[int]:
        """Wait for one's turn; yields what `failed` and `worked` want to know."""
        if self._trips:
            async with self._probe:
                if self._trips:  # else the one before us has shown that it works again
                    await self._wait()
                    yield self._trips
                    return
        await self._wait()
        yield self._trips

    async def _wait(self) -> None:
        while True:
            self._check()
            now = time.monotonic()
            start = max(self._next, self._not_before)
            if start <= now:
                self.why = ""
                self._next = max(self._next, now - _SLICE) + self._gap
                return
            await asyncio.sleep(min(start - now, _SLICE))

    def hold(self, seconds: float, why: str) -> None:
        """Let nothing pass for a time. Raises NothingWorksError if that is too long."""
        if seconds > self._patience.longest_wait:
            raise NothingWorksError(
                f"the endpoint asks to wait {seconds:.0f} s ({why}), more than "
                f"{self._patience.longest_wait:.0f}; start the same command again then"
            )
        until = time.monotonic() + seconds
        if until > self._not_before:
            self._not_before, self.why = until, why

    def worked(self) -> None:
        """Note that the endpoint has answered something."""
        self._failures = self._trips = 0
        self._has_worked = True

    def refused(self, reason: str) -> None:
        """Note that the endpoint is there and does not want a request.

        Raises NothingWorksError if it has wanted none so far: it is the settings, not the pictures.
        """
        self._failures = self._trips = 0
        self._refused += 1
        if not self._has_worked and self._refused >= self._patience.breaker_failures:
            raise NothingWorksError(
                f"the endpoint refuses every request, the last one with: {reason}; see what "
                "--dry-run shows, correct --response-format, --token-field, --body or "
                "--max-pixels, and name another folder"
            )

    def failed(self, trips: int, reason: str) -> None:
        """Note a failure of a call that began after so many trips.

        Raises NothingWorksError when there were too many with nothing else in between.
        """
        if trips != self._trips:
            return  # it was under way already when all began to wait
        self._failures += 1
        if self._failures < (1 if trips else self._patience.breaker_failures):
            return
        self._trips += 1
        self._failures = 0
        if self._trips > self._patience.breaker_trips:
            raise NothingWorksError(
                f"every call fails, the last one with: {reason}; see to the endpoint and start the "
                "same command again: all answers so far are kept"
            )
        pause = self._patience.pause * 2**self._trips
        self.hold(min(pause, self._patience.longest_pause), f"every call fails: {reason}")
