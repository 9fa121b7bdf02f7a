"""Where the pictures come from, one a row, and how a picture is sent.

What is sent is what training would see: decoded, upright, transparency over white, shrunk by
Qwen2-VL's rule, and encoded anew, so that neither place nor camera leave the house with it.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from cocoa_dist.data.images import decode_image, picture_format, smart_size
from cocoa_dist.data.records import Record, Side, side_texts
from cocoa_dist.data.shard_format import MANIFEST_NAME
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.writing.layouts import CARRIED, Layout, LayoutSource
from cocoa_dist.data.writing.open import open_table
from cocoa_dist.data.writing.source import Rejected, Source

# Of the source's meta; keywords would be taken for the new record's own.
_KEPT = tuple(name for name in CARRIED if name not in ("keywords", "language"))
_FACTOR = 28  # pixels: sides of a shrunken picture are multiples, as Qwen2-VL's tokens are
_PIXELS_PER_TOKEN = _FACTOR**2
_MAX_BYTES = 4 * 2**20  # of a lossless picture; a larger one is sent as JPEG
_JPEG_QUALITY = 92
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Unit:
    """One picture to write about."""

    row: int  # of the source
    key: str
    where: str  # file and row, for people
    picture: bytes = field(repr=False)  # as the source has it
    caption: str = ""
    meta: dict[str, Any] = field(default_factory=dict)  # where it is from, and who made it


@dataclass(frozen=True)
class RejectedUnit:
    """A row of the source that has no picture."""

    row: int
    key: str
    reason: str


@dataclass(frozen=True)
class ShardSource:
    """The records of a data set of shards, as a source."""

    path: Path
    reader: ShardReader

    def __len__(self) -> int:
        return len(self.reader)

    def rows(self, start: int, stop: int) -> Iterator[Record | Rejected]:
        """Yield the records of [start, stop), damaged ones as rejected rows."""
        for number in range(start, stop):
            try:
                yield self.reader.record(number)
            except ValueError as error:
                yield Rejected(self.where(number), f"record is damaged: {error}")

    def where(self, number: int) -> str:
        """Return shard and row, for people."""
        location = self.reader.location(number)
        return f"{self.path}/{location.shard} row {location.row}"

    @property
    def stamp(self) -> list[Any]:
        """The fingerprint over all records."""
        return [self.reader.fingerprint]


def open_source(paths: list[Path], layout: Layout) -> Source:
    """Open one data set of shards, or whatever tables and folders `build_shards` reads."""
    if len(paths) == 1 and (paths[0] / MANIFEST_NAME).is_file():
        return ShardSource(paths[0], ShardReader(paths[0]))
    return LayoutSource.of(open_table(paths), layout)


def units(source: Source, start: int, stop: int) -> Iterator[Unit | RejectedUnit]:
    """Yield what is to be written about in the rows of [start, stop)."""
    for number, found in enumerate(source.rows(start, stop), start):
        if isinstance(found, Rejected):
            yield RejectedUnit(number, found.where, found.reason)
            continue
        place = _first_picture(found)
        if place is None:
            yield RejectedUnit(number, found.key, "picture is missing: the record has none")
            continue
        meta = {name: found.meta[name] for name in _KEPT if name in found.meta}
        texts = side_texts(found.query) or side_texts(found.target)
        yield Unit(
            number, found.key, source.where(number), found.images[place], " ".join(texts), meta
        )


def picture_digest(data: bytes) -> str:
    """Return 32 hex digits that pictures share if and only if they are the same file."""
    return blake2b(data, digest_size=16).hexdigest()


def _first_picture(record: Record) -> int | None:
    """Return the first picture of the query, else of a positive: the one the record is about."""
    sides: tuple[Side, ...] = (record.query, *record.positives)
    return next((p.image for side in sides for p in side if p.kind == "image"), None)


@dataclass(frozen=True)
class SentPicture:
    """A picture as it is sent."""

    mime: str
    data: bytes = field(repr=False)
    height: int  # pixels
    width: int

    @property
    def url(self) -> str:
        """The picture in a data URL."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def tokens(self) -> int:
        """Visual tokens, by Qwen2-VL's rule; other models count otherwise, for an estimate."""
        return -(-self.height * self.width // _PIXELS_PER_TOKEN)


def sent_picture(data: bytes, *, max_pixels: int, max_decoded_pixels: int) -> SentPicture:
    """Return a picture ready to be sent, of at most about `max_pixels`.

    Raises ValueError, as training would, for a picture that cannot be used.
    """
    pixels = decode_image(data, max_pixels=max_decoded_pixels)
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    if height * width > max_pixels:
        height, width = smart_size(
            height, width, factor=_FACTOR, min_pixels=1, max_pixels=max_pixels
        )
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if picture_format(data) in _LOSSLESS:
        picture.save(file, "PNG", compress_level=1)
        if file.tell() <= _MAX_BYTES:
            return SentPicture("image/png", file.getvalue(), height, width)
        file = io.BytesIO()
    picture.save(file, "JPEG", quality=_JPEG_QUALITY)
    return SentPicture("image/jpeg", file.getvalue(), height, width)
