"""Rows of WebDataset tars, and of folders of pictures with a text beside each.

A tar is scanned once for where some of its samples begin; members are never extracted to disk.
"""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

from cocoa_dist.data.writing.source import Rejected, SourceRow
from cocoa_dist.data.writing.tables import FileTable

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_EVERY = 64  # samples between two known places of a tar
_TEXTS = (".txt", ".caption")  # beside a picture, in order of preference


@dataclass(frozen=True)
class TarTable(FileTable):
    """A WebDataset tar: members that share a name up to its first dot are one row.

    Columns are `__key__` and what stands after the dot, as bytes; fields of a `json` member are
    columns too. Texts are decoded.
    """

    count: int
    places: tuple[int, ...] = field(repr=False)  # offset of every _EVERY-th sample

    @classmethod
    def open(cls, path: Path, label: str) -> "TarTable":
        """Read the headers. Raises ValueError if the file is damaged or compressed."""
        places, count = [], 0
        last = None
        for _, member in _members(path, 0):
            key = _sample_key(member.name)
            if key != last:
                if count % _EVERY == 0:
                    places.append(member.offset)
                count += 1
                last = key
        return cls(path, label, count, tuple(places))

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the samples of [start, stop)."""
        if start >= stop:
            return
        place, ahead = divmod(start, _EVERY)
        members = _members(self.path, self.places[place])
        samples = groupby(members, key=lambda entry: _sample_key(entry[1].name))
        for number, (key, entries) in enumerate(
            islice(samples, ahead, ahead + stop - start), start
        ):
            yield self._sample(number, key, entries)

    def _sample(
        self, number: int, key: str, entries: Iterable[tuple[tarfile.TarFile, tarfile.TarInfo]]
    ) -> SourceRow | Rejected:
        values: dict[str, Any] = {"__key__": key}
        for archive, member in entries:
            stream = archive.extractfile(member)
            assert stream is not None  # _members yields files only
            extension = PurePosixPath(member.name).name.partition(".")[2].lower()
            values[extension] = stream.read()
        where = f"{self.where(number)} ({key})"
        try:
            fields = _decoded(values)
        except ValueError as error:
            return Rejected(where, f"member cannot be read: {error}")
        folder, group = self.path.parent, self.path.absolute().parent.name
        return SourceRow(where, key, group, folder, {**fields, **values})


def _sample_key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    stem = file.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _decoded(values: dict[str, Any]) -> dict[str, Any]:
    """Decode texts in place, and return the fields of a json member."""
    fields: dict[str, Any] = {}
    for extension in list(values):
        if extension in ("txt", "caption", "text", "cls"):
            values[extension] = values[extension].decode()
        elif extension == "json":
            found = json.loads(values.pop(extension))
            if not isinstance(found, dict):
                raise ValueError(f"json member holds {type(found).__name__}, expected an object")
            fields |= found
    return fields


def _members(path: Path, offset: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the files of a tar from a header on. Raises ValueError if it is damaged."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    vars(archive)["members"] = []  # it would keep every header
                    if member.isfile():
                        yield archive, member
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a whole tar file ({error}); fetch it again, decompress it, or leave it "
            "out"
        ) from error


@dataclass(frozen=True)
class PictureFolder:
    """Every picture below a folder, with the text and JSON file of the same name beside it.

    Columns: `image` (a path), `text` if there is one, and the fields of the JSON file. The names
    are kept in memory, about 100 bytes a picture.
    """

    folder: Path
    names: tuple[str, ...] = field(repr=False)  # relative, sorted

    @classmethod
    def open(cls, folder: Path) -> "PictureFolder":
        """List the pictures."""
        names = []
        for root, folders, files in os.walk(folder):
            folders.sort()
            inside = Path(root).relative_to(folder)
            names += [str(inside / f) for f in files if f.lower().endswith(PICTURE_SUFFIXES)]
        return cls(folder, tuple(sorted(names)))

    def __len__(self) -> int:
        return len(self.names)

    def where(self, number: int) -> str:
        """Return the picture's path."""
        return str(self.folder / self.names[number])

    @property
    def stamp(self) -> list[Any]:
        """The names; files behind them are not looked at."""
        return list(self.names)

    def rows(self, start: int, stop: int) -> Iterator[SourceRow | Rejected]:
        """Yield the pictures of [start, stop)."""
        for number in range(start, stop):
            name = self.names[number]
            path = self.folder / name
            try:
                values = {**_beside(path), "image": name}
            except (OSError, ValueError) as error:
                yield Rejected(str(path), f"text beside it cannot be read: {error}")
                continue
            group = path.absolute().parent.name
            yield SourceRow(str(path), name, group, self.folder, values)


def _beside(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    described = path.with_suffix(".json")
    if described.is_file():
        found = json.loads(described.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"{described} holds {type(found).__name__}, expected an object")
        values |= found
    for suffix in _TEXTS:
        file = path.with_suffix(suffix)
        if file.is_file():
            values["text"] = file.read_bytes().decode()
            break
    return values
