"""How long a record can be, for every record of a large data set: worked out once, then mapped.

The plan has to know lengths before anything is read. For a small data set its records say; for a
large one the index does, and the bounds lie in a file that all processes of a machine share.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.manifest import temporary_name, write_atomic

log = logging.getLogger("cocoa_dist.data")

Ints = NDArray[np.int32]
PictureCost = Callable[[tuple[int, int]], tuple[int, int]]  # (height, width) -> tokens, patches

BOUNDS_VERSION = 1  # a change that gives any record another bound raises it
TWO_TEXTS = ("bridged", "dialogue", "questions")  # views with a limit for context and for target
_ABANDONED_SECONDS = 3600.0  # a writer touches its file every second
_CHUNK = 2**20  # records worked on at once


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of all records, and which records are the largest."""

    tokens: NDArray[Any]  # (records,)
    patches: NDArray[Any]  # (records,)
    largest: tuple[int, int]  # records with the most tokens, and the most patches

    @staticmethod
    def of(tokens: NDArray[Any], patches: NDArray[Any]) -> "Bounds":
        """Find the largest records."""
        return Bounds(tokens, patches, (int(tokens.argmax()), int(patches.argmax())))


@dataclass(frozen=True)
class IndexColumns:
    """What the index of a data set says of its records."""

    num_text_tokens: NDArray[np.int32]  # (records,); negative: not counted
    heights: NDArray[np.int32]  # (pictures,) of all records, one after the other
    widths: NDArray[np.int32]
    first_picture: NDArray[Any]  # (records + 1,): a record's pictures are [first, next first)


def index_bounds(
    columns: IndexColumns,
    *,
    view: str,
    max_text_tokens: int,
    picture_cost: PictureCost,
    joint_every: int = 1,
    instruction: int = 0,
    ends: int = 2,
    uncounted: int = 0,
    negatives: int = 0,
    negative_ends: int = 1,
) -> tuple[Ints, Ints]:
    """Return upper bounds of (tokens, patches) of every record, from the index alone.

    Each bound is what `packing.length_bound` gives without the record. `joint_every`, `instruction`
    (tokens) and `negatives` are of pairs, whose texts are joined. `ends`: tokens beside pictures
    and texts, without those of negatives. `uncounted`: tokens that the index does not know of.
    """
    tokens, patches = _picture_sums(columns, picture_cost)
    counted, limit = columns.num_text_tokens, np.int32(max_text_tokens)
    if view == "pair":
        most = np.where(counted >= 0, counted + counted // joint_every, limit)
        text = np.minimum(most + np.int32(instruction), limit) + np.minimum(most, limit)
        text = text + negatives * (np.minimum(most, limit) + negative_ends)
    else:
        longest = 2 * limit if view in TWO_TEXTS else limit
        text = np.where(counted >= 0, np.minimum(counted + np.int32(uncounted), longest), longest)
    return tokens + text.astype(np.int32) + np.int32(ends), patches


def mapped_bounds(
    folder: Path, *, count: int, key: str, part: Callable[[int, int], tuple[Ints, Ints]]
) -> Bounds:
    """Return bounds from a file of `folder`, which is made first if it is not there.

    `part(begin, end)` works out those of some records; `key` says all that they depend on. Safe if
    several processes come here at once: each makes the same file and moves it into place.
    """
    name = hashlib.blake2b(f"{count}/{key}".encode(), digest_size=12).hexdigest()
    note, file = folder / f"bounds-{name}.json", folder / f"bounds-{name}.npy"
    if not (note.is_file() and file.is_file()):
        log.info("working out the lengths of %d records, once", count)
        _collect(folder)
        _make(file, note, count=count, part=part)
    values = np.load(file, mmap_mode="r")
    first, second = json.loads(note.read_text())["largest"]
    return Bounds(values[0], values[1], (int(first), int(second)))


def _make(
    file: Path, note: Path, *, count: int, part: Callable[[int, int], tuple[Ints, Ints]]
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(file)
    with temporary.open("wb") as held:  # locked while somebody is at work on it
        _lock(held)
        try:
            largest = _write(temporary, count=count, part=part)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    write_atomic(note, json.dumps({"count": count, "largest": largest}).encode())


def _write(
    temporary: Path, *, count: int, part: Callable[[int, int], tuple[Ints, Ints]]
) -> list[int]:
    """Write the bounds of all records; return which records are the largest."""
    values = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=(2, count))
    largest, most = [0, 0], [-1, -1]
    for begin in range(0, count, _CHUNK):
        end = min(begin + _CHUNK, count)
        for unit, bounds in enumerate(part(begin, end)):
            values[unit, begin:end] = bounds
            top = int(bounds.argmax())
            if bounds[top] > most[unit]:
                largest[unit], most[unit] = begin + top, int(bounds[top])
    values.flush()
    return largest


def _collect(folder: Path) -> None:
    """Remove what killed processes left behind: nobody holds it, nor has touched it for long.

    Both are asked, as not every file system knows the locks of other machines; where locks cannot
    be had at all, nothing is removed. Never raises for what another process does meanwhile.
    """
    for leftover in folder.glob(".bounds-*.tmp"):
        with contextlib.suppress(OSError), leftover.open("r+b") as file:
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS and _lock(file):
                leftover.unlink()


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False if somebody else has, or if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _picture_sums(columns: IndexColumns, picture_cost: PictureCost) -> tuple[Ints, Ints]:
    """Return what the pictures of each record take; equal sizes are worked out once."""
    packed = columns.heights.astype(np.int64) << 32 | columns.widths.astype(np.int64)
    sizes, which = np.unique(packed, return_inverse=True)
    costs = [picture_cost((int(size >> 32), int(size & 0xFFFFFFFF))) for size in sizes]
    cost = np.array(costs, dtype=np.int64).reshape(-1, 2)[which]
    running = np.concatenate([np.zeros((1, 2), dtype=np.int64), np.cumsum(cost, axis=0)])
    first = columns.first_picture
    sums = (running[first[1:]] - running[first[:-1]]).astype(np.int32)
    return sums[:, 0], sums[:, 1]
