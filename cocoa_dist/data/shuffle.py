"""The order of the records of a pass: a pure function of the position, with nothing kept.

Small data sets are shuffled as a whole. Large ones are shuffled as disks like it: blocks of
neighbours are drawn in a random order, and records are shuffled among the blocks of a window, so
that a window reads its blocks and no others. The blocks of a window lie in lanes, and positions go
through the lanes in turn: a node that owns some lanes finds its share of every batch in them.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_FEISTEL_ROUNDS = 6
NO_LANE = -1  # of a record that is not read in a block


@dataclass(frozen=True)
class Shuffle:
    """How far apart neighbours of a pass may lie on disk. Raises ValueError for odd numbers."""

    block_records: int = 64  # that are read together
    window_blocks: int = 960
    lanes: int = 48  # numbers of nodes that divide it read no block twice

    def __post_init__(self) -> None:
        if min(self.block_records, self.window_blocks, self.lanes) < 1:
            raise ValueError(f"{self}: expected numbers from 1 on")
        if self.window_blocks % self.lanes:
            raise ValueError(
                f"{self.window_blocks} blocks in a window cannot be dealt to {self.lanes} lanes: "
                "give a multiple"
            )

    @property
    def window_records(self) -> int:
        """Records of a window; a data set that has no more is shuffled as a whole."""
        return self.block_records * self.window_blocks


@dataclass(frozen=True)
class _Stretch:
    """Windows of one shape, one after the other, within a pass of a large data set."""

    begin: int  # position in the pass
    window: int  # records
    first_block: int  # in drawing order
    blocks_per_lane: int


def records_at(offsets: Ints, *, size: int, key: str, shuffle: Shuffle) -> Ints:
    """Return the records at `offsets` of a pass over `size` records; one to one.

    `key` names the pass: every other one has another order.
    """
    if size <= shuffle.window_records:
        return permute(offsets, size=size, key=key)
    records = np.empty(len(offsets), dtype=np.int64)
    rest = _rest_begin(size, shuffle)
    for stretch, inside in _stretches(offsets, size, shuffle):
        records[inside] = _in_windows(
            offsets[inside] - stretch.begin, stretch, size=size, key=key, shuffle=shuffle
        )
    last = offsets >= rest.begin
    if last.any():  # fewer blocks than lanes, and records that fill no block
        among = permute(offsets[last] - rest.begin, size=size - rest.begin, key=f"{key}/rest")
        records[last] = _in_blocks(
            among, rest.first_block, size=size, key=key, block_records=shuffle.block_records
        )
    return records


def lanes_at(offsets: Ints, *, size: int, shuffle: Shuffle) -> Ints:
    """Return the lane that the record at each offset is read in, or NO_LANE."""
    if size <= shuffle.window_records:
        return np.full(len(offsets), NO_LANE)
    rest = _rest_begin(size, shuffle)
    lanes = offsets % shuffle.lanes  # windows are multiples of it
    return np.where(offsets < rest.begin, lanes, NO_LANE)


def permute(values: Ints, *, size: int, key: str, streams: Ints | None = None) -> Ints:
    """Map values of [0, size) one to one onto [0, size), differently for every key and stream.

    A Feistel network over the next even power of two; what falls outside walks on until it falls
    inside (cycle walking, Black and Rogaway 2002). Needs no table. `streams`: one number for each
    value; values of one stream are permuted among themselves.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
    keys: NDArray[np.uint64] = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    rounds = keys[:, None]
    if streams is not None:
        rounds = keys[:, None] ^ _mix(streams.astype(np.uint64))[None]
    result = np.asarray(values, dtype=np.uint64).copy()
    outside = np.ones(len(result), dtype=np.bool_)
    while outside.any():
        chosen = rounds if streams is None else rounds[:, outside]
        result[outside] = _feistel(result[outside], half=half, rounds=chosen)
        outside = result >= size
    return result.astype(np.int64)


def _stretches(
    offsets: Ints, size: int, shuffle: Shuffle
) -> list[tuple[_Stretch, NDArray[np.bool_]]]:
    """Return the stretches that some of the offsets lie in, and which ones do."""
    blocks = size // shuffle.block_records
    whole = blocks // shuffle.window_blocks
    left = blocks - whole * shuffle.window_blocks
    full = _Stretch(0, shuffle.window_records, 0, shuffle.window_blocks // shuffle.lanes)
    begin = whole * shuffle.window_records
    per_lane = left // shuffle.lanes
    short_records = per_lane * shuffle.lanes * shuffle.block_records
    short = _Stretch(begin, short_records, whole * shuffle.window_blocks, per_lane)
    found = [
        (full, offsets < begin),
        (short, (offsets >= begin) & (offsets < begin + short_records)),
    ]
    return [(stretch, inside) for stretch, inside in found if inside.any()]


def _rest_begin(size: int, shuffle: Shuffle) -> _Stretch:
    """Return what is left of a pass behind all windows: less than a block for every lane."""
    rounds = size // (shuffle.block_records * shuffle.lanes)
    blocks = rounds * shuffle.lanes
    return _Stretch(blocks * shuffle.block_records, 0, blocks, 0)


def _in_windows(offsets: Ints, stretch: _Stretch, *, size: int, key: str, shuffle: Shuffle) -> Ints:
    window, place = np.divmod(offsets, stretch.window)
    turn, lane = np.divmod(place, shuffle.lanes)
    streams = (stretch.first_block + window) * shuffle.lanes + lane
    of_lane = stretch.blocks_per_lane * shuffle.block_records
    among = permute(turn, size=of_lane, key=f"{key}/window", streams=streams)
    drawn = stretch.first_block + window * (stretch.blocks_per_lane * shuffle.lanes)
    first = (drawn + lane * stretch.blocks_per_lane) * shuffle.block_records
    return _blocks_to_records(
        first + among, size=size, key=key, block_records=shuffle.block_records
    )


def _in_blocks(among: Ints, first_block: int, *, size: int, key: str, block_records: int) -> Ints:
    return _blocks_to_records(
        first_block * block_records + among, size=size, key=key, block_records=block_records
    )


def _blocks_to_records(places: Ints, *, size: int, key: str, block_records: int) -> Ints:
    """Turn places in drawing order into records; those behind the last whole block stay."""
    drawn, row = np.divmod(places, block_records)
    blocks = size // block_records
    inside = drawn < blocks
    number = drawn.copy()
    number[inside] = permute(drawn[inside], size=blocks, key=f"{key}/blocks")
    return number * block_records + row


def _feistel(
    values: NDArray[np.uint64], *, half: int, rounds: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & low
    for key in rounds:
        left, right = right, left ^ (_mix(right + key) & low)
    joined: NDArray[np.uint64] = (left << shift) | right
    return joined


def _mix(values: NDArray[Any]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele et al. 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
