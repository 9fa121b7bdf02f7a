"""The fullest pack a stage can meet, made of real records, to try its memory before step 1.

What the plan knows of a record is the most it can have; here records are encoded, and go on being
added until the pack itself, not a bound of it, is full in tokens, in patches, or in records.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import StageDataConfig
from cocoa_dist.data.encoder import PackDraft
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.order import PlanSource, Slot, StepPlan

_CHUNK = 4096  # records that are looked at together
_TRIED = 64  # records that are encoded to see whether they fit
_STEPS_LOOKED_AT = 16
_DRAWS = 6  # passes of a record that are tried where its size is drawn
_LOOKED_AT = 2**18  # records of a source that are sorted


class Measure(StrEnum):
    """What a pack has most of: a share of both budgets together, or of one."""

    BOTH = "both"
    TOKENS = "tokens"
    PATCHES = "patches"


@dataclass(frozen=True)
class Fullest:
    """A pack, and which records are in it, of which source or sources."""

    pack: PackedBatch
    source: str
    records: tuple[int, ...]
    keys: tuple[str, ...]


def fullest_pack(
    loader: StageLoader,
    without: Collection[int] = (),
    *,
    world_size: int,
    most: Measure = Measure.BOTH,
    tried: Sequence["_Tried"] = (),
    room: tuple[int, int] | None = None,
) -> Fullest | None:
    """Build one pack of the largest records that fit together; the same on every rank.

    Of the source whose pack has most by `most`; where a step mixes sources, of the others too.
    `without`: records that are left out, by number; None if no other is left. `tried`: of every
    source, if known. `room`: tokens and patches, where the pack shall be smaller than the budgets
    allow. No step is taken from the loader. Never raises for what a record holds.
    """
    plan = loader.plan
    tried = tried or [_largest_first(source, plan) for source in plan.sources]
    ranked = _fullest_first(tried, plan, world_size=world_size, most=most)
    filling = _Filling(loader, world_size=world_size, most=most)
    if room is not None:
        filling.room = np.minimum(filling.room, np.array(room, dtype=np.int64))
    for index in ranked if plan.task_block else ranked[:1]:
        source, of_source = plan.sources[index], tried[index]
        left = ~np.isin(of_source.records, list(without))
        waiting, sizes = of_source.records[left], of_source.sizes[left]
        while more := list(_that_fit(sizes, room=filling.room, count=filling.places)):
            filling.add(source, waiting[more])
            waiting, sizes = np.delete(waiting, more), np.delete(sizes, more, axis=0)
        for record in waiting[::-1][:_TRIED]:  # the smallest may be smaller than the plan knows
            filling.add(source, record[None], only_if_it_fits=True)
    return filling.result()


def fuller_packs(loader: StageLoader, first: PackedBatch, *, world_size: int) -> Iterator[Fullest]:
    """Yield packs that have more tokens, or more patches, than the fullest by both together.

    There are none where all packs are of one source, whose records have one size each.
    """
    plan = loader.plan
    if len(plan.sources) == 1 and not _is_drawn(loader._dataset._encoder.stage.data):
        return
    tried = [_largest_first(source, plan) for source in plan.sources]
    for most in (Measure.TOKENS, Measure.PATCHES):
        found = fullest_pack(loader, world_size=world_size, most=most, tried=tried)
        if found is None:
            continue
        more_tokens = found.pack.num_tokens > first.num_tokens
        more_patches = len(found.pack.pixel_values) > len(first.pixel_values)
        if more_tokens if most is Measure.TOKENS else more_patches:
            yield found


def _is_drawn(data: StageDataConfig) -> bool:
    """Whether what a record becomes has another size in another pass; positives aside."""
    return 0.0 < data.image_share < 1.0 or data.keywords == "sample" or data.separate_views


class _Filling:
    """A pack while records are added to it, and the room it has left."""

    def __init__(self, loader: StageLoader, *, world_size: int, most: Measure) -> None:
        self._most = most
        self.room = _budgets(loader.plan)  # in tokens and patches
        self.places = loader.plan.batch_size // world_size  # in records
        self._budgets = self.room.copy()
        self._encoder = loader._dataset._encoder
        self._sources = loader._dataset._sources
        data = self._encoder.stage.data
        self._passes = _DRAWS if _is_drawn(data) or data.view == "pair" else 1
        self._records: list[int] = []
        self._names: list[str] = []
        self._keys: list[str] = []
        self._draft = PackDraft([], [], [])

    def add(
        self, source: PlanSource, records: NDArray[np.int64], *, only_if_it_fits: bool = False
    ) -> None:
        """Encode records and add them; what fits by the plan's bounds does."""
        for record in records.tolist():
            keys: list[str] = []
            made = self._draws(source.name, record, keys)
            if only_if_it_fits:
                made = [one for one in made if self.places and (one[1] <= self.room).all()]
            if not made:
                continue
            draft, used = max(made, key=lambda one: self._share(one[1]))
            self.room, self.places = self.room - used, self.places - 1
            self._records.append(record)
            self._names.append(source.name)
            self._keys += keys[:1]
            self._draft.samples += draft.samples
            self._draft.draws += draft.draws
            self._draft.embeddings += draft.embeddings

    def _draws(
        self, name: str, record: int, keys: list[str]
    ) -> list[tuple[PackDraft, NDArray[np.int64]]]:
        """Return what a record becomes in some passes, and the tokens and patches that takes."""
        found = []
        for number in range(self._passes):
            slot = Slot(len(self._records), record, number)
            draft = self._encoder._encode_pack(
                (slot,), lambda _: self._sources[name], keys=keys, bad=[]
            )
            found.append((draft, _used(draft, self._encoder.geometry)))
        return found

    def _share(self, used: NDArray[np.int64]) -> float:
        return _measured(used / self._budgets, self._most)

    def result(self) -> Fullest | None:
        """Return the pack, None if it has no record."""
        if not self._records:
            return None
        pack = self._encoder._build(self._draft)
        source = " + ".join(dict.fromkeys(self._names))
        return Fullest(pack, source, tuple(self._records), tuple(self._keys))


def most_packs(plan: StepPlan, *, world_size: int) -> int:
    """Return how many packs a rank has in the largest of the plan's first steps."""
    steps = range(plan.start_step, plan.start_step + _STEPS_LOOKED_AT)
    return max(len(plan.step(step, world_size).ranks[0]) for step in steps)


@dataclass(frozen=True, eq=False)
class _Tried:
    """Records of a source that may go into the fullest pack, largest first."""

    records: NDArray[np.int64]  # (N,)
    sizes: NDArray[np.int64]  # (N, 2): bounds of tokens and patches


def _fullest_first(
    tried: Sequence[_Tried], plan: StepPlan, *, world_size: int, most: Measure
) -> list[int]:
    """Return the sources by what their fullest packs can at most have, the fullest first."""

    def fill(index: int) -> float:
        sizes, count = tried[index].sizes, plan.batch_size // world_size
        inside = list(_that_fit(sizes, room=_budgets(plan), count=count))
        return _measured(sizes[inside].sum(axis=0) / _budgets(plan), most)

    return sorted(range(len(tried)), key=fill, reverse=True)


def _measured(shares: NDArray[np.float64], most: Measure) -> float:
    """Return one number for the shares of tokens and patches, by what there is to be most of."""
    tokens, patches = shares.tolist()
    by = {Measure.BOTH: tokens + patches, Measure.TOKENS: tokens, Measure.PATCHES: patches}
    return float(by[most])


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
