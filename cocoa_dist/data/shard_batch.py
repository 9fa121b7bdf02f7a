"""One record batch of a shard as training reads it: where each record's bytes lie, and no Arrow.

The writer notes where Arrow has put the buffers of `header`, `meta` and `images`, which lie
together at the front of the message. The reader takes headers and offsets of a batch in one read
(its head), then one record's pictures in another, or all of them at once where reads are dear.
"""

from typing import NamedTuple

import pyarrow as pa

from cocoa_dist.data.checksum import crc32
from cocoa_dist.data.records import joined_header


class BatchPlace(NamedTuple):
    """Where the buffers of one message begin, in bytes from its start."""

    header_offsets: int  # int32 (n + 1,)
    header_data: int
    meta_offsets: int  # int32 (n + 1,)
    meta_data: int
    picture_counts: int  # int32 (n + 1,): a record's pictures are [here, next)
    picture_offsets: int  # int64 (pictures + 1,)
    picture_data: int
    picture_bytes: int
    head_crc32: int  # over [header_offsets, picture_data)


def find_places(message: pa.Buffer, schema: pa.Schema) -> BatchPlace:
    """Return where the buffers of an uncompressed record batch message lie."""
    batch = pa.ipc.read_record_batch(message, schema)
    _, header_offsets, header_data = batch.column("header").buffers()
    _, meta_offsets, meta_data = batch.column("meta").buffers()
    _, picture_counts, _, picture_offsets, picture_data = batch.column("images").buffers()

    def place(buffer: pa.Buffer | None) -> int:
        return int(buffer.address - message.address) if buffer else end

    end = message.size
    end = place(picture_data)
    begin = place(header_offsets)
    count = len(batch.column("images").values)
    return BatchPlace(
        header_offsets=begin,
        header_data=place(header_data),
        meta_offsets=place(meta_offsets),
        meta_data=place(meta_data),
        picture_counts=place(picture_counts),
        picture_offsets=place(picture_offsets),
        picture_data=end,
        picture_bytes=memoryview(picture_offsets).cast("q")[count] if count else 0,
        head_crc32=crc32(message.slice(begin, end - begin)),
    )


class ShardBatch:
    """The head of a batch, and its pictures if they were read with it."""

    __slots__ = (
        "_counts",
        "_crc32",
        "_data",
        "_header_data",
        "_headers",
        "_intact",
        "_limit",
        "_meta",
        "_meta_data",
        "_offsets",
        "_pictures",
        "first_picture",
        "is_whole",
        "name",
        "num_bytes",
        "reads",
    )

    def __init__(
        self, data: bytes, place: BatchPlace, *, name: str, offset: int, rows: int
    ) -> None:
        """Take the message's bytes from `header_offsets` on; it begins at `offset` of `name`."""
        start = place.header_offsets
        view = memoryview(data)
        counts, offsets = place.picture_counts - start, place.picture_offsets - start
        meta = place.meta_offsets - start
        self._data = data
        self._header_data = place.header_data - start
        self._meta_data = place.meta_data - start
        self._pictures = place.picture_data - start
        self._limit = place.picture_bytes
        self._headers = view[: 4 * (rows + 1)].cast("i")
        self._meta = view[meta : meta + 4 * (rows + 1)].cast("i")
        self._counts = view[counts : counts + 4 * (rows + 1)].cast("i")
        self._offsets = view[offsets : offsets + (self._pictures - offsets) // 8 * 8].cast("q")
        self.is_whole = len(data) >= self._pictures + self._limit  # pictures included
        self._crc32 = place.head_crc32
        self._intact: bool | None = None  # not looked at yet
        self.name = name
        self.first_picture = offset + place.picture_data  # in the file
        self.num_bytes = len(data)
        self.reads = 0  # of pictures one by one

    def is_intact(self) -> bool:
        """Whether headers and offsets are those that were written; looks at all, once."""
        if self._intact is None:
            self._intact = crc32(memoryview(self._data)[: self._pictures]) == self._crc32
        return self._intact

    def header(self, row: int) -> bytes:
        """Return the header of a record. Raises ValueError if its place makes no sense."""
        begin, end = self._headers[row], self._headers[row + 1]
        first, last = self._meta[row], self._meta[row + 1]
        if not 0 <= begin <= end <= self._pictures or not 0 <= first <= last <= self._pictures:
            raise ValueError(f"its header is said to be at {begin} to {end}, {first} to {last}")
        data, start, meta = self._data, self._header_data, self._meta_data
        return joined_header(data[start + begin : start + end], data[meta + first : meta + last])

    def extent(self, row: int) -> tuple[int, int]:
        """Return where a record's pictures begin and end, from the batch's first picture on.

        Raises ValueError if the place makes no sense.
        """
        first, last = self._counts[row], self._counts[row + 1]
        if first == last:
            return 0, 0
        try:
            begin, end = self._offsets[first], self._offsets[last]
        except IndexError:
            raise ValueError(f"its pictures are said to be {first} to {last}") from None
        if not 0 <= begin <= end <= self._limit or first < 0:
            raise ValueError(f"its pictures are said to be at {begin} to {end}")
        return begin, end

    def pictures(self, begin: int, end: int) -> bytes:
        """Return the bytes between two places, of a batch that was read whole."""
        return self._data[self._pictures + begin : self._pictures + end]
