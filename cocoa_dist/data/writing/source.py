"""What the builder asks of a collection: rows by number, so that any process can make any shard.

A source is pickled to every writer process and opens its files there. It knows nothing of shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cocoa_dist.data.records import Record


@dataclass(frozen=True)
class Rejected:
    """A row that cannot become a record; it is listed and counted, and the build goes on."""

    where: str  # file and row, for people
    reason: str


@dataclass(frozen=True)
class SourceRow:
    """One row as its file has it."""

    where: str  # file and row, for people
    key: str  # of this row if none of its columns is the key; unique in its source
    group: str  # name of the folder of its file, which some collections use as the task
    folder: Path  # relative picture paths start here
    values: dict[str, Any]  # by column


class Table(Protocol):
    """Rows of files, by number, from 0."""

    def __len__(self) -> int:
        """Return the number of rows, those included that cannot be read."""

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop). Raises ValueError if a file is damaged."""

    def where(self, number: int) -> str:
        """Return file and row of row `number`, for people."""

    @property
    def stamp(self) -> list[Any]:
        """What tells whether the files have changed: names, sizes, times; JSON values."""


class Source(Protocol):
    """Records of one collection, by row number, from 0."""

    def __len__(self) -> int:
        """Return the number of rows, those included that cannot become a record."""

    def rows(self, start: int, stop: int) -> Iterator[Record | Rejected]:
        """Yield what the rows of [start, stop) become. Raises ValueError if a file is damaged."""

    def where(self, number: int) -> str:
        """Return file and row of row `number`, for people."""

    @property
    def stamp(self) -> list[Any]:
        """What tells whether files or settings have changed; JSON values."""
