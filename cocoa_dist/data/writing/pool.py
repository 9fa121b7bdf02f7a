"""Writer processes: each makes one shard after the other until all are made or one fails.

They die with their parent, also when it is killed: an orphan would write into the next build.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from cocoa_dist.data.records import Record
from cocoa_dist.data.writing.dataset import duplicate_in_shard
from cocoa_dist.data.writing.shard_file import DuplicateKeyError, Part, write_shard
from cocoa_dist.data.writing.source import Rejected, Source
from cocoa_dist.data.writing.tokens import TokenCounter

_POLL_SECONDS = 0.2
_COUNT_EVERY = 16  # rows


@dataclass(frozen=True)
class Job:
    """What every writer process knows."""

    source: Source
    folder: Path
    records_per_batch: int
    records_per_shard: int  # source rows
    count_tokens: TokenCounter | None

    @property
    def num_shards(self) -> int:
        """Shards of the whole source, those included that stay empty."""
        return -(-len(self.source) // self.records_per_shard)


@dataclass(frozen=True)
class Counts:
    """What the writers have done since they began."""

    rows: int = 0
    rejected: int = 0
    bytes: int = 0  # of pictures and texts


class _Tally:
    """Counters that all writers add to, and the order to stop."""

    def __init__(self, counts: Any, stop: Any) -> None:
        self._counts, self._stop = counts, stop

    @classmethod
    def shared(cls, context: Any) -> "_Tally":
        return cls(context.Array("q", 3), context.Event())

    def add(self, rows: int, rejected: int, num_bytes: int) -> None:
        """Add to the counters. Raises _StoppedError if the writers are to stop."""
        with self._counts.get_lock():
            for place, number in enumerate((rows, rejected, num_bytes)):
                self._counts[place] += number
        if self._stop.is_set():
            raise _StoppedError

    def stop(self) -> None:
        self._stop.set()

    def counts(self) -> Counts:
        return Counts(*self._counts[:])


class _StoppedError(Exception):
    """Another writer failed."""


def write_parts(
    job: Job,
    shards: Sequence[int],
    *,
    processes: int,
    on_part: Callable[[Part], None],
    on_counts: Callable[[Counts], None],
) -> None:
    """Write shards, `processes` at a time; 1 writes in this process.

    What `on_part` and the writers raise ends the work: whole shards stay. Raises ValueError if a
    writer process dies.
    """
    context = multiprocessing.get_context("spawn")  # the parent may have threads
    tally = _Tally.shared(context)
    if processes == 1 or len(shards) <= 1:
        for shard in shards:
            on_part(_write_part(job, tally, shard, on_counts))
            on_counts(tally.counts())
        return
    executor = ProcessPoolExecutor(
        max_workers=min(processes, len(shards)),
        mp_context=context,
        initializer=_begin_writer,
        initargs=(job, tally),
    )
    try:
        waiting: set[Future[Part]] = {executor.submit(_write_in_pool, shard) for shard in shards}
        while waiting:
            done, waiting = wait(waiting, _POLL_SECONDS, return_when=FIRST_COMPLETED)
            on_counts(tally.counts())
            for future in done:
                on_part(future.result())
    except BrokenProcessPool as error:
        raise ValueError(
            f"{job.folder}: a writer process died, perhaps for lack of memory; start the same "
            "command again with fewer processes: whole shards stay"
        ) from error
    finally:
        tally.stop()
        executor.shutdown(cancel_futures=True)


_writer: tuple[Job, _Tally]  # of a writer process


def _begin_writer(job: Job, tally: _Tally) -> None:
    global _writer
    _writer = job, tally
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # it runs in writers only
    wait_for([parent.sentinel])
    os._exit(1)


def _write_in_pool(shard: int) -> Part:
    job, tally = _writer
    return _write_part(job, tally, shard, lambda counts: None)


def _write_part(job: Job, tally: _Tally, shard: int, on_counts: Callable[[Counts], None]) -> Part:
    start = shard * job.records_per_shard
    stop = min(start + job.records_per_shard, len(job.source))
    try:
        return write_shard(
            _counted(job.source.rows(start, stop), tally, on_counts),
            job.folder,
            shard=shard,
            records_per_batch=job.records_per_batch,
            count_tokens=job.count_tokens,
        )
    except DuplicateKeyError as error:
        raise duplicate_in_shard(error, first_row=start, source=job.source) from error


def _counted(
    rows: Iterable[Record | Rejected], tally: _Tally, on_counts: Callable[[Counts], None]
) -> Iterator[Record | Rejected]:
    pending = [0, 0, 0]
    for row in rows:
        yield row
        pending[0] += 1
        if isinstance(row, Rejected):
            pending[1] += 1
        else:
            pending[2] += record_bytes(row)
        if pending[0] == _COUNT_EVERY:
            tally.add(*pending)
            on_counts(tally.counts())
            pending = [0, 0, 0]
    tally.add(*pending)


def record_bytes(record: Record) -> int:
    """Return about how many bytes a record takes in a shard."""
    sides = (record.query, record.target, *record.positives, *record.negatives)
    texts = sum(len(part.text) for side in sides for part in side)
    return sum(map(len, record.images)) + texts + len(record.key)
