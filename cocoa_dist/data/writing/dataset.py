"""From finished shards to a data set: the index, energon's files, and the manifest last.

Holds one shard's part in memory at a time. `write_shards` is all of it for records at hand.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cocoa_dist.data.records import Record
from cocoa_dist.data.shard_format import (
    BATCH_INDEX,
    BATCH_INDEX_SCHEMA,
    BUILD_FOLDER,
    ENERGON_FOLDER,
    MANIFEST_NAME,
    RECORD_INDEX,
    RECORD_INDEX_SCHEMA,
    REJECTED_LIST,
    SCHEMA_VERSION,
    DatasetInfo,
    file_names,
    remove_build,
    shard_name,
)
from cocoa_dist.data.writing.keys import Duplicate, Place, find_duplicate
from cocoa_dist.data.writing.shard_file import (
    CountTokens,
    DuplicateKeyError,
    Part,
    open_part,
    write_shard,
)
from cocoa_dist.data.writing.source import Source
from cocoa_dist.manifest import durable_file, sha256_file, write_atomic

ENERGON_VERSION = "7.4.1"  # whose metadata format this is
_KEY_ADVICE = "keys must be unique in a data set"


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
    """Write records at hand into the folder `destination`; the same ones give the same bytes.

    Choose `records_per_batch` so that a batch has 1 to 4 MB. Without `count_tokens` the index says
    UNKNOWN_TOKENS. Every file is durable before the manifest appears; what an interrupted call left
    behind is replaced by the next one. Raises ValueError for a duplicate key, no records, a
    destination that already holds a data set, and sizes that do not divide.
    """
    check_batching(records_per_batch=records_per_batch, records_per_shard=records_per_shard)
    prepare_folder(destination)
    clear_leftovers(destination)
    parts: list[Part] = []
    iterator = iter(records)
    for first in iterator:
        rows = chain([first], islice(iterator, records_per_shard - 1))
        try:
            part = write_shard(
                rows,
                destination,
                shard=len(parts),
                records_per_batch=records_per_batch,
                count_tokens=count_tokens,
            )
        except DuplicateKeyError as error:
            first_row = len(parts) * records_per_shard
            raise duplicate_in_shard(error, first_row=first_row) from error
        parts.append(part)
    return finish(
        destination,
        parts,
        info=info,
        tokenizer_sha256=tokenizer_sha256,
        records_per_batch=records_per_batch,
        records_per_shard=records_per_shard,
    )


def check_batching(*, records_per_batch: int, records_per_shard: int) -> None:
    """Raise ValueError unless shards can be cut into whole batches."""
    if records_per_batch < 1 or records_per_shard < 1 or records_per_shard % records_per_batch:
        raise ValueError(
            f"records_per_shard {records_per_shard} must be a positive multiple of "
            f"records_per_batch {records_per_batch}, so that only the last batch is short"
        )


def prepare_folder(destination: Path) -> None:
    """Make the folders of a data set. Raises ValueError if there is one, or they cannot be made."""
    if (destination / MANIFEST_NAME).exists():
        raise ValueError(
            f"{destination} already holds a data set, of other files or settings; write to another "
            "folder, or remove this one first (shards.remove_dataset)"
        )
    try:
        for name in (".", "index", ENERGON_FOLDER, BUILD_FOLDER):
            (destination / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{destination} cannot be written ({error}); name a folder that can, or change its "
            "permissions"
        ) from error


def clear_leftovers(destination: Path, *, keep: str = "") -> None:
    """Remove what an interrupted writer left behind, except `keep` in the build's folder."""
    for folder in (destination, *(destination / n for n in ("index", ENERGON_FOLDER))):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    for name in file_names(destination):
        (destination / name).unlink()
    for file in (destination / BUILD_FOLDER).iterdir():
        if file.name != keep:
            file.unlink()


def finish(
    destination: Path,
    parts: Sequence[Part],
    *,
    info: dict[str, Any],
    tokenizer_sha256: str,
    records_per_batch: int,
    records_per_shard: int,
    source: Source | None = None,
) -> DatasetInfo:
    """Write everything but the shards, the manifest last.

    Raises ValueError if there is no record, or if two have one key, naming both places.
    """
    filled = [part for part in parts if part.num_records]
    if not filled:
        raise ValueError(f"{destination}: there are no records to write, expected at least one")
    _check_keys(destination, filled, records_per_shard=records_per_shard, source=source)
    fingerprint = _write_record_index(destination, filled)
    _write_batch_index(destination, filled)
    _write_rejected(destination, parts)
    _write_energon_metadata(destination, filled)
    known = {shard_name(part.shard): part for part in filled}
    files = [_file_entry(destination, name, known.get(name)) for name in file_names(destination)]
    written = DatasetInfo(
        count=sum(part.num_records for part in filled),
        num_batches=sum(len(part.batches) for part in filled),
        num_shards=len(filled),
        records_per_batch=records_per_batch,
        records_per_shard=records_per_shard,
        bytes=sum(entry["bytes"] for entry in files),
        tokenizer_sha256=tokenizer_sha256,
        fingerprint=fingerprint,
        info=info,
    )
    manifest = {"schema_version": SCHEMA_VERSION, **asdict(written), "files": files}
    write_atomic(destination / MANIFEST_NAME, _json_bytes(manifest))
    remove_build(destination)
    return written


def duplicate_in_shard(
    error: DuplicateKeyError, *, first_row: int, source: Source | None = None
) -> ValueError:
    """Return the error that names both places; `first_row` is that of the shard, in its source."""
    first, second = (first_row + row for row in error.rows)
    places = f"records {first} and {second}"
    if source is not None:
        places = f"{source.where(first)} and {source.where(second)}"
    return ValueError(f"key {error.key!r} occurs twice, in {places}: {_KEY_ADVICE}")


def _check_keys(
    destination: Path, parts: Sequence[Part], *, records_per_shard: int, source: Source | None
) -> None:
    found = find_duplicate(destination, parts)
    if found is not None:
        raise duplicate_between(
            found, destination, parts, records_per_shard=records_per_shard, source=source
        )


def duplicate_between(
    found: Duplicate,
    destination: Path,
    parts: Sequence[Part],
    *,
    records_per_shard: int,
    source: Source | None,
) -> ValueError:
    """Return the error that names both places; `parts` are those that have records."""

    def name(place: Place) -> str:
        if source is None:
            before = sum(part.num_records for part in parts if part.shard < place.shard)
            return str(before + place.record)
        with open_part(destination, place.shard) as table:
            row = table.column("source_row")[place.record].as_py()
        return source.where(place.shard * records_per_shard + row)

    places = f"{name(found.first)} and {name(found.second)}"
    if source is None:
        places = f"records {places}"
    return ValueError(f"key {found.key!r} occurs twice, in {places}: {_KEY_ADVICE}")


def _write_record_index(destination: Path, parts: Sequence[Part]) -> str:
    """Write the index of records, and return its fingerprint."""
    digest = hashlib.sha256()
    with (
        durable_file(destination / RECORD_INDEX) as file,
        pa.ipc.new_file(file, RECORD_INDEX_SCHEMA) as writer,
    ):
        for rows in _index_rows(destination, parts):
            digest.update(rows.column("crc32").to_numpy().astype("<u4").tobytes())
            writer.write_table(rows)
    return digest.hexdigest()


def _index_rows(destination: Path, parts: Sequence[Part]) -> Iterator[pa.Table]:
    batches_before = 0
    for part in parts:
        with open_part(destination, part.shard) as table:
            batch = table.column("batch").to_numpy() + np.int32(batches_before)
            columns = {name: table.column(name) for name in table.column_names}
            columns["shard"] = pa.array(np.full(part.num_records, part.shard, dtype=np.int32))
            columns["batch"] = pa.array(batch)
            yield pa.table(
                [columns[name] for name in RECORD_INDEX_SCHEMA.names], RECORD_INDEX_SCHEMA
            )
        batches_before += len(part.batches)


def _write_batch_index(destination: Path, parts: Sequence[Part]) -> None:
    rows = [{"shard": part.shard, **batch} for part in parts for batch in part.batches]
    table = pa.Table.from_pylist(rows, schema=BATCH_INDEX_SCHEMA)
    with (
        durable_file(destination / BATCH_INDEX) as file,
        pa.ipc.new_file(file, BATCH_INDEX_SCHEMA) as writer,
    ):
        writer.write_table(table)


def _write_rejected(destination: Path, parts: Sequence[Part]) -> None:
    """Write one line for each row that became no record; no file if there is none."""
    if not any(part.rejected for part in parts):
        return
    with durable_file(destination / REJECTED_LIST) as file:
        for part in parts:
            for row in part.rejected:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _write_energon_metadata(destination: Path, parts: Sequence[Part]) -> None:
    """Write what energon's get_train_dataset needs; every split part is the whole data set."""
    counts = {shard_name(part.shard): part.num_records for part in parts}
    split_parts = {"split_parts": {name: list(counts) for name in ("train", "val", "test")}}
    factory = {"__module__": "cocoa_dist.data.loader", "__class__": "ArrowDatasetFactory"}
    contents: dict[str, dict[str, Any]] = {  # JSON is YAML
        ".info.json": {"energon_version": ENERGON_VERSION, "shard_counts": counts},
        "split.yaml": {**split_parts, "exclude": []},
        "dataset.yaml": factory,
    }
    for name, content in contents.items():
        write_atomic(destination / ENERGON_FOLDER / name, _json_bytes(content))


def _file_entry(destination: Path, name: str, part: Part | None) -> dict[str, Any]:
    if part is not None:
        return {"path": name, "bytes": part.bytes, "sha256": part.sha256}
    file = destination / name
    return {"path": name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
