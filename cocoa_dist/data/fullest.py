"""The fullest pack a stage can meet, made of real records, to try its memory before step 1.

What the plan knows of a record is the most it can have; here records are encoded, and go on being
added until the pack itself, not a bound of it, is full in tokens, in patches, or in records.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.batch import PackedBatch
from cocoa_dist.data.encoder import PackDraft
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.order import PlanSource, Slot, StepPlan

_CHUNK = 4096  # records that are looked at together
_TRIED = 64  # records that are encoded to see whether they fit
_STEPS_LOOKED_AT = 16
_LOOKED_AT = 2**18  # records of a source that are sorted


@dataclass(frozen=True)
class Fullest:
    """A pack, and which records of which source are in it."""

    pack: PackedBatch
    source: str
    records: tuple[int, ...]
    keys: tuple[str, ...]


def fullest_pack(
    loader: StageLoader, without: Collection[int] = (), *, world_size: int
) -> Fullest | None:
    """Build one pack of the largest records that fit together; the same on every rank.

    `without`: records that are left out, by number; None if no other is left. No step is taken
    from the loader. Never raises for what a record holds.
    """
    plan = loader.plan
    source, tried = _fullest_source(plan, world_size=world_size)
    left = ~np.isin(tried.records, list(without))
    waiting, sizes = tried.records[left], tried.sizes[left]
    filling = _Filling(loader, source, world_size=world_size)
    while more := list(_that_fit(sizes, room=filling.room, count=filling.places)):
        filling.add(waiting[more])
        waiting, sizes = np.delete(waiting, more), np.delete(sizes, more, axis=0)
    for record in waiting[::-1][:_TRIED]:  # the smallest may be smaller than the plan knows
        filling.add(record[None], only_if_it_fits=True)
    return filling.result()


class _Filling:
    """A pack while records are added to it, and the room it has left."""

    def __init__(self, loader: StageLoader, source: PlanSource, *, world_size: int) -> None:
        self.room = _budgets(loader.plan)  # in tokens and patches
        self.places = loader.plan.batch_size // world_size  # in records
        self._encoder = loader._dataset._encoder
        self._source = loader._dataset._sources[source.name]
        self._records: list[int] = []
        self._keys: list[str] = []
        self._draft = PackDraft([], [], [])

    def add(self, records: NDArray[np.int64], *, only_if_it_fits: bool = False) -> None:
        """Encode records and add them; what fits by the plan's bounds does."""
        keys: list[str] = []
        slots = [Slot(len(self._records) + i, int(r), 0) for i, r in enumerate(records)]
        draft = self._encoder._encode_pack(tuple(slots), lambda _: self._source, keys=keys, bad=[])
        left = self.room - _used(draft, self._encoder.geometry)
        if only_if_it_fits and (left.min() < 0 or not self.places):
            return
        self.room, self.places = left, self.places - len(slots)
        self._records += [slot.record for slot in slots]
        self._keys += keys
        self._draft.samples += draft.samples
        self._draft.draws += draft.draws
        self._draft.embeddings += draft.embeddings

    def result(self) -> Fullest | None:
        """Return the pack, None if it has no record."""
        if not self._records:
            return None
        pack = self._encoder._build(self._draft)
        return Fullest(pack, self._source.name, tuple(self._records), tuple(self._keys))


def most_packs(plan: StepPlan, *, world_size: int) -> int:
    """Return how many packs a rank has in the largest of the plan's first steps."""
    steps = range(plan.start_step, plan.start_step + _STEPS_LOOKED_AT)
    return max(len(plan.step(step, world_size).ranks[0]) for step in steps)


@dataclass(frozen=True, eq=False)
class _Tried:
    """Records of a source that may go into the fullest pack, largest first."""

    records: NDArray[np.int64]  # (N,)
    sizes: NDArray[np.int64]  # (N, 2): bounds of tokens and patches


def _fullest_source(plan: StepPlan, *, world_size: int) -> tuple[PlanSource, _Tried]:
    """Return the source whose fullest pack is the fullest, by what its records can at most be."""
    tried = [_largest_first(source, plan) for source in plan.sources]

    def fill(index: int) -> float:
        sizes, count = tried[index].sizes, plan.batch_size // world_size
        inside = list(_that_fit(sizes, room=_budgets(plan), count=count))
        return float((sizes[inside].sum(axis=0) / _budgets(plan)).sum())

    fullest = max(range(len(tried)), key=fill)
    return plan.sources[fullest], tried[fullest]


def _used(draft: PackDraft, geometry: ImageGeometry) -> NDArray[np.int64]:
    """Return how many tokens and patches samples have."""
    tokens = sum(len(sample.input_ids) for sample in draft.samples)
    images = [image for sample in draft.samples for image in sample.sample.images]
    return np.array([tokens, sum(np.prod(geometry.grid(image)) for image in images)])


def _that_fit(sizes: NDArray[np.int64], *, room: NDArray[np.int64], count: int) -> Iterator[int]:
    """Yield rows of `sizes` (N, 2) from the first on that fit together, at most `count`.

    One pass: what does not fit will not fit later either. Sizes are in tokens and patches.
    """
    left = room.copy()
    for begin in range(0, len(sizes), _CHUNK):
        chunk, at = sizes[begin : begin + _CHUNK], 0
        while count:
            fitting = np.flatnonzero((chunk[at:] <= left).all(axis=1))
            if not len(fitting):
                break
            at += int(fitting[0]) + 1
            left -= chunk[at - 1]
            count -= 1
            yield begin + at - 1


def _largest_first(source: PlanSource, plan: StepPlan) -> _Tried:
    """Order records by the share of a pack that each can take, the larger of both budgets'.

    Of a large source some are looked at, the largest and a sample: to sort 10 million records took
    10 s before the first step.
    """
    records = np.arange(source.num_records)
    if source.num_records > _LOOKED_AT:
        records = _some(source, plan)
    sizes = _sizes(source, records)
    order = np.argsort(-_shares(sizes, plan), kind="stable")
    return _Tried(records[order], sizes[order])


def _some(source: PlanSource, plan: StepPlan) -> NDArray[np.int64]:
    """Return about _LOOKED_AT records: the largest of every stretch, and one in so many."""
    stretch, half = 2**20, _LOOKED_AT // 2
    begins = range(0, source.num_records, stretch)
    found = [np.arange(0, source.num_records, -(-source.num_records // half))]
    for begin in begins:
        records = np.arange(begin, min(begin + stretch, source.num_records))
        shares = _shares(_sizes(source, records), plan)
        count = min(len(records), max(1, half // len(begins)))
        found.append(begin + np.argpartition(-shares, count - 1)[:count])
    return np.unique(np.concatenate(found))


def _sizes(source: PlanSource, records: NDArray[np.int64]) -> NDArray[np.int64]:
    sizes = np.empty((len(records), 2), dtype=np.int64)
    sizes[:, 0], sizes[:, 1] = source.tokens[records], source.patches[records]
    return sizes


def _shares(sizes: NDArray[np.int64], plan: StepPlan) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = (sizes / _budgets(plan)).max(axis=1)
    return shares


def _budgets(plan: StepPlan) -> NDArray[np.int64]:
    return np.array([plan.tokens_per_pack, plan.patches_per_pack], dtype=np.int64)
