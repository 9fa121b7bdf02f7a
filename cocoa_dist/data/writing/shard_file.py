"""One shard: its Arrow file, and a part file with all that the index will say about it.

The part is durable before the shard gets its name, so a shard that has its name is whole and need
never be written again; what a killed writer leaves is replaced.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cocoa_dist.data.images import image_size
from cocoa_dist.data.records import Record, Side, side_texts, to_row
from cocoa_dist.data.shard_batch import find_places
from cocoa_dist.data.shard_format import (
    BUILD_FOLDER,
    RECORD_INDEX_SCHEMA,
    SCHEMA,
    UNKNOWN_TOKENS,
    UNREADABLE,
    shard_name,
)
from cocoa_dist.data.writing.source import Rejected
from cocoa_dist.manifest import durable_file, fsync_folder, sha256_file

CountTokens = Callable[[str], int]

MAX_BATCH_BYTES = 32 * 2**20  # a batch is ended early rather than to grow beyond
_HEAD = b"part"  # key of the JSON in a part's schema
_COLUMNS = ("batch", "row", "crc32", "num_text_tokens", "image_heights", "image_widths")
PART_SCHEMA = pa.schema(
    [
        *(RECORD_INDEX_SCHEMA.field(name) for name in _COLUMNS),  # batch: in its shard
        ("source_row", pa.int32()),  # from the first source row of the shard
        ("key_hash", pa.uint64()),  # ascending, unlike the other columns; see key_hash()
        ("key_record", pa.int32()),  # the record of that hash, in its shard
    ]
)


@dataclass(frozen=True)
class Part:
    """What is known of one finished shard."""

    shard: int
    bytes: int
    sha256: str
    num_rows: int  # of the source
    num_records: int  # at most num_rows; 0: there is no shard file
    batches: list[dict[str, int]] = field(repr=False)  # rows of BATCH_INDEX, without the shard
    rejected: list[dict[str, str]] = field(repr=False)  # where, reason


def part_file(folder: Path, shard: int) -> Path:
    """Return where the part of a shard lies while a data set is being built."""
    return folder / BUILD_FOLDER / f"shard-{shard:05d}.part"


def key_hash(key: str) -> int:
    """Return 64 bits that tell keys apart, collisions aside."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def count_text_tokens(record: Record, *, count_tokens: CountTokens) -> int:
    """Return the largest number of text tokens that one sample made from `record` can hold.

    That is query, whole target and keywords that it does not list in one sequence, or one positive
    or negative on its own. Every text is counted for itself; special tokens are not counted.
    """

    def count_side(side: Side) -> int:
        return sum(count_tokens(text) for text in side_texts(side))

    together = count_side(record.query) + count_side(record.target)
    keywords = record.meta.get("keywords")
    if isinstance(keywords, list) and keywords:  # others are refused where they are read
        listed = ", ".join(map(str, keywords))
        if listed not in " ".join(side_texts(record.target)):
            together += count_tokens(f": {listed}") + 1  # another may come first, without a space
    alone = [count_side(side) for side in (*record.positives, *record.negatives)]
    return max(together, *alone, 0)


def indexed_sizes(record: Record) -> list[tuple[int, int]]:
    """Return what the index says of a record's pictures: (height, width) of each, in pixels.

    Behind them stands again every picture that samples use once more, so that all together are
    the most that samples can hold.
    """
    sizes = [_header_size(image) for image in record.images]
    sides = (record.query, *record.positives, *record.negatives, record.target)
    used = [part.image for side in sides for part in side if part.kind == "image"]
    again = list(used)
    for number in set(used):
        again.remove(number)
    return sizes + [sizes[number] for number in again]


def write_shard(
    rows: Iterable[Record | Rejected],
    folder: Path,
    *,
    shard: int,
    records_per_batch: int,
    count_tokens: CountTokens | None = None,
) -> Part:
    """Write one shard and its part into `folder`; the same rows give the same bytes.

    Raises ValueError for a key that occurs twice among the rows. What was begun is removed then.
    """
    rejected: list[dict[str, str]] = []
    index = _PartBuilder(count_tokens)
    temporary = _temporary(folder, shard)
    part_file(folder, shard).unlink(missing_ok=True)  # it would vouch for another shard
    try:
        with temporary.open("wb") as file:
            for batch in _batches(rows, records_per_batch, rejected=rejected, index=index):
                index.add_batch(file, batch)
            index.end(file)
            file.flush()
            os.fsync(file.fileno())
        part = Part(
            shard=shard,
            bytes=temporary.stat().st_size if index.num_records else 0,
            sha256=sha256_file(temporary) if index.num_records else "",
            num_rows=index.num_records + len(rejected),
            num_records=index.num_records,
            batches=index.batches,
            rejected=rejected,
        )
        index.write(part, part_file(folder, shard))
        _give_name(folder, part)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return part


def read_part(folder: Path, shard: int) -> Part | None:
    """Return the part of a shard that is whole, or None if it has to be written.

    A shard whose writer died just before it got its name gets it now.
    """
    try:
        with pa.memory_map(str(part_file(folder, shard))) as file:
            head = json.loads(pa.ipc.open_file(file).schema.metadata[_HEAD])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    part = Part(**head)
    named, temporary = folder / shard_name(shard), _temporary(folder, shard)
    if part.num_records == 0:
        return part
    if named.is_file():
        return part if named.stat().st_size == part.bytes else None
    if temporary.is_file() and temporary.stat().st_size == part.bytes:
        _give_name(folder, part)
        return part
    return None


@contextmanager
def open_part(folder: Path, shard: int) -> Iterator[pa.Table]:
    """Map the table of a part; its columns are valid inside the block only."""
    with pa.memory_map(str(part_file(folder, shard))) as file:
        yield pa.ipc.open_file(file).read_all()


class _PartBuilder:
    """The rows of a part while its shard is being written."""

    def __init__(self, count_tokens: CountTokens | None) -> None:
        self.batches: list[dict[str, int]] = []
        self.num_records = 0
        self.source_rows: list[int] = []
        self._count_tokens = count_tokens
        self._rows: list[dict[str, Any]] = []
        self._records: dict[str, int] = {}  # record in the shard by key
        self._writer: pa.RecordBatchWriter | None = None

    def add_batch(self, file: BinaryIO, batch: list[Record]) -> None:
        rows = [to_row(record) for record in batch]
        for number, record in enumerate(batch):
            self._add_record(record, row=number, crc32=rows[number]["crc32"])
        encoded = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        if self._writer is None:
            self._writer = pa.ipc.new_file(file, SCHEMA)
        before = file.tell()
        self._writer.write_batch(encoded)
        # Arrow writes the file's header together with the first batch, so count from the end.
        message = encoded.serialize()
        length = file.tell() - before if self.batches else message.size
        assert length == message.size, f"a batch of {length} bytes, its message {message.size}"
        places = find_places(message, SCHEMA)._asdict()
        entry = {"num_rows": len(batch), "offset": file.tell() - length, "length": length}
        self.batches.append(entry | places)

    def end(self, file: BinaryIO) -> None:
        """Write the footer of the Arrow file."""
        if self._writer is not None:
            self._writer.close()

    def write(self, part: Part, path: Path) -> None:
        """Write the part file, durable."""
        hashes: NDArray[np.uint64] = np.array([key_hash(key) for key in self._records], np.uint64)
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        table = pa.table(
            {
                **{name: [row[name] for row in self._rows] for name in _COLUMNS},
                "source_row": self.source_rows,
                "key_hash": hashes[order],
                "key_record": order,
            },
            schema=PART_SCHEMA.with_metadata({_HEAD: json.dumps(asdict(part))}),
        )
        with durable_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def _add_record(self, record: Record, *, row: int, crc32: int) -> None:
        earlier = self._records.setdefault(record.key, self.num_records)
        if earlier != self.num_records:
            rows = self.source_rows
            raise DuplicateKeyError(record.key, rows[earlier], rows[self.num_records])
        self.num_records += 1
        tokens = UNKNOWN_TOKENS
        if self._count_tokens is not None:
            tokens = count_text_tokens(record, count_tokens=self._count_tokens)
        sizes = indexed_sizes(record)
        self._rows.append(
            {
                "batch": len(self.batches),
                "row": row,
                "crc32": crc32,
                "num_text_tokens": tokens,
                "image_heights": [height for height, _ in sizes],
                "image_widths": [width for _, width in sizes],
            }
        )


class DuplicateKeyError(ValueError):
    """A key that two source rows of one shard have; the numbers count from the shard's first."""

    def __init__(self, key: str, first_row: int, second_row: int) -> None:
        super().__init__(key, first_row, second_row)  # pickled as these three
        self.key, self.rows = key, (first_row, second_row)


def _batches(
    rows: Iterable[Record | Rejected],
    size: int,
    *,
    rejected: list[dict[str, str]],
    index: _PartBuilder,
) -> Iterator[list[Record]]:
    """Group records; put rows that became none on the list."""
    batch: list[Record] = []
    num_bytes = 0
    for number, row in enumerate(rows):
        if isinstance(row, Rejected):
            rejected.append(asdict(row))
            continue
        weight = sum(map(len, row.images))
        if batch and num_bytes + weight > MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(row)
        index.source_rows.append(number)
        num_bytes += weight
        if len(batch) == size:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _header_size(image: bytes) -> tuple[int, int]:
    """Return (height, width); a broken picture is stored all the same, the loader masks it."""
    try:
        return image_size(image)
    except ValueError:
        return (UNREADABLE, UNREADABLE)


def _temporary(folder: Path, shard: int) -> Path:
    return folder / f".{shard_name(shard)}.tmp"


def _give_name(folder: Path, part: Part) -> None:
    if part.num_records:
        _temporary(folder, part.shard).replace(folder / shard_name(part.shard))
    else:
        _temporary(folder, part.shard).unlink(missing_ok=True)
    fsync_folder(folder)
