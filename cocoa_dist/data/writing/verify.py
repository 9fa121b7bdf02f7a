"""Is a data set what was written? Every byte, every record, every count, by several processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cocoa_dist.data.records import Record, from_row
from cocoa_dist.data.shard_format import read_manifest
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.writing.shard_file import count_text_tokens, indexed_sizes, key_hash
from cocoa_dist.data.writing.tokens import TokenCounter
from cocoa_dist.manifest import sha256_file

_CACHE_BYTES = 2**20  # records are read in order: one batch is enough
MOST_PROBLEMS = 100  # named; all are counted


@dataclass(frozen=True)
class VerifyReport:
    """What a check of all records found; no problem means: it is what was written."""

    records: int
    files: int
    bytes: int
    tokens_counted_again: bool
    num_problems: int
    problems: tuple[str, ...]  # the first MOST_PROBLEMS, each naming file or record


@dataclass(frozen=True)
class _Found:
    """What was found in some of the records."""

    records: int
    problems: list[str]
    hashes: NDArray[np.uint64]  # of keys


def verify_dataset(
    path: Path,
    *,
    tokenizer: Path | None = None,
    processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Compare files with the manifest, and records with their checksums and the index.

    Tokens are counted again if `tokenizer` is the one that counted them. `on_progress` is told
    records done and all. Raises ValueError if there is no data set, or a file is missing.
    """
    manifest = read_manifest(path)
    problems = [
        f"{entry['path']} has sha256 {sha256[:12]}..., expected {entry['sha256'][:12]}..."
        for entry in manifest["files"]
        if (path / entry["path"]).is_file()
        and (sha256 := sha256_file(path / entry["path"])) != entry["sha256"]
    ]
    reader = ShardReader(path, cache_bytes=_CACHE_BYTES)
    counter = _counter(reader, tokenizer, problems)
    hashes = []
    done = 0
    for found in _check_all(reader, counter, processes):
        problems += found.problems
        hashes.append(found.hashes)
        done += found.records
        on_progress(done, len(reader))
    problems += _twice(np.concatenate(hashes))
    reader.close()
    return VerifyReport(
        records=done,
        files=len(manifest["files"]),
        bytes=reader.info.bytes,
        tokens_counted_again=counter is not None,
        num_problems=len(problems),
        problems=tuple(problems[:MOST_PROBLEMS]),
    )


def _counter(
    reader: ShardReader, tokenizer: Path | None, problems: list[str]
) -> TokenCounter | None:
    """Return what counts tokens, if it is what counted them; another one is a problem."""
    if tokenizer is None:
        return None
    counter = TokenCounter(tokenizer)
    if counter.sha256 == reader.info.tokenizer_sha256:
        return counter
    known = reader.info.tokenizer_sha256[:12] or "no tokenizer"
    problems.append(f"tokens were counted with {known}, {tokenizer} is {counter.sha256[:12]}")
    return None


def _check_all(
    reader: ShardReader, counter: TokenCounter | None, processes: int
) -> Iterator[_Found]:
    ranges = reader.shard_ranges()
    if processes == 1 or len(ranges) == 1:
        for start, stop in ranges:
            yield _check_records(reader, counter, start, stop)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(ranges)), mp_context=context) as executor:
        waiting = [
            executor.submit(_check_records, reader, counter, start, stop) for start, stop in ranges
        ]
        for future in as_completed(waiting):
            yield future.result()


def _check_records(
    reader: ShardReader, counter: TokenCounter | None, start: int, stop: int
) -> _Found:
    problems: list[str] = []
    hashes = []
    kept: dict[int, dict[str, Any]] = {}
    for number in range(start, stop):
        try:
            record = reader.record(number)
            same = from_row(_columns(reader, number, kept)) == record
        except (ValueError, OSError, pa.ArrowException) as error:
            problems.append(str(error))
            continue
        hashes.append(key_hash(record.key))
        if not same:
            problems.append(f"record {number} ({record.key!r}): its columns are not its header's")
        problems += [
            f"record {number} ({record.key!r}): {problem}"
            for problem in _against_index(reader, number, record, counter)
        ]
    return _Found(stop - start, problems, np.array(hashes, dtype=np.uint64))


def _columns(reader: ShardReader, number: int, kept: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return what the columns for other programs say of a record; `kept`: those of its batch."""
    if number not in kept:
        batch, row = reader.columns_of(number)
        kept.clear()
        kept.update(enumerate(batch.to_pylist(), start=number - row))
    return kept[number]


def _against_index(
    reader: ShardReader, number: int, record: Record, counter: TokenCounter | None
) -> Iterator[str]:
    sizes, indexed = indexed_sizes(record), reader.image_sizes(number)
    if tuple(sizes) != indexed:
        yield f"pictures are {tuple(sizes)}, the index has {indexed}"
    if counter is not None:
        found = count_text_tokens(record, count_tokens=counter)
        if found != reader.num_text_tokens[number]:
            yield f"texts have {found} tokens, the index has {reader.num_text_tokens[number]}"


def _twice(hashes: NDArray[np.uint64]) -> list[str]:
    ordered = np.sort(hashes)
    twice = int((ordered[1:] == ordered[:-1]).sum())
    return [f"{twice} keys occur more than once"] if twice else []
