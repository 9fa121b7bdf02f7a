"""From a request to its reply: asked again while that can help, and never beyond the budget.

The journal is told before a request goes out, and before its answer is used.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cocoa_dist.data.synthesis.answers import Reply
from cocoa_dist.data.synthesis.bill import Prices, tokens_of
from cocoa_dist.data.synthesis.endpoint import Answered, Endpoint, EndpointStopError, Failed
from cocoa_dist.data.synthesis.journal import Journal
from cocoa_dist.data.synthesis.pace import Pace, Patience

_MARGIN = 1.1  # over the largest ratio of counted to estimated tokens
_FIRST_RATIO = 2.0  # before any answer has told the ratio
_LOOK_SECONDS = 0.05  # between looks at what others have spent
_RATE_LIMITED_TRIES = 10  # times as many as of other failures: it works, only not now


class StoppedError(Exception):
    """The run is to stop: whoever waits shall wait no longer."""


class BudgetError(StoppedError):
    """The next call could cost more than is left of the budget."""


class UnansweredError(Exception):
    """A request was not answered, after all patience; another run may have more luck."""


class Budget:
    """What may be spent: answers so far, what is under way at its worst, and the next call."""

    def __init__(
        self,
        journal: Journal,
        *,
        prices: Prices,
        limit: float | None,
        check: Callable[[], None],
    ) -> None:
        """`check` raises StoppedError when the run is to stop."""
        self.prices, self.limit = prices, limit
        self._journal, self._check = journal, check
        self._under_way = 0.0
        self._ratio = 0.0

    @asynccontextmanager
    async def reserve(self, *, prompt_tokens: float, max_tokens: int) -> AsyncIterator[None]:
        """Hold the most that a call can cost, once the calls under way leave room for it.

        Raises BudgetError if they cannot.
        """
        ratio = max(1.0, self._ratio * _MARGIN) if self._ratio else _FIRST_RATIO
        most = self.prices.cost(prompt_tokens=ratio * prompt_tokens, completion_tokens=max_tokens)
        while self.limit is not None:
            spent = self._journal.bill.at_most(self.prices)
            if spent + self._under_way + most <= self.limit:
                break
            if spent + most > self.limit:
                raise BudgetError(
                    f"the budget of {self.limit:g} is used up: {spent:.4f} spent, the next call "
                    f"could cost {most:.4f}"
                )
            self._check()
            await asyncio.sleep(_LOOK_SECONDS)
        self._under_way += most
        try:
            yield
        finally:
            self._under_way -= most

    def learn(self, *, estimated: float, counted: int) -> None:
        """Take note of how far an estimate was off."""
        self._ratio = max(self._ratio, counted / max(1.0, estimated))


class Caller:
    """Gets requests answered. One for all pictures of a run."""

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal,
        *,
        budget: Budget,
        pace: Pace,
        patience: Patience,
        check: Callable[[], None],
    ) -> None:
        """`check` raises StoppedError when the run is to stop."""
        self._endpoint, self._journal = endpoint, journal
        self._budget, self._pace, self._patience, self._check = budget, pace, patience, check
        self.in_flight = 0

    async def reply(
        self, request: str, body: dict[str, Any], *, row: int, prompt_tokens: float, max_tokens: int
    ) -> Reply:
        """Return the reply to a request, from the journal if it is there.

        Raises UnansweredError, StoppedError, and what ends a run: EndpointStopError,
        NothingWorksError, and ValueError for a disk that is full.
        """
        found = self._journal.reply(request)
        if found is not None:
            return found
        failures = waits = 0
        draw = random.Random(f"{request}/{time.time_ns()}")  # spreads calls, changes no record
        while True:
            async with self._budget.reserve(prompt_tokens=prompt_tokens, max_tokens=max_tokens):
                outcome = await self._send(request, body, row)
            if isinstance(outcome, Answered):
                counted, _ = tokens_of(outcome.usage)
                self._budget.learn(estimated=prompt_tokens, counted=counted)
            if isinstance(outcome, Answered) or outcome.final:
                settled = self._journal.reply(request)
                assert settled is not None  # it was written just now
                return settled
            if outcome.kind == "rate limited":
                waits += 1
                given_up = waits >= self._patience.tries * _RATE_LIMITED_TRIES
            else:
                failures += 1
                given_up = failures >= self._patience.tries
            if given_up:
                raise UnansweredError(f"{outcome.kind}: {outcome.reason}")
            await self._rest(outcome, failures + waits, draw)

    async def _send(self, request: str, body: dict[str, Any], row: int) -> Answered | Failed:
        """Call once, with the journal told before and after."""
        async with self._pace.call() as trips:
            self._check()
            await self._journal.append({"e": "sent", "id": request, "row": row, "at": _now()})
            self.in_flight += 1
            began = time.monotonic()
            try:
                outcome = await self._endpoint.send(body, idempotency_key=request)
            except EndpointStopError as error:
                refusal = Failed("refused for good", str(error))
                await self._journal.append(self._line(request, refusal, 0.0))
                raise
            finally:
                self.in_flight -= 1
            seconds = round(time.monotonic() - began, 3)
            await self._journal.append(self._line(request, outcome, seconds))
            if isinstance(outcome, Answered):
                self._pace.worked()
            elif outcome.final:
                self._pace.refused(outcome.reason)
            elif outcome.kind == "rate limited":
                if outcome.retry_after is not None:
                    self._pace.hold(outcome.retry_after, "the endpoint asks to wait")
            else:
                if outcome.retry_after is not None:
                    self._pace.hold(outcome.retry_after, "the endpoint asks to wait")
                self._pace.failed(trips, f"{outcome.kind}: {outcome.reason}")
            return outcome

    def _line(self, request: str, outcome: Answered | Failed, seconds: float) -> dict[str, Any]:
        if isinstance(outcome, Failed):
            return {
                "e": "failure",
                "id": request,
                "kind": outcome.kind,
                "reason": outcome.reason,
                "lost": outcome.lost,
                "final": outcome.final,
                "seconds": seconds,
                "at": _now(),
            }
        prompt, completion = tokens_of(outcome.usage)
        prices = self._budget.prices
        cost = prices.cost(prompt_tokens=prompt, completion_tokens=completion)
        return {
            "e": "answer",
            "id": request,
            "usage": outcome.usage,
            "cost": cost if prices != Prices() else None,
            "finish": outcome.finish,
            "content": outcome.content,
            "refusal": outcome.refusal,
            "fault": outcome.fault,
            "seconds": seconds,
            "at": _now(),
        }

    async def _rest(self, outcome: Failed, failures: int, draw: random.Random) -> None:
        """Wait before the next try; what the endpoint asks for holds everybody, see Pace."""
        if outcome.retry_after is not None:
            return
        longest = min(self._patience.longest_pause, self._patience.pause * 2 ** (failures - 1))
        end = time.monotonic() + longest * (0.5 + 0.5 * draw.random())
        while (left := end - time.monotonic()) > 0:
            self._check()
            await asyncio.sleep(min(left, 0.2))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
