"""Arrow shards: reading any record of a data set by its number, from a folder or object store.

From a folder a record is one `pread` of its pictures, behind one for the headers of its batch; from
an object store a batch is one ranged GET. Never through mmap: a file that is cut would end the
process. Every record is compared with its checksum. No torch here; no picture is decoded.
`shard_format` says what the files are, `shard_batch` where bytes lie, `writing` makes them.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cocoa_dist.config import is_remote
from cocoa_dist.data.bounds import IndexColumns
from cocoa_dist.data.checksum import crc32
from cocoa_dist.data.records import Record, trusted_record
from cocoa_dist.data.shard_batch import BatchPlace, ShardBatch
from cocoa_dist.data.shard_format import (
    BATCH_INDEX,
    BATCH_INDEX_SCHEMA,
    RECORD_INDEX,
    RECORD_INDEX_SCHEMA,
    SCHEMA,
    DatasetInfo,
    check_sizes,
    dataset_info,
    read_manifest,
    remove_dataset,
    shard_name,
    verify,
)
from cocoa_dist.data.store import Store, open_store
from cocoa_dist.data.writing.dataset import write_shards

__all__ = [
    "DatasetInfo",
    "Location",
    "ShardReader",
    "check_dataset",
    "read_manifest",
    "remove_dataset",
    "verify",
    "write_shards",
]

DEFAULT_CACHE_BYTES = 64 * 2**20
_PICTURE_BYTES = BatchPlace._fields.index("picture_bytes")
_MEND = "the index is damaged; rebuild the data set or restore the file"
CHECKED_RECORDS = 2_000_000  # the index of a larger data set is not read whole at every opening


@dataclass(frozen=True)
class Location:
    """Where a record lies, for messages and quarantine files."""

    shard: str  # file name
    row: int  # from the start of the shard


class ShardReader:
    """Random access to the records of one data set.

    Opening reads the manifest and the index, not the shards. A local index is mapped: processes
    share it, and that of a data set of more than CHECKED_RECORDS records is taken as it is, until
    `verify` looks at it. Safe to use from several threads and
    after a fork, and can be pickled: every process opens its own files, when it needs them.
    Raises ValueError if a file is missing, has another size than the manifest says, or if the
    index is not the one the manifest describes. OSError (a disk that fails) is passed on.
    """

    def __init__(self, path: Path | str, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._store = open_store(path)
        self.path = self._store.location  # an absolute path, or a URL
        manifest = read_manifest(self._store)
        check_sizes(self._store, manifest)
        self._sizes = {entry["path"]: int(entry["bytes"]) for entry in manifest["files"]}
        self.info: DatasetInfo = dataset_info(manifest)
        self._cache_bytes = cache_bytes
        whole = self.info.count <= CHECKED_RECORDS
        records = _read_table(self._store, RECORD_INDEX, RECORD_INDEX_SCHEMA, check=whole)
        batches = _read_table(self._store, BATCH_INDEX, BATCH_INDEX_SCHEMA, check=whole)
        self._records = records
        self._rows = _MappedRows(records)
        self._batch_shard = _column(batches, "shard")
        self._batch_rows = _column(batches, "num_rows")
        self._batch_start = np.cumsum(self._batch_rows, dtype=np.int64)
        self._batch_start -= self._batch_rows  # number of a batch's first record
        self._batch_offset = _column(batches, "offset")
        self._batch_length = _column(batches, "length")
        self._batch_places = [_column(batches, name) for name in BatchPlace._fields]
        self._check_index()
        self._state = _ProcessState()

    def __len__(self) -> int:
        return self.info.count

    @cached_property
    def num_text_tokens(self) -> NDArray[np.int32]:
        """Tokens of every record's text, copied from the index; see shard_format."""
        return _column(self._records, "num_text_tokens")

    def __reduce__(self) -> tuple[Callable[..., "ShardReader"], tuple[str, int]]:
        return (_open_reader, (self.path, self._cache_bytes))

    @property
    def fingerprint(self) -> str:
        """The sha256 over the checksums of all records, in order."""
        return self.info.fingerprint

    def record(self, number: int) -> Record:
        """Return record `number`, from 0.

        Raises ValueError, naming shard, row and key, if its bytes are not those that were written.
        """
        expected, batch_number, row = self._rows[number]
        batch = self._state.batches.get(batch_number) or self._batch(batch_number)
        try:
            header, (begin, end) = batch.header(row), batch.extent(row)
        except (ValueError, IndexError) as error:  # the latter: the index has a row of no batch
            raise self._damaged(number, str(error)) from error
        if batch.is_whole:
            pictures = batch.pictures(begin, end)
        else:
            pictures = self._read_pictures(batch, batch_number, begin, end)
        found = crc32(pictures, crc32(header))  # as stored_crc32
        if found != expected:
            raise self._damaged(number, f"crc32 is {found:#010x}, expected {expected:#010x}")
        return trusted_record(header, pictures)

    def outline(self, number: int) -> Record:
        """Return a record whose pictures are empty: what plans need, without reading pictures.

        Raises ValueError if the headers of its batch are not those that were written.
        """
        _, batch_number, row = self._rows[number]
        batch = self._state.batches.get(batch_number) or self._batch(batch_number)
        if not batch.is_intact():
            raise self._damaged(number, "the headers of its batch are not those written")
        try:
            return trusted_record(batch.header(row), None)
        except IndexError as error:
            raise self._damaged(number, str(error)) from error

    def columns_of(self, number: int) -> tuple[pa.RecordBatch, int]:
        """Return the columns that other programs read, of a record's batch, and its row in them.

        Reads the whole batch, each time. Raises ValueError if it is damaged.
        """
        _, batch, row = self._rows[number]
        return self._typed_batch(batch), row

    def key(self, number: int) -> str:
        """Return the key of a record that may be damaged. Raises ValueError if its batch is."""
        columns, row = self.columns_of(number)
        try:
            return str(columns.column("key")[row].as_py())
        except IndexError as error:
            raise ValueError(f"{self.path}: no row {row}; {_MEND}") from error

    def image_sizes(self, number: int) -> tuple[tuple[int, int], ...]:
        """Return (height, width) in pixels of the pictures of a record, from the index alone.

        (0, 0) stands for a picture whose header could not be read when the data set was written.
        Behind them stands again each that samples use once more, such as a query's in a negative.
        """
        self._check_number(number)
        heights, widths = (
            self._records.column(name)[number].as_py() for name in ("image_heights", "image_widths")
        )
        return tuple(zip(heights, widths, strict=True))

    def index_columns(self, begin: int, end: int, *, counted: bool) -> IndexColumns:
        """Return what the index says of records [begin, end); text lengths if `counted`."""
        rows = self._records.slice(begin, end - begin)
        texts = _column(rows, "num_text_tokens")
        heights, widths = (
            rows.column(name).combine_chunks() for name in ("image_heights", "image_widths")
        )
        first = heights.offsets.to_numpy()
        return IndexColumns(
            num_text_tokens=texts if counted else np.full(len(texts), -1, dtype=np.int32),
            heights=_flat(heights),
            widths=_flat(widths),
            first_picture=first - first[0],
        )

    def location(self, number: int) -> Location:
        """Return where record `number` lies, from the index alone."""
        batch = int(np.searchsorted(self._batch_start, number, side="right")) - 1
        shard = self._batch_shard[batch]
        first_batch = min(int(np.searchsorted(self._batch_shard, shard)), batch)
        return Location(shard_name(int(shard)), number - int(self._batch_start[first_batch]))

    def shard_ranges(self) -> list[tuple[int, int]]:
        """Return the first record and the end of each shard, from the index alone."""
        _, first_batches = np.unique(self._batch_shard, return_index=True)
        starts = [int(self._batch_start[batch]) for batch in first_batches]
        return list(zip(starts, [*starts[1:], len(self)], strict=True))

    def close(self) -> None:
        """Close the files and forget the cached batches; the next read opens them again."""
        self._store.close()
        state = self._process_state()
        with state.lock:
            state.batches.clear()
            state.cached_bytes = 0

    def _check_index(self) -> None:
        if len(self._rows) != self.info.count or len(self._batch_shard) != self.info.num_batches:
            raise ValueError(
                f"{self.path}: the index has {len(self._rows)} records in "
                f"{len(self._batch_shard)} batches, the manifest {self.info.count} in "
                f"{self.info.num_batches}; rebuild the data set or restore the index"
            )
        if self.info.count > CHECKED_RECORDS:
            return
        found = _fingerprint(_column(self._records, "crc32"))
        if found != self.info.fingerprint:
            raise ValueError(
                f"{self.path}/{RECORD_INDEX}: fingerprint is {found[:12]}..., the manifest has "
                f"{self.info.fingerprint[:12]}...; rebuild the data set or restore the index"
            )

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.info.count:
            raise IndexError(f"{self.path} has records 0 to {self.info.count - 1}, not {number}")

    def _damaged(self, number: int, what: str) -> ValueError:
        """Return the error for a record whose bytes are not those that were written."""
        location = self.location(number)
        try:
            key = repr(self.key(number))
        except (ValueError, OSError):
            key = "unreadable"
        return ValueError(
            f"{self.path}/{location.shard}: row {location.row} (record {number}, key {key}): "
            f"{what}: the shard is damaged; rebuild the data set or restore the file"
        )

    def _batch(self, number: int) -> ShardBatch:
        """Return a batch from the cache, or read it. Two threads may read the same one."""
        state = self._process_state()
        batch = state.batches.get(number)
        if batch is not None:
            return batch
        batch = self._read_batch(number)
        with state.lock:
            if number not in state.batches:
                state.batches[number] = batch
                state.cached_bytes += batch.num_bytes
            while state.cached_bytes > self._cache_bytes and len(state.batches) > 1:
                _, dropped = state.batches.popitem(last=False)
                state.cached_bytes -= dropped.num_bytes
        return batch

    def _process_state(self) -> "_ProcessState":
        """Return this process's cache and lock; a forked child may inherit a lock that is held."""
        if self._state.pid != os.getpid():
            self._state = _ProcessState()
        return self._state

    def _read_batch(self, number: int) -> ShardBatch:
        """Read the head of a batch, and its pictures too from a store that is far.

        Raises ValueError if the index says what no shard can hold.
        """
        self._check_batch(number)
        place = BatchPlace(*(int(column[number]) for column in self._batch_places))
        offset = int(self._batch_offset[number])
        end = place.picture_data + place.picture_bytes * self._store.is_far
        begin = place.header_offsets
        name = shard_name(int(self._batch_shard[number]))
        data = self._read(name, number, offset=offset + begin, length=end - begin)
        rows = int(self._batch_rows[number])
        try:
            return ShardBatch(data, place, name=name, offset=offset, rows=rows)
        except TypeError as error:  # parts that do not begin or end where numbers do
            raise ValueError(f"{self.path}/{BATCH_INDEX}: batch {number}: {_MEND}") from error

    def _check_batch(self, number: int) -> None:
        if not 0 <= number < self.info.num_batches:
            raise ValueError(f"{self.path}/{RECORD_INDEX}: batch {number}: {_MEND}")

    def _read_pictures(self, batch: ShardBatch, number: int, begin: int, end: int) -> bytes:
        """Read the pictures of one record; at the second one of a batch the others are near."""
        if begin == end:
            return b""
        batch.reads += 1
        if batch.reads == 2:
            length = int(self._batch_places[_PICTURE_BYTES][number])
            self._store.expect(batch.name, offset=batch.first_picture, length=length)
        offset, length = batch.first_picture + begin, end - begin
        if offset + length <= self._sizes[batch.name]:
            data = self._store.read_range(batch.name, offset=offset, length=length)
            if len(data) == length:
                return data
        return self._read(batch.name, number, offset=offset, length=length)  # says what is wrong

    def _read(self, name: str, batch: int, *, offset: int, length: int) -> bytes:
        size = self._sizes.get(name, 0)
        if min(offset, length) < 0 or offset + length > size:
            raise ValueError(
                f"{self.path}/{BATCH_INDEX}: batch {batch} is at bytes {offset} to "
                f"{offset + length} of {name}, which has {size}: {_MEND}"
            )
        data = self._store.read_range(name, offset=offset, length=length)
        if len(data) != length:
            raise ValueError(
                f"{self.path}/{name}: batch {batch} at byte {offset} has {len(data)} bytes, "
                f"expected {length}: the file was cut; rebuild the data set or restore the file"
            )
        return data

    def _typed_batch(self, number: int) -> pa.RecordBatch:
        """Return all columns of a batch, pictures included. Raises ValueError if it is damaged."""
        self._check_batch(number)
        offset, length = int(self._batch_offset[number]), int(self._batch_length[number])
        name = shard_name(int(self._batch_shard[number]))
        data = self._read(name, number, offset=offset, length=length)
        try:
            decoded = pa.ipc.read_record_batch(pa.py_buffer(data), SCHEMA)
            decoded.validate(full=True)  # damaged offsets would read outside the buffer
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{self.path}/{name}: batch {number} at byte {offset} is damaged ({error}); "
                "rebuild the data set or restore the file"
            ) from error
        return decoded


def check_dataset(path: Path | str) -> DatasetInfo:
    """Return what a data set is.

    Raises ValueError if it is missing, lacks a file, or has a damaged index. Of one in an object
    store the index is not read: whoever opens it next will.
    """
    store = open_store(path)
    if not store.is_far:
        reader = ShardReader(path)
        reader.close()
        return reader.info
    manifest = read_manifest(store)
    check_sizes(store, manifest)
    store.close()
    return dataset_info(manifest)


@dataclass
class _ProcessState:
    """What belongs to one process: batches, the first one read first."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    batches: OrderedDict[int, ShardBatch] = field(default_factory=OrderedDict)
    cached_bytes: int = 0


def _read_table(store: Store, name: str, schema: pa.Schema, *, check: bool) -> pa.Table:
    try:
        table = pa.ipc.open_file(_mapped(store, name)).read_all()
        table.validate(full=check)
    except pa.ArrowException as error:
        raise ValueError(
            f"{store.location}/{name} is damaged ({error}); rebuild the data set"
        ) from error
    if table.schema != schema:
        raise ValueError(
            f"{store.location}/{name} has columns {table.schema.names}, expected {schema.names}"
        )
    return table


def _mapped(store: Store, name: str) -> pa.Buffer | pa.MemoryMappedFile:
    """Return a file mapped if it is a local one, else read."""
    if is_remote(store.location):
        return pa.py_buffer(store.read(name))
    return pa.memory_map(f"{store.location}/{name}")


class _MappedRows:
    """(crc32, batch, row) of every record, looked up one by one where they lie in the file."""

    def __init__(self, table: pa.Table) -> None:
        chunks = table.select(["crc32", "batch", "row"]).to_batches()
        self._chunks = [[memoryview(c.to_numpy()) for c in chunk.columns] for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64).tolist()
        self._count = self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        if not 0 <= number < self._count:
            raise IndexError(f"the data set has records 0 to {self._count - 1}, not {number}")
        chunk = bisect_right(self._ends, number)
        crc32, batch, row = self._chunks[chunk]
        number -= self._ends[chunk]  # counted from the chunk's end
        return crc32[number], batch[number], row[number]


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(name).to_numpy()
    return values


def _flat(lists: pa.ListArray) -> NDArray[np.int32]:
    """Return the values of all lists; its own `flatten` imports a quarter of a second."""
    offsets = lists.offsets.to_numpy()
    values: NDArray[np.int32] = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    return values


def _fingerprint(crc32: NDArray[Any]) -> str:
    return hashlib.sha256(crc32.astype("<u4").tobytes()).hexdigest()


def _open_reader(path: str, cache_bytes: int) -> ShardReader:
    return ShardReader(path, cache_bytes=cache_bytes)
