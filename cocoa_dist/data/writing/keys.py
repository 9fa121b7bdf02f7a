"""Whether two records of a data set have one key, in bounded memory however many there are.

The parts hold their key hashes in ascending order, so one range of hashes after the other is
gathered from all of them; equal hashes are settled by the keys themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cocoa_dist.data.shard_format import SCHEMA, shard_name
from cocoa_dist.data.writing.shard_file import Part, open_part

_HASHES_AT_A_TIME = 2**22  # 64 MiB with their places
_HASHES_KEPT = 2**24  # 128 MiB: of larger data sets the rest is looked at in the end
_ALL_HASHES = 2**64


@dataclass(frozen=True, order=True)
class Place:
    """A record by shard, and by number in it."""

    shard: int
    record: int


@dataclass(frozen=True)
class Duplicate:
    """A key and the first two records that have it."""

    key: str
    first: Place
    second: Place


def find_duplicate(
    folder: Path, parts: Sequence[Part], *, hashes_at_a_time: int = _HASHES_AT_A_TIME
) -> Duplicate | None:
    """Return one key that occurs twice in the shards of `parts`, or None."""
    total = sum(part.num_records for part in parts)
    num_ranges = -(-total // hashes_at_a_time)
    for number in range(num_ranges):
        low = _ALL_HASHES * number // num_ranges
        high = _ALL_HASHES * (number + 1) // num_ranges - 1
        for places in _same_hash(folder, parts, low=low, high=high):
            found = _same_key(folder, parts, places)
            if found is not None:
                return found
    return None


class SeenKeys:
    """The key hashes of the shards written so far, as many as memory should hold.

    A duplicate shows when its shard is finished, not when all are.
    """

    def __init__(self, folder: Path, *, hashes_kept: int = _HASHES_KEPT) -> None:
        self._folder, self._left = folder, hashes_kept
        self._runs: list[NDArray[np.uint64]] = []  # ascending each, the longest first
        self._parts: list[Part] = []

    def add(self, part: Part) -> Duplicate | None:
        """Take a finished shard; return a key of it that an earlier one has, if there is one."""
        if not part.num_records:
            return None
        with open_part(self._folder, part.shard) as table:
            hashes = table.column("key_hash").to_numpy().copy()
        self._parts.append(part)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            for value in hashes[run[places] == hashes].tolist():
                for same in _same_hash(self._folder, self._parts, low=value, high=value):
                    found = _same_key(self._folder, self._parts, same)
                    if found is not None:
                        return found
        if self._left >= len(hashes):
            self._left -= len(hashes)
            while self._runs and len(self._runs[-1]) <= len(hashes):
                hashes = np.sort(np.concatenate([self._runs.pop(), hashes]), kind="stable")
            self._runs.append(hashes)
        return None


def _same_hash(
    folder: Path, parts: Sequence[Part], *, low: int, high: int
) -> Iterator[list[Place]]:
    """Yield the places of each hash in [low, high] that occurs more than once."""
    hashes, shards, records = [], [], []
    for part in parts:
        if not part.num_records:
            continue
        with open_part(folder, part.shard) as table:
            column = table.column("key_hash").to_numpy()
            start = int(np.searchsorted(column, np.uint64(low), side="left"))
            stop = int(np.searchsorted(column, np.uint64(high), side="right"))
            hashes.append(column[start:stop].copy())
            records.append(table.column("key_record").to_numpy()[start:stop].copy())
            shards.append(np.full(stop - start, part.shard, dtype=np.int32))
    if not hashes:
        return
    of_hash, of_shard, of_record = map(np.concatenate, (hashes, shards, records))
    order = np.argsort(of_hash, kind="stable")
    ordered = of_hash[order]
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    for value in twice:
        chosen = order[np.searchsorted(ordered, value) : np.searchsorted(ordered, value, "right")]
        yield sorted(Place(int(of_shard[i]), int(of_record[i])) for i in chosen)


def _same_key(folder: Path, parts: Sequence[Part], places: list[Place]) -> Duplicate | None:
    seen: dict[str, Place] = {}
    by_shard = {part.shard: part for part in parts}
    for place in places:
        key = _key(folder, by_shard[place.shard], place.record)
        if key in seen:
            return Duplicate(key, seen[key], place)
        seen[key] = place
    return None


def _key(folder: Path, part: Part, record: int) -> str:
    """Read one key from a shard."""
    for batch in part.batches:
        if record < batch["num_rows"]:
            break
        record -= batch["num_rows"]
    with (folder / shard_name(part.shard)).open("rb") as file:
        file.seek(batch["offset"])
        decoded = pa.ipc.read_record_batch(pa.py_buffer(file.read(batch["length"])), SCHEMA)
    return str(decoded.column("key")[record].as_py())
