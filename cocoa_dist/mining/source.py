"""A data set with what was mined for it, as a collection that build_dataset writes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.data.negatives import NEGATIVE_IDENTITIES, SCORES
from cocoa_dist.data.records import Part, Record, Side, image_part, side_hash
from cocoa_dist.data.revision import MINED
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.writing.source import Rejected
from cocoa_dist.mining.search import NOTHING
from cocoa_dist.mining.vectors import first_target


@dataclass(frozen=True)
class MinedSource:
    """Records of `data` with the targets of their neighbours as negatives.

    Pickled to writer processes by its paths; each opens the files for itself.
    """

    data: str  # location of the data set that was mined
    neighbours: Path  # .npz with number (N, K), score (N, K) and own (N,)
    provenance: dict[str, Any]  # into the meta of every record
    job: dict[str, Any]  # what decided the neighbours
    append: bool = False  # keep the negatives that records have

    def __len__(self) -> int:
        return len(self._reader)

    def rows(self, start: int, stop: int) -> Iterator[Record | Rejected]:
        """Yield records with their negatives; one that cannot be read is left out, by name."""
        for number in range(start, stop):
            try:
                yield self._mined(number)
            except ValueError as error:
                yield Rejected(self.where(number), str(error))

    def where(self, number: int) -> str:
        """Return the data set and the record."""
        return f"{self.data} record {number}"

    @property
    def stamp(self) -> list[Any]:
        """What decides the records."""
        return [self.data, self.job]

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.data)

    @cached_property
    def _found(self) -> dict[str, NDArray[Any]]:
        with np.load(self.neighbours, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self).items() if not n.startswith("_")}

    def _mined(self, number: int) -> Record:
        record = self._reader.record(number)
        images, negatives = list(record.images), list[Side]()
        identities, scores = list[str](), list[float]()
        if self.append:
            negatives += record.negatives
            identities += _identities(record)
        own_sides = {side_hash(record, side) for side in (*record.positives, record.target) if side}
        found = zip(self._found["number"][number], self._found["score"][number], strict=True)
        for other_number, score in found:
            if other_number == NOTHING:
                continue
            other = self._reader.record(int(other_number))
            if side_hash(other, first_target(other)) in own_sides:
                continue  # mining knows the first positive alone; a stage would refuse the record
            negatives.append(_carried(other, first_target(other), images))
            identities.append(other.identity)
            scores.append(round(float(score), 6))
        meta = {**record.meta, MINED: self.provenance, NEGATIVE_IDENTITIES: identities}
        meta.pop(SCORES, None)
        if len(record.positives) <= 1 and len(scores) == len(negatives):
            own = round(float(self._found["own"][number]), 6)
            meta[SCORES] = {"positives": [own], "negatives": scores}
        return replace(record, images=tuple(images), negatives=tuple(negatives), meta=meta)


def _identities(record: Record) -> list[str]:
    """Return what a record says its negatives are, else what they hold."""
    found = record.meta.get(NEGATIVE_IDENTITIES)
    if isinstance(found, list) and len(found) == len(record.negatives):
        return [str(identity) for identity in found]
    return [side_hash(record, side) for side in record.negatives]


def _carried(other: Record, side: Side, images: list[bytes]) -> Side:
    """Return a side of another record; its pictures join `images`, each once."""
    parts: list[Part] = []
    for part in side:
        if part.kind == "text":
            parts.append(part)
            continue
        data = other.images[part.image]
        if data not in images:
            images.append(data)
        parts.append(image_part(images.index(data)))
    return tuple(parts)
