"""Arrow shards: reading any record of a data set by its number, from a folder or object store.

Batches are read with one `pread` or ranged GET each, at offsets from the index, never through
mmap, and every record is compared with its checksum. No torch here; nothing is decoded.
`shard_format` says what the files are, `writing` makes them.
"""

import hashlib
import os
import threading
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
from cocoa_dist.data.records import Record, from_row, record_crc32
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
    "read_manifest",
    "remove_dataset",
    "verify",
    "write_shards",
]

DEFAULT_CACHE_BYTES = 64 * 2**20
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
        self.info: DatasetInfo = dataset_info(manifest)
        self._cache_bytes = cache_bytes
        whole = self.info.count <= CHECKED_RECORDS
        records = _read_table(self._store, RECORD_INDEX, RECORD_INDEX_SCHEMA, check=whole)
        batches = _read_table(self._store, BATCH_INDEX, BATCH_INDEX_SCHEMA, check=whole)
        self._records = records
        self._crc32, self._batch, self._row = (
            _MappedColumn(records, name) for name in ("crc32", "batch", "row")
        )
        self._batch_shard = _column(batches, "shard")
        self._batch_start = np.cumsum(_column(batches, "num_rows"), dtype=np.int64)
        self._batch_start -= _column(batches, "num_rows")  # number of a batch's first record
        self._batch_offset = _column(batches, "offset")
        self._batch_length = _column(batches, "length")
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
        row = self._arrow_row(number).to_pylist()[0]
        try:
            record = from_row(row)
        except ValueError as error:
            raise ValueError(f"{self._describe(number, row['key'])}: {error}") from error
        found, expected = record_crc32(record), int(self._crc32[number])
        if found != expected:
            raise ValueError(
                f"{self._describe(number, record.key)}: crc32 is {found:#010x}, expected "
                f"{expected:#010x}: the shard is damaged; rebuild the data set or restore the file"
            )
        return record

    def key(self, number: int) -> str:
        """Return the key of record `number`, without building the record or checking it."""
        return str(self._arrow_row(number).column("key")[0].as_py())

    def image_sizes(self, number: int) -> tuple[tuple[int, int], ...]:
        """Return (height, width) in pixels of the pictures of a record, from the index alone.

        (0, 0) stands for a picture whose header could not be read when the data set was written.
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
            heights=heights.flatten().to_numpy(),
            widths=widths.flatten().to_numpy(),
            first_picture=first - first[0],
        )

    def location(self, number: int) -> Location:
        """Return where record `number` lies, from the index alone."""
        self._check_number(number)
        shard = self._batch_shard[self._batch[number]]
        first_batch = int(np.searchsorted(self._batch_shard, shard))
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
        if len(self._crc32) != self.info.count or len(self._batch_shard) != self.info.num_batches:
            raise ValueError(
                f"{self.path}: the index has {len(self._crc32)} records in "
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

    def _describe(self, number: int, key: str) -> str:
        location = self.location(number)
        return f"{self.path}/{location.shard}: row {location.row} (record {number}, key {key!r})"

    def _arrow_row(self, number: int) -> pa.RecordBatch:
        self._check_number(number)
        return self._arrow_batch(int(self._batch[number])).slice(int(self._row[number]), 1)

    def _arrow_batch(self, batch: int) -> pa.RecordBatch:
        """Return a batch from the cache, or read it. Two threads may read the same one."""
        state = self._process_state()
        with state.lock:
            if batch in state.batches:
                state.batches.move_to_end(batch)
                return state.batches[batch]
        decoded = self._read_batch(batch)
        with state.lock:
            if batch not in state.batches:
                state.batches[batch] = decoded
                state.cached_bytes += int(self._batch_length[batch])
            while state.cached_bytes > self._cache_bytes and len(state.batches) > 1:
                dropped, _ = state.batches.popitem(last=False)
                state.cached_bytes -= int(self._batch_length[dropped])
        return decoded

    def _process_state(self) -> "_ProcessState":
        """Return this process's files and cache; a forked child starts with none."""
        if self._state.pid != os.getpid():
            self._state = _ProcessState()
        return self._state

    def _read_batch(self, batch: int) -> pa.RecordBatch:
        offset, length = int(self._batch_offset[batch]), int(self._batch_length[batch])
        name = shard_name(int(self._batch_shard[batch]))
        file = f"{self.path}/{name}"
        data = self._store.read_range(name, offset=offset, length=length)
        if len(data) != length:
            raise ValueError(
                f"{file}: batch {batch} at byte {offset} has {len(data)} bytes, expected {length}: "
                "the file was cut; rebuild the data set or restore the file"
            )
        try:
            decoded = pa.ipc.read_record_batch(pa.py_buffer(data), SCHEMA)
            decoded.validate(full=True)  # damaged offsets would read outside the buffer
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file}: batch {batch} at byte {offset} is damaged ({error}); rebuild the data "
                "set or restore the file"
            ) from error
        return decoded


@dataclass
class _ProcessState:
    """What belongs to one process: decoded batches, oldest use first."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    batches: OrderedDict[int, pa.RecordBatch] = field(default_factory=OrderedDict)
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


class _MappedColumn:
    """A column whose values are looked up one by one, where they lie in the file."""

    def __init__(self, table: pa.Table, name: str) -> None:
        self._chunks = [chunk.to_numpy() for chunk in table.column(name).chunks]
        lengths = [len(chunk) for chunk in self._chunks]
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> int:
        chunk = int(np.searchsorted(self._ends, number, side="right"))
        return int(self._chunks[chunk][number - int(self._ends[chunk])])  # counted from its end


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(name).to_numpy()
    return values


def _fingerprint(crc32: NDArray[Any]) -> str:
    return hashlib.sha256(crc32.astype("<u4").tobytes()).hexdigest()


def _open_reader(path: str, cache_bytes: int) -> ShardReader:
    return ShardReader(path, cache_bytes=cache_bytes)
