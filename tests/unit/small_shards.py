"""A data set of a few records on disk, for the tests of shards."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cocoa_dist.data import shards
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.shards import write_shards

NUM_RECORDS = 23
BATCH = 4
SHARD = 8


def png(height: int, width: int) -> bytes:
    """The header of a PNG, which is all that a writer looks at, and some bytes after it."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    body = b"IHDR" + size + bytes([8, 2, 0, 0, 0])
    header = (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + header + (4).to_bytes(4, "big") + b"IDAT" + bytes(50)


def make_record(number: int) -> Record:
    images = tuple(png(10 + number, 20 + i) for i in range(number % 3))
    if number == 7:
        images = (b"not a picture",)
    return Record(
        key=f"record-{number:03d}",
        task="odd" if number % 2 else "even",
        query=(text_part(f"query {number}"), *(image_part(i) for i in range(len(images)))),
        positives=tuple((text_part("word " * k),) for k in range(1, number % 4 + 1)),
        negatives=((text_part("no"),),) if number % 5 == 0 else (),
        target=(text_part("one two three"),) if number % 3 else (),
        images=images,
        meta={"number": number, "names": {"de": "Zähler", "ja": "番号"}},
    )


def make_records(count: int = NUM_RECORDS) -> Iterator[Record]:
    return (make_record(number) for number in range(count))


def count_words(text: str) -> int:
    return len(text.split())


def write(path: Path, count: int = NUM_RECORDS, **changes: Any) -> shards.DatasetInfo:
    options: dict[str, Any] = {
        "records_per_batch": BATCH,
        "records_per_shard": SHARD,
        "count_tokens": count_words,
        "tokenizer_sha256": "f" * 64,
        "info": {"name": "test"},
    }
    return write_shards(make_records(count), path, **{**options, **changes})


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def flip_byte(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x01
    file.write_bytes(data)
