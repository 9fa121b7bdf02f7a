"""Arrow shards: writing a data set, and reading any record of it by number.

Batches are read with one `pread` each, at offsets from the index, never through mmap, and every
record is compared with its checksum. No torch here; nothing is decoded but picture headers, once,
when writing. `shard_format` says what the files are.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cocoa_dist.data.images import image_size
from cocoa_dist.data.records import Record, Side, from_row, record_crc32, side_texts, to_row
from cocoa_dist.data.shard_format import (
    BATCH_INDEX,
    BATCH_INDEX_SCHEMA,
    ENERGON_FOLDER,
    MANIFEST_NAME,
    RECORD_INDEX,
    RECORD_INDEX_SCHEMA,
    SCHEMA,
    SCHEMA_VERSION,
    UNKNOWN_TOKENS,
    UNREADABLE,
    DatasetInfo,
    check_sizes,
    dataset_info,
    file_names,
    read_manifest,
    remove_dataset,
    shard_name,
    verify,
)
from cocoa_dist.manifest import fsync_folder, sha256_file, write_atomic

__all__ = [
    "DatasetInfo",
    "Location",
    "ShardReader",
    "count_text_tokens",
    "read_manifest",
    "remove_dataset",
    "verify",
    "write_shards",
]

ENERGON_VERSION = "7.4.1"  # whose metadata format this is
DEFAULT_CACHE_BYTES = 64 * 2**20

CountTokens = Callable[[str], int]


def count_text_tokens(record: Record, *, count_tokens: CountTokens) -> int:
    """Return the largest number of text tokens that one sample made from `record` can hold.

    That is query and whole target in one sequence, or one positive or negative on its own.
    Every text is counted for itself; special tokens are not counted.
    """

    def count_side(side: Side) -> int:
        return sum(count_tokens(text) for text in side_texts(side))

    alone = [count_side(side) for side in (*record.positives, *record.negatives)]
    return max(count_side(record.query) + count_side(record.target), *alone, 0)


def write_shards(
    records: Iterable[Record],
    destination: Path,
    *,
    info: dict[str, Any],
    count_tokens: CountTokens | None = None,
    tokenizer_sha256: str = "",
    records_per_batch: int = 64,
    records_per_shard: int = 16384,
) -> DatasetInfo:
    """Write a data set into the folder `destination`; the same records give the same bytes.

    Choose `records_per_batch` so that a batch has 1 to 4 MB. Without `count_tokens` the index says
    UNKNOWN_TOKENS. Every file is durable before the manifest appears; what an interrupted call left
    behind is replaced by the next one. Raises ValueError for a duplicate key, no records, a
    destination that already holds a data set, and sizes that do not divide.
    """
    _check_batching(records_per_batch=records_per_batch, records_per_shard=records_per_shard)
    _prepare_folder(destination)
    index = _IndexBuilder(count_tokens)
    batches = _chunks(records, records_per_batch)
    num_shards = 0
    for first in batches:
        rest = islice(batches, records_per_shard // records_per_batch - 1)
        _write_shard(chain([first], rest), destination, shard=num_shards, index=index)
        num_shards += 1
    if not index.records:
        raise ValueError(f"{destination}: there are no records to write, expected at least one")
    crc32 = np.array([row["crc32"] for row in index.records], dtype=np.uint32)
    _write_table(destination / RECORD_INDEX, index.records, RECORD_INDEX_SCHEMA)
    _write_table(destination / BATCH_INDEX, index.batches, BATCH_INDEX_SCHEMA)
    _write_energon_metadata(destination, index)
    files = [_file_entry(destination, name) for name in file_names(destination)]
    written = DatasetInfo(
        count=len(index.records),
        num_batches=len(index.batches),
        num_shards=num_shards,
        records_per_batch=records_per_batch,
        records_per_shard=records_per_shard,
        bytes=sum(entry["bytes"] for entry in files),
        tokenizer_sha256=tokenizer_sha256,
        fingerprint=_fingerprint(crc32),
        info=info,
    )
    manifest = {"schema_version": SCHEMA_VERSION, **asdict(written), "files": files}
    write_atomic(destination / MANIFEST_NAME, _json_bytes(manifest))
    return written


@dataclass(frozen=True)
class Location:
    """Where a record lies, for messages and quarantine files."""

    shard: str  # file name
    row: int  # from the start of the shard


class ShardReader:
    """Random access to the records of one data set.

    Opening reads the manifest and the index, not the shards. Safe to use from several threads and
    after a fork, and can be pickled: every process opens its own files, when it needs them.
    Raises ValueError if a file is missing, has another size than the manifest says, or if the
    index is not the one the manifest describes. OSError (a disk that fails) is passed on.
    """

    def __init__(self, path: Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        check_sizes(self.path, manifest)
        self.info: DatasetInfo = dataset_info(manifest)
        self._cache_bytes = cache_bytes
        records = _read_table(self.path / RECORD_INDEX, RECORD_INDEX_SCHEMA)
        batches = _read_table(self.path / BATCH_INDEX, BATCH_INDEX_SCHEMA)
        self.num_text_tokens: NDArray[np.int32] = _column(records, "num_text_tokens")
        self._crc32 = _column(records, "crc32")
        self._batch = _column(records, "batch")
        self._row = _column(records, "row")
        self._heights = records.column("image_heights").combine_chunks()
        self._widths = records.column("image_widths").combine_chunks()
        self._batch_shard = _column(batches, "shard")
        self._batch_offset = _column(batches, "offset")
        self._batch_length = _column(batches, "length")
        self._check_index()
        self._state = _ProcessState()

    def __len__(self) -> int:
        return self.info.count

    def __reduce__(self) -> tuple[Callable[..., "ShardReader"], tuple[Path, int]]:
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
        heights, widths = self._heights[number].as_py(), self._widths[number].as_py()
        return tuple(zip(heights, widths, strict=True))

    def location(self, number: int) -> Location:
        """Return where record `number` lies, from the index alone."""
        self._check_number(number)
        shard = int(self._batch_shard[self._batch[number]])
        return Location(shard_name(shard), number - shard * self.info.records_per_shard)

    def close(self) -> None:
        """Close the files and forget the cached batches; the next read opens them again."""
        state = self._process_state()
        with state.lock:
            for descriptor in state.descriptors.values():
                os.close(descriptor)
            state.descriptors.clear()
            state.batches.clear()
            state.cached_bytes = 0

    def _check_index(self) -> None:
        if len(self._crc32) != self.info.count or len(self._batch_shard) != self.info.num_batches:
            raise ValueError(
                f"{self.path}: the index has {len(self._crc32)} records in "
                f"{len(self._batch_shard)} batches, the manifest {self.info.count} in "
                f"{self.info.num_batches}; rebuild the data set or restore the index"
            )
        found = _fingerprint(self._crc32)
        if found != self.info.fingerprint:
            raise ValueError(
                f"{self.path / RECORD_INDEX}: fingerprint is {found[:12]}..., the manifest has "
                f"{self.info.fingerprint[:12]}...; rebuild the data set or restore the index"
            )

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.info.count:
            raise IndexError(f"{self.path} has records 0 to {self.info.count - 1}, not {number}")

    def _describe(self, number: int, key: str) -> str:
        location = self.location(number)
        return f"{self.path / location.shard}: row {location.row} (record {number}, key {key!r})"

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
            descriptor = self._descriptor(state, int(self._batch_shard[batch]))
        decoded = self._read_batch(descriptor, batch)
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

    def _descriptor(self, state: "_ProcessState", shard: int) -> int:
        if shard not in state.descriptors:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
            state.descriptors[shard] = os.open(self.path / shard_name(shard), flags)
        return state.descriptors[shard]

    def _read_batch(self, descriptor: int, batch: int) -> pa.RecordBatch:
        offset, length = int(self._batch_offset[batch]), int(self._batch_length[batch])
        file = self.path / shard_name(int(self._batch_shard[batch]))
        data = _read_exactly(descriptor, offset=offset, length=length)
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
    """What belongs to one process: open shards and decoded batches, oldest use first."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    descriptors: dict[int, int] = field(default_factory=dict)  # by shard
    batches: OrderedDict[int, pa.RecordBatch] = field(default_factory=OrderedDict)
    cached_bytes: int = 0


class _IndexBuilder:
    """The rows of the index while a data set is being written, and the keys seen so far."""

    def __init__(self, count_tokens: CountTokens | None) -> None:
        self.count_tokens = count_tokens
        self.records: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.numbers: dict[str, int] = {}  # record number by key

    def add_batch(self, batch: list[Record], *, shard: int, offset: int, length: int) -> None:
        self.batches.append(
            {"shard": shard, "num_rows": len(batch), "offset": offset, "length": length}
        )

    def add_record(self, record: Record, *, shard: int, row: int, crc32: int) -> None:
        number = len(self.records)
        earlier = self.numbers.setdefault(record.key, number)
        if earlier != number:
            raise ValueError(
                f"key {record.key!r} occurs twice, in records {earlier} and {number}: "
                "keys must be unique in a data set"
            )
        tokens = UNKNOWN_TOKENS
        if self.count_tokens is not None:
            tokens = count_text_tokens(record, count_tokens=self.count_tokens)
        sizes = [_header_size(image) for image in record.images]
        self.records.append(
            {
                "shard": shard,
                "batch": len(self.batches),
                "row": row,
                "crc32": crc32,
                "num_text_tokens": tokens,
                "image_heights": [height for height, _ in sizes],
                "image_widths": [width for _, width in sizes],
            }
        )


def _header_size(image: bytes) -> tuple[int, int]:
    """Return (height, width); a broken picture is stored all the same, the loader masks it."""
    try:
        return image_size(image)
    except ValueError:
        return (UNREADABLE, UNREADABLE)


def _check_batching(*, records_per_batch: int, records_per_shard: int) -> None:
    if records_per_batch < 1 or records_per_shard < 1 or records_per_shard % records_per_batch:
        raise ValueError(
            f"records_per_shard {records_per_shard} must be a positive multiple of "
            f"records_per_batch {records_per_batch}, so that only the last batch is short"
        )


def _prepare_folder(destination: Path) -> None:
    if (destination / MANIFEST_NAME).exists():
        raise ValueError(
            f"{destination} already holds a data set; write to another folder, or remove this one "
            "first (shards.remove_dataset)"
        )
    for folder in (destination, destination / "index", destination / ENERGON_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    for name in file_names(destination):
        (destination / name).unlink()


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _write_shard(
    batches: Iterable[list[Record]], destination: Path, *, shard: int, index: _IndexBuilder
) -> None:
    with (
        _durable_file(destination / shard_name(shard)) as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for number, batch in enumerate(batches):
            rows = [to_row(record) for record in batch]
            for row, record in enumerate(batch):
                index.add_record(record, shard=shard, row=row, crc32=rows[row]["crc32"])
            encoded = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
            before = file.tell()
            writer.write_batch(encoded)
            # Arrow writes the file's header together with the first batch, so count from the end.
            length = encoded.serialize().size if number == 0 else file.tell() - before
            index.add_batch(batch, shard=shard, offset=file.tell() - length, length=length)


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    with _durable_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
        table.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error}); rebuild the data set") from error
    if table.schema != schema:
        raise ValueError(f"{path} has columns {table.schema.names}, expected {schema.names}")
    return table


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(name).to_numpy()
    return values


def _write_energon_metadata(destination: Path, index: _IndexBuilder) -> None:
    """Write what energon's get_train_dataset needs; every split part is the whole data set."""
    counts: dict[str, int] = {}
    for batch in index.batches:
        name = shard_name(batch["shard"])
        counts[name] = counts.get(name, 0) + batch["num_rows"]
    parts = {"split_parts": {part: list(counts) for part in ("train", "val", "test")}}
    factory = {"__module__": "cocoa_dist.data.loader", "__class__": "ArrowDatasetFactory"}
    contents: dict[str, dict[str, Any]] = {  # JSON is YAML
        ".info.json": {"energon_version": ENERGON_VERSION, "shard_counts": counts},
        "split.yaml": {**parts, "exclude": []},
        "dataset.yaml": factory,
    }
    for name, content in contents.items():
        write_atomic(destination / ENERGON_FOLDER / name, _json_bytes(content))


def _file_entry(destination: Path, name: str) -> dict[str, Any]:
    file = destination / name
    return {"path": name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _fingerprint(crc32: NDArray[Any]) -> str:
    return hashlib.sha256(crc32.astype("<u4").tobytes()).hexdigest()


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


@contextmanager
def _durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears as `path`, whole and durable, only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _read_exactly(descriptor: int, *, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset` on, fewer only at the end of the file."""
    pieces = []
    while length > 0 and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _open_reader(path: Path, cache_bytes: int) -> ShardReader:
    return ShardReader(path, cache_bytes=cache_bytes)
