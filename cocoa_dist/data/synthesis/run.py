"""Many pictures at once: rows in their order, so many talks side by side, until all rows are ended.

A row ends when it has become items or has a reason why not; what no patience got an answer for, and
what a stop interrupts, is left for the next run of the same command.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cocoa_dist.data.synthesis.answers import FaultError
from cocoa_dist.data.synthesis.bill import Bill, Prices
from cocoa_dist.data.synthesis.caller import (
    Budget,
    BudgetError,
    Caller,
    StoppedError,
    UnansweredError,
)
from cocoa_dist.data.synthesis.endpoint import Endpoint
from cocoa_dist.data.synthesis.journal import JOURNAL_NAME, Journal
from cocoa_dist.data.synthesis.pace import Pace, Patience
from cocoa_dist.data.synthesis.pictures import (
    RejectedUnit,
    SentPicture,
    Unit,
    picture_digest,
    sent_picture,
    units,
)
from cocoa_dist.data.synthesis.plan import Plan, plan_hash
from cocoa_dist.data.synthesis.talk import request_id, talk
from cocoa_dist.data.writing.source import Source

_ROWS_AT_A_TIME = 64  # looked at together: if all are ended, none is read
_SECONDS_BETWEEN_REPORTS = 0.2


@dataclass(frozen=True)
class RunOptions:
    """How to run; none of it changes what comes out."""

    key: str = ""  # to the endpoint
    key_name: str = ""  # of the environment variable it is from, for messages
    limit: int | None = None  # rows of the source
    concurrency: int = 8  # talks side by side, one call each
    requests_per_minute: float = 0.0  # 0: no limit
    timeout: float = 120.0  # seconds of one call
    prices: Prices = field(default_factory=Prices)
    budget: float | None = None
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Outcome:
    """How far a synthesis is."""

    rows: int  # of the source, as the limit has it
    ended: int  # of the rows
    rejected: dict[str, int]  # rows that became no record, by kind of reason
    unanswered: dict[str, int]  # rows that this run had no luck with, by kind of reason
    stopped: str  # why the run stopped before its end; "": it did not
    bill: Bill
    in_flight: int = 0
    waiting: str = ""  # why all calls wait just now


class Stop:
    """The order to stop: no new call is made, those under way are awaited."""

    def __init__(self) -> None:
        self.reason = ""
        self.error: StoppedError | None = None

    def request(self, reason: str, error: StoppedError | None = None) -> None:
        """Stop, for the first reason that was given."""
        if not self.reason:
            self.reason, self.error = reason, error

    def check(self) -> None:
        """Raise StoppedError if the order was given."""
        if self.reason:
            raise self.error or StoppedError(self.reason)


def synthesise(
    plan: Plan,
    source: Source,
    folder: Path,
    *,
    options: RunOptions,
    stop: Stop,
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Ask about every picture of a source, or go on where another run was.

    All that is known afterwards is in `folder`/journal.jsonl. Raises ValueError for a journal of
    another plan, an endpoint that refuses everything (EndpointStopError) or fails for long
    (NothingWorksError), and a full disk; what was answered before is kept.
    """
    facts = plan.facts(source)
    journal = Journal(folder / JOURNAL_NAME, facts)
    try:
        run = _Run(plan, plan_hash(facts), source, journal, options, stop)
        asyncio.run(run.run(on_progress))
        return run.outcome()
    finally:
        journal.close()


class _Run:
    """One run; made outside, used inside the event loop."""

    def __init__(
        self,
        plan: Plan,
        plan_name: str,
        source: Source,
        journal: Journal,
        options: RunOptions,
        stop: Stop,
    ) -> None:
        self._plan, self._plan_name, self._source = plan, plan_name, source
        self._journal, self._options, self._stop = journal, options, stop
        self._count = min(len(source), options.limit or len(source))
        self._unanswered: Counter[str] = Counter()
        self._keys = {key: row for row, (key, _) in journal.rows.items()}
        self._pictures: dict[str, int] = {}
        for row, (_, picture) in sorted(journal.rows.items()):
            self._pictures.setdefault(picture, row)
        self._caller: Caller | None = None
        self._pace: Pace | None = None
        self._waiting: deque[Unit] = deque()
        self._rows = self._open_rows()
        self._feeding = asyncio.Lock()

    def outcome(self) -> Outcome:
        """Return how far the run is."""
        ended = {row: reason for row, reason in self._journal.ended.items() if row < self._count}
        kinds = Counter(reason.partition(":")[0] for reason in ended.values() if reason)
        return Outcome(
            rows=self._count,
            ended=len(ended),
            rejected=dict(kinds.most_common()),
            unanswered=dict(self._unanswered.most_common()),
            stopped=self._stop.reason,
            bill=self._journal.bill,
            in_flight=self._caller.in_flight if self._caller else 0,
            waiting=self._pace.why if self._pace else "",
        )

    async def run(self, on_progress: Callable[[Outcome], None]) -> None:
        """Work until all rows are ended, or the order to stop."""
        options = self._options
        budget = Budget(
            self._journal,
            prices=options.prices,
            limit=options.budget,
            check=self._stop.check,
        )
        self._pace = Pace(
            requests_per_minute=options.requests_per_minute,
            patience=options.patience,
            check=self._stop.check,
        )
        async with Endpoint(
            self._plan.address,
            key=options.key,
            key_name=options.key_name,
            timeout=options.timeout,
            calls=options.concurrency,
        ) as endpoint:
            self._caller = Caller(
                endpoint,
                self._journal,
                budget=budget,
                pace=self._pace,
                patience=options.patience,
                check=self._stop.check,
            )
            reporting = asyncio.create_task(self._report(on_progress))
            try:
                await self._work_all()
            finally:
                reporting.cancel()
        on_progress(self.outcome())

    async def _work_all(self) -> None:
        """Run the workers. The first error ends the run; calls under way are awaited."""
        workers = [asyncio.create_task(self._work()) for _ in range(self._options.concurrency)]
        errors: list[BaseException] = []
        for worker in asyncio.as_completed(workers):
            try:
                await worker
            except (ValueError, OSError) as error:
                self._stop.request(str(error))
                errors.append(error)
        if errors:
            raise errors[0]

    async def _report(self, on_progress: Callable[[Outcome], None]) -> None:
        while True:
            on_progress(self.outcome())
            await asyncio.sleep(_SECONDS_BETWEEN_REPORTS)

    async def _work(self) -> None:
        try:
            while (unit := await self._next()) is not None:
                await self._talk(unit)
        except BudgetError as error:
            self._stop.request(str(error), error)
        except StoppedError:
            return

    async def _next(self) -> Unit | None:
        """Return the next picture to talk about, None if there is none."""
        while True:
            self._stop.check()
            async with self._feeding:
                found = await asyncio.to_thread(next, self._rows, None)
            if found is None:
                return None
            if isinstance(found, RejectedUnit):
                await self._end(found.row, found.reason)
                continue
            reason = self._begin(found)
            if not reason:
                return found
            await self._end(found.row, reason)

    def _open_rows(self) -> Iterator[Unit | RejectedUnit]:
        """Yield the rows that are not ended; blocks of rows that all are ended are not read."""
        ended = self._journal.ended
        for start in range(0, self._count, _ROWS_AT_A_TIME):
            stop = min(start + _ROWS_AT_A_TIME, self._count)
            if all(row in ended for row in range(start, stop)):
                continue
            for unit in units(self._source, start, stop):
                if unit.row not in ended:
                    yield unit

    def _begin(self, unit: Unit) -> str:
        """Note a picture, and return why it is not to be talked about: its like came before."""
        digest = picture_digest(unit.picture)
        first = self._keys.setdefault(unit.key, unit.row)
        if first != unit.row:
            return f"repeated key: {unit.key!r} is that of row {first}"
        first = self._pictures.setdefault(digest, unit.row)
        if first != unit.row:
            return f"repeated picture: the same as that of row {first}"
        begun = self._journal.rows.get(unit.row)
        if begun is not None and begun != (unit.key, digest):
            raise ValueError(
                f"{unit.where} is another picture than the one that was asked about; put the old "
                "one back, or name another folder"
            )
        if begun is None:
            line = {"e": "row", "row": unit.row, "key": unit.key, "picture": digest}
            self._journal.note(line)
        return ""

    async def _end(self, row: int, reason: str) -> None:
        await self._journal.append({"e": "end", "row": row, "reason": reason})

    async def _talk(self, unit: Unit) -> None:
        """Talk about one picture to its end; without an answer it stays for another run."""
        plan, reason = self._plan, ""
        try:
            picture = await asyncio.to_thread(
                sent_picture,
                unit.picture,
                max_pixels=plan.max_pixels,
                max_decoded_pixels=plan.max_decoded_pixels,
            )
        except ValueError as error:
            await self._end(unit.row, f"picture cannot be used: {error}")
            return
        try:
            await self._hold_talk(unit, picture)
        except FaultError as error:
            reason = str(error)
        except UnansweredError as error:
            self._unanswered[str(error).partition(":")[0]] += 1
            return
        await self._end(unit.row, reason)

    async def _hold_talk(self, unit: Unit, picture: SentPicture) -> None:
        plan, url = self._plan, picture.url
        talking = talk(plan.prompt, key=unit.key, caption=unit.caption, asks=plan.asks)
        assert self._caller is not None
        try:
            request = next(talking)
            while True:
                reply = await self._caller.reply(
                    request_id(self._plan_name, unit.row, request),
                    plan.request_body(request, url),
                    row=unit.row,
                    prompt_tokens=plan.prompt_tokens(request, picture),
                    max_tokens=plan.prompt.file.max_tokens,
                )
                request = talking.send(reply)
        except StopIteration:
            return
