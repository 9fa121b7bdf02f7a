"""Vectors of the queries and targets of a data set: a model's, or ones that are at hand."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cocoa_dist.data.images import decode_image
from cocoa_dist.data.records import Record, Side, side_hash, side_texts
from cocoa_dist.evaluation.encoder import MAX_PIXELS
from cocoa_dist.export.selftest import load_encoder, refuse_several_vectors
from cocoa_dist.manifest import sha256_file

Vectors = NDArray[np.float32]
QUERIES_NAME, TARGETS_NAME = "queries.npy", "targets.npy"


@dataclass(frozen=True)
class Embedded:
    """A block of records: unit vectors, and what each target is."""

    query_BD: Vectors
    target_BD: Vectors
    identity_B: NDArray[np.int64]
    content_B: NDArray[np.int64]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fields by name."""
        return dict(vars(self))


class Vectoriser(Protocol):
    """Gives the vectors of records."""

    digest: str  # sha256 of what decides them: weights, or vectors

    def vectors(self, numbers: range, records: Sequence[Record]) -> tuple[Vectors, Vectors]:
        """Return queries and targets (B, D) of records, by number in their data set."""


def first_target(record: Record) -> Side:
    """Return the first positive, or the target. Raises ValueError if there is neither."""
    side = next((side for side in (*record.positives[:1], record.target) if side), None)
    if side is None:
        raise ValueError(f"record {record.key!r} has no positive, expected at least one")
    return side


def number_of(text: str) -> int:
    """Return 64 bits that tell texts apart, collisions aside."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def embed(vectoriser: Vectoriser, numbers: range, records: Sequence[Record]) -> Embedded:
    """Return a block. Raises ValueError, naming the record, for a vector that is none."""
    targets = [first_target(record) for record in records]
    query_BD, target_BD = vectoriser.vectors(numbers, records)
    found = []
    for name, rows_BD in (("query", query_BD), ("target", target_BD)):
        length_B = np.linalg.norm(rows_BD, axis=1)
        wrong = ~(np.isfinite(length_B) & (length_B > 0))
        if wrong.any():
            record = records[int(wrong.argmax())]
            raise ValueError(
                f"the {name} vector of record {record.key!r} has length {length_B[wrong][0]}, "
                "expected a finite one above 0"
            )
        found.append((rows_BD / length_B[:, None]).astype(np.float32))
    contents = [side_hash(r, side) for r, side in zip(records, targets, strict=True)]
    return Embedded(
        query_BD=found[0],
        target_BD=found[1],
        identity_B=np.array([number_of(record.identity) for record in records], dtype=np.int64),
        content_B=np.array([number_of(content) for content in contents], dtype=np.int64),
    )


@dataclass(frozen=True)
class _Parts:
    """One side of a record: its pictures, and its texts joined."""

    pictures: Sequence[Image.Image]
    text: str

    @property
    def kind(self) -> tuple[int, bool]:
        """What can be encoded together: so many pictures, and a text or none."""
        return len(self.pictures), bool(self.text or not self.pictures)

    def as_input(self) -> Any:
        """Return it as sentence-transformers takes it; several pictures as a user's message."""
        texts = [self.text] if self.kind[1] else []
        if len(self.pictures) > 1:
            content = [{"type": "image", "image": picture} for picture in self.pictures]
            said = [{"type": "text", "text": text} for text in texts]
            return [{"role": "user", "content": [*content, *said]}]
        images = [("image", picture) for picture in self.pictures]
        return dict([*images, *(("text", text) for text in texts)])


class ExportedModel:
    """An exported folder, through sentence-transformers."""

    def __init__(self, folder: Path, *, instruction: str = "", batch_size: int = 32) -> None:
        """Load it; `instruction` stands in front of queries.

        Raises ValueError for a folder without weights.
        """
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} has no weights (*.safetensors): name a folder that `python -m "
                "cocoa_dist.report RUN` has exported, or give --vectors"
            )
        refuse_several_vectors(
            folder,
            needed_by="mining",
            instead="mine with a model of single vectors, or give --vectors",
        )
        parts = [sha256_file(file) for file in files]
        self.digest = hashlib.sha256("".join([*parts, instruction]).encode()).hexdigest()
        self._encoder: Any = load_encoder(folder)
        self._instruction, self._batch_size = instruction, batch_size

    def vectors(self, numbers: range, records: Sequence[Record]) -> tuple[Vectors, Vectors]:
        """Encode queries with the instruction, targets without."""
        queries = [_parts(record, record.query) for record in records]
        targets = [_parts(record, first_target(record)) for record in records]
        return self._encode(queries, self._instruction or None), self._encode(targets, None)

    def _encode(self, items: Sequence[_Parts], prompt: str | None) -> Vectors:
        """Encode items of one kind together: text, pictures, or both."""
        rows: dict[int, Vectors] = {}
        for kind in sorted({item.kind for item in items}):
            chosen = [index for index, item in enumerate(items) if item.kind == kind]
            room = {}  # the folder's limit of tokens is for one picture
            if kind[0] > 1:
                longest = self._encoder.tokenizer.model_max_length * kind[0]
                room = {"processing_kwargs": {"text": {"max_length": longest}}}
            found = self._encoder.encode(
                [items[index].as_input() for index in chosen],
                prompt=prompt,
                batch_size=self._batch_size,
                show_progress_bar=False,
                **room,
            )
            rows.update(zip(chosen, np.asarray(found, dtype=np.float32), strict=True))
        return np.stack([rows[index] for index in range(len(items))])


class GivenVectors:
    """Two files with one row for each record, in the order of the data set."""

    def __init__(self, folder: Path, *, count: int) -> None:
        """Open them. Raises ValueError for files that are missing or do not fit `count` records."""
        self._files = []
        for name in (QUERIES_NAME, TARGETS_NAME):
            try:
                rows = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ValueError(f"{folder / name} cannot be read: {error}") from error
            if rows.ndim != 2 or len(rows) != count or rows.dtype.kind != "f":
                raise ValueError(
                    f"{folder / name} holds {rows.dtype} of shape {rows.shape}, expected floats "
                    f"of shape ({count}, width): one row for each record of the data set"
                )
            self._files.append(rows)
        if self._files[0].shape != self._files[1].shape:
            raise ValueError(
                f"{folder}: queries have {self._files[0].shape[1]} dimensions, targets "
                f"{self._files[1].shape[1]}"
            )
        names = (folder / QUERIES_NAME, folder / TARGETS_NAME)
        self.digest = hashlib.sha256("".join(map(sha256_file, names)).encode()).hexdigest()

    def vectors(self, numbers: range, records: Sequence[Record]) -> tuple[Vectors, Vectors]:
        """Read the rows of the records."""
        part = slice(numbers.start, numbers.stop)
        query, target = (np.array(rows[part], dtype=np.float32) for rows in self._files)
        return query, target


def _parts(record: Record, side: Side) -> _Parts:
    """Read one side. Raises ValueError for a picture that cannot be read."""
    pictures = []
    for part in side:
        if part.kind != "image":
            continue
        try:  # as in training: upright, what is transparent over white
            pixels = decode_image(record.images[part.image], max_pixels=MAX_PIXELS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"record {record.key!r}: its picture cannot be read: {error}"
            ) from error
        pictures.append(Image.fromarray(pixels))
    return _Parts(pictures, " ".join(side_texts(side)))
