"""Rows of JSONL, JSON, CSV, Parquet and Arrow files by number, and of several files as one.

Text files are scanned once for where some of their rows begin, so that any row is near a known
place; memory does not grow with the files, JSON arrays aside. Nothing is executed or fetched.
"""

import bisect
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa_dist.data.writing.source import Rejected, SourceRow, Table

_EVERY = 256  # rows between two known places of a text file
_ROWS_AT_A_TIME = 32  # of a Parquet or Arrow file, in memory
_FIELD_LIMIT = 2**30  # bytes of one CSV field


@dataclass(frozen=True)
class FileTable:
    """What all tables of one file share: its name, and how its rows are made."""

    path: Path
    label: str  # how people and keys name the file; unique in a source

    def where(self, number: int) -> str:
        """Return file and row of row `number`, for people."""
        return f"{self.path} row {number}"

    @property
    def stamp(self) -> list[Any]:
        """Name, size and time of the file."""
        status = self.path.stat()
        return [self.label, status.st_size, status.st_mtime_ns]

    def _row(self, number: int, values: Any) -> SourceRow | Rejected:
        if not isinstance(values, dict):
            kind = type(values).__name__
            return Rejected(self.where(number), f"row is no object: found {kind}")
        return SourceRow(
            where=self.where(number),
            key=f"{self.label}:{number}",
            group=self.path.absolute().parent.name,
            folder=self.path.parent,
            values=values,
        )


@dataclass(frozen=True)
class JsonlTable(FileTable):
    """One JSON object a line; empty lines do not count."""

    count: int
    places: tuple[int, ...] = field(repr=False)  # offset of every _EVERY-th row

    @classmethod
    def open(cls, path: Path, label: str) -> "JsonlTable":
        """Scan the file for its lines."""
        places, count = [], 0
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    if count % _EVERY == 0:
                        places.append(offset)
                    count += 1
                offset += len(line)
        return cls(path, label, count, tuple(places))

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop); a line that is no JSON is a rejected one."""
        if start >= stop:
            return
        with self.path.open("rb") as file:
            place, ahead = divmod(start, _EVERY)
            file.seek(self.places[place])
            lines = (line for line in file if line.strip())
            for number, line in enumerate(islice(lines, ahead, ahead + stop - start), start):
                try:
                    values = json.loads(line)
                except ValueError as error:
                    yield Rejected(self.where(number), f"line is no JSON: {error}")
                else:
                    yield self._row(number, values)


@dataclass(frozen=True)
class JsonTable(FileTable):
    """One JSON array of objects. It is read whole in every process: prefer JSONL for large ones."""

    count: int

    @classmethod
    def open(cls, path: Path, label: str) -> "JsonTable":
        """Count the objects. Raises ValueError if the file is not one array."""
        return cls(path, label, len(_read_array(path)))

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop)."""
        for number, values in enumerate(_read_array(self.path)[start:stop], start):
            yield self._row(number, values)


def _read_array(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); one object a line belongs into a .jsonl file"
        ) from error
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an array of objects")
    return content


@dataclass(frozen=True)
class CsvTable(FileTable):
    """Comma or tab separated values under a line with the columns; quotes may span lines."""

    count: int
    places: tuple[int, ...] = field(repr=False)
    columns: tuple[str, ...]
    delimiter: str

    @classmethod
    def open(cls, path: Path, label: str) -> "CsvTable":
        """Scan the file for its rows. Raises ValueError if it has no columns or is not UTF-8."""
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        places: list[int] = []
        count = 0
        with path.open("rb") as file:
            lines = _Lines(file, path)
            reader = _csv_rows(lines, path, delimiter)
            columns = next(reader, [])
            if not columns:
                raise ValueError(f"{path} is empty, expected a first line with column names")
            begin = lines.offset
            for row in reader:
                if row:
                    if count % _EVERY == 0:
                        places.append(begin)
                    count += 1
                begin = lines.offset
        return cls(path, label, count, tuple(places), tuple(columns), delimiter)

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop); one with other than all columns is a rejected one."""
        if start >= stop:
            return
        with self.path.open("rb") as file:
            place, ahead = divmod(start, _EVERY)
            file.seek(self.places[place])
            found = (row for row in _csv_rows(_Lines(file, self.path), self.path, self.delimiter))
            filled = (row for row in found if row)
            for number, row in enumerate(islice(filled, ahead, ahead + stop - start), start):
                if len(row) == len(self.columns):
                    yield self._row(number, dict(zip(self.columns, row, strict=True)))
                else:
                    counts = f"found {len(row)}, expected {len(self.columns)}"
                    yield Rejected(self.where(number), f"number of fields: {counts}")


class _Lines:
    """The lines of a UTF-8 file, and the offset of the next one."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.offset = file.tell()
        self._file, self._path = file, path

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            text = line[3:] if self.offset == 0 and line.startswith(b"\xef\xbb\xbf") else line
            try:
                decoded = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self._path}: the line at byte {self.offset} is not UTF-8 ({error.reason}); "
                    "convert the file"
                ) from error
            self.offset += len(line)
            yield decoded


def _csv_rows(lines: _Lines, path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(_FIELD_LIMIT)
    try:
        yield from csv.reader(iter(lines), delimiter=delimiter)
    except csv.Error as error:
        raise ValueError(f"{path} near byte {lines.offset} is not CSV: {error}") from error


@dataclass(frozen=True)
class ParquetTable(FileTable):
    """A Parquet file, as Hugging Face data sets have them."""

    groups: tuple[int, ...]  # rows of each row group

    @classmethod
    def open(cls, path: Path, label: str) -> "ParquetTable":
        """Read the footer. Raises ValueError if the file is no whole Parquet file."""
        with _arrow_errors(path, "Parquet"), pq.ParquetFile(path) as file:
            footer = file.metadata
            groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        return cls(path, label, tuple(groups))

    def __len__(self) -> int:
        return sum(self.groups)

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop), reading the row groups they lie in."""
        before = 0
        with _arrow_errors(self.path, "Parquet"), pq.ParquetFile(self.path) as file:
            for group, count in enumerate(self.groups):
                if before < stop and before + count > start:
                    batches = file.iter_batches(
                        batch_size=_ROWS_AT_A_TIME, row_groups=[group], use_threads=False
                    )
                    yield from self._of_batches(batches, before, start, stop)
                before += count

    def _of_batches(
        self, batches: Iterator[pa.RecordBatch], before: int, start: int, stop: int
    ) -> Iterator[SourceRow | Rejected]:
        for batch in batches:
            for number, values in _slice(batch, before, start, stop):
                yield self._row(number, values)
            before += batch.num_rows


@dataclass(frozen=True)
class ArrowTable(FileTable):
    """An Arrow IPC file, or a stream, which is what Hugging Face's `save_to_disk` writes."""

    batches: tuple[int, ...]  # rows of each record batch
    stream: bool

    @classmethod
    def open(cls, path: Path, label: str) -> "ArrowTable":
        """Read the sizes of the batches. Raises ValueError if the file is damaged."""
        with path.open("rb") as file:
            stream = file.read(6) != b"ARROW1"
        with _arrow_errors(path, "Arrow"):
            counts = [batch.num_rows for batch in _arrow_batches(path, stream=stream)]
        return cls(path, label, tuple(counts), stream)

    def __len__(self) -> int:
        return sum(self.batches)

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop); the file is mapped, other batches cost nothing."""
        before = 0
        with _arrow_errors(self.path, "Arrow"):
            for batch in _arrow_batches(self.path, stream=self.stream):
                if before >= stop:
                    return
                if before + batch.num_rows > start:
                    for number, values in _slice(batch, before, start, stop):
                        yield self._row(number, values)
                before += batch.num_rows


def _arrow_batches(path: Path, *, stream: bool) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        if stream:
            yield from pa.ipc.open_stream(file)
            return
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _slice(
    batch: pa.RecordBatch, before: int, start: int, stop: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, values) of the rows of [start, stop) in a batch that begins at `before`."""
    first, last = max(start - before, 0), min(stop - before, batch.num_rows)
    for place in range(first, last, _ROWS_AT_A_TIME):
        piece = batch.slice(place, min(_ROWS_AT_A_TIME, last - place))
        yield from enumerate(piece.to_pylist(), before + place)


class _arrow_errors:  # noqa: N801  # used like a function
    """Name the file in what Arrow raises."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError) and not isinstance(
            error, FileNotFoundError
        ):
            raise ValueError(
                f"{self._path} is not a whole {self._kind} file ({error}); fetch it again or leave "
                "it out"
            ) from error


@dataclass(frozen=True)
class JoinedTables:
    """Several tables, end to end."""

    tables: Sequence[Table]
    ends: tuple[int, ...]  # rows up to the end of each table

    @classmethod
    def of(cls, tables: Sequence[Table]) -> "JoinedTables":
        """Join tables."""
        return cls(tuple(tables), tuple(accumulate(map(len, tables))))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the rows of [start, stop)."""
        for table, end in zip(self.tables, self.ends, strict=True):
            begin = end - len(table)
            if begin < stop and end > start:
                yield from table.rows(max(start - begin, 0), min(stop, end) - begin)

    def where(self, number: int) -> str:
        """Return file and row of row `number`, for people."""
        place = bisect.bisect_right(self.ends, number)
        begin = self.ends[place] - len(self.tables[place])
        return self.tables[place].where(number - begin)

    @property
    def stamp(self) -> list[Any]:
        """The stamps of all tables."""
        return [table.stamp for table in self.tables]


OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": JsonlTable.open,
    ".ndjson": JsonlTable.open,
    ".json": JsonTable.open,
    ".csv": CsvTable.open,
    ".tsv": CsvTable.open,
    ".parquet": ParquetTable.open,
    ".arrow": ArrowTable.open,
}
