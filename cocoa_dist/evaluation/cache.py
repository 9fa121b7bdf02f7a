"""Vectors kept by the content they were made from; a run that was killed goes on where it was.

A folder holds the vectors of one model, device and set of library versions. Every process appends
to a file of its own; a record is whole or it is as if it were not there.
"""

import hashlib
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.evaluation.scores import Vectors

KEY_BYTES = 32
_MAGIC = b"COCOAVEC"
_HEADER = struct.Struct("<8sI")  # magic, width D
_SUFFIX = ".vectors"
# Not part of what decides a vector: notes for people, and the vectors that it is checked with.
_UNHASHED = ("README.md", "selftest.json")


class VectorCache:
    """What is known in a folder. Reads on creation; call `refresh` after others have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[int, int]] = {}  # key: file, record
        self._files: list[NDArray[np.void]] = []
        self._truncated: set[bytes] = set()
        self.width: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the folder again. Raises ValueError if its files have different widths."""
        self._places, self._files, self._truncated = {}, [], set()
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            records = self._open(path)
            if records is None:
                continue
            number = len(self._files)
            self._files.append(records)
            for row, key in _whole(records):
                self._places[key] = (number, row)
                if records[row]["truncated"]:
                    self._truncated.add(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def vectors(self, keys: Sequence[bytes]) -> Vectors:
        """Return (N, D) in the order of the keys; KeyError for one that is not there."""
        assert self.width is not None  # something was written, or there is nothing to ask for
        found_ND = np.empty((len(keys), self.width), dtype=np.float32)
        for row, key in enumerate(keys):
            file, record = self._places[key]
            found_ND[row] = self._files[file][record]["vector"]
        return found_ND

    def truncated(self, keys: Sequence[bytes]) -> int:
        """Return how many of these had a text that was cut."""
        return sum(key in self._truncated for key in keys)

    def _open(self, path: Path) -> NDArray[np.void] | None:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None  # killed before the first record
        magic, width = _HEADER.unpack(header)
        if magic != _MAGIC or (self.width is not None and width != self.width):
            raise ValueError(
                f"{path} is no file of this cache (width {width}, expected {self.width}): "
                "remove it, or name another --cache"
            )
        self.width = width
        record = _record(width)
        count = (path.stat().st_size - _HEADER.size) // record.itemsize
        if count == 0:
            return None
        return np.memmap(path, dtype=record, mode="r", offset=_HEADER.size, shape=(count,))


class CacheWriter:
    """Appends records to a new file of the folder; closed, or killed, it leaves whole ones."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        self._file = self._path.open("xb")
        self._width: int | None = None

    def append(
        self, keys: Sequence[bytes], vectors_ND: Vectors, *, truncated: Sequence[bool]
    ) -> None:
        """Write vectors through to the file system; those of one writer have one width."""
        if self._width is None:
            self._width = vectors_ND.shape[1]
            self._file.write(_HEADER.pack(_MAGIC, self._width))
        records = np.zeros(len(keys), dtype=_record(self._width))
        records["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
        records["truncated"] = np.asarray(truncated, dtype=np.uint32)
        records["vector"] = vectors_ND
        records["crc"] = [_crc(record) for record in records]
        self._file.write(records.tobytes())
        self._file.flush()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._width is None:
            self._path.unlink(missing_ok=True)


def item_key(text: str, image_sha256: str) -> bytes:
    """Return the key of a text (instruction included) and the content of a picture, "" for none."""
    encoded = text.encode()
    digest = hashlib.sha256(f"{len(encoded)}:".encode())
    digest.update(encoded)
    digest.update(image_sha256.encode())
    return digest.digest()


def model_digest(folder: Path) -> str:
    """Return the sha256 over names and contents of all files that decide a model's vectors."""
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name in _UNHASHED or name.startswith(("selftest/", ".")):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _record(width: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("key", f"V{KEY_BYTES}"),
            ("crc", "<u4"),
            ("truncated", "<u4"),
            ("vector", "<f4", (width,)),
        ]
    )


def _crc(record: np.void) -> int:
    payload = zlib.crc32(record["vector"].tobytes(), zlib.crc32(record["key"].tobytes()))
    return zlib.crc32(bytes([int(record["truncated"]) & 1]), payload)


def _whole(records: NDArray[np.void]) -> Iterator[tuple[int, bytes]]:
    for row in range(len(records)):
        record = records[row]
        if int(record["crc"]) == _crc(record):
            yield row, record["key"].tobytes()
