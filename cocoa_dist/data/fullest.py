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
    source = _fullest_source(plan, world_size=world_size)
    waiting = _largest_first(source, plan)
    waiting = waiting[~np.isin(waiting, list(without))]
    sizes, filling = _sizes(source), _Filling(loader, source, world_size=world_size)
    while more := list(_that_fit(sizes[waiting], room=filling.room, count=filling.places)):
        filling.add(waiting[more])
        waiting = np.delete(waiting, more)
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


def _fullest_source(plan: StepPlan, *, world_size: int) -> PlanSource:
    """Return the source whose fullest pack is the fullest, by what its records can at most be."""

    def fill(source: PlanSource) -> float:
        sizes = _sizes(source)[_largest_first(source, plan)]
        count = plan.batch_size // world_size
        inside = list(_that_fit(sizes, room=_budgets(plan), count=count))
        return float((sizes[inside].sum(axis=0) / _budgets(plan)).sum())

    return max(plan.sources, key=fill)


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


def _largest_first(source: PlanSource, plan: StepPlan) -> NDArray[np.int64]:
    """Order records by the share of a pack that each can take, the larger of both budgets'."""
    return np.argsort(-(_sizes(source) / _budgets(plan)).max(axis=1), kind="stable")


def _sizes(source: PlanSource) -> NDArray[np.int64]:
    return np.stack([source.tokens, source.patches], axis=1)


def _budgets(plan: StepPlan) -> NDArray[np.int64]:
    return np.array([plan.tokens_per_pack, plan.patches_per_pack], dtype=np.int64)
