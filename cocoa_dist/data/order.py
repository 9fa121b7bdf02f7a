"""Which records a step takes, on which rank, in which pack: a pure function of (plan, step).

Every record comes exactly once in a pass, whatever the number of ranks, workers or restarts; a
resume needs the next step and nothing else. No torch, no files, no state.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PLAN_VERSION = 1  # a change of this file that moves any record raises it
BLOCK_STEPS = 1000  # blends are exact in each block of so many steps
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True, eq=False)
class PlanSource:
    """One data set of a blend, as the plan sees it."""

    name: str
    weight: float  # relative to the other sources
    tokens: Ints  # (records,): upper bound of the tokens of a record's samples
    patches: Ints  # (records,): upper bound of their patches
    fingerprint: str = ""  # of the data, so that a plan of other data is another plan

    @property
    def num_records(self) -> int:
        """Records of a pass."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Slot:
    """One record's place in a step."""

    position: int  # in the global batch, in plan order
    record: int  # in its data set
    passes: int  # how often the whole data set was seen before


Pack = tuple[Slot, ...]  # empty where a rank has fewer packs than the others


@dataclass(frozen=True)
class StepAssignment:
    """Everything about the records of one step; the same on every rank but for `ranks`' length."""

    step: int
    dataset: str
    passes: tuple[int, ...]  # of each record
    record_ids: tuple[int, ...]  # of the global batch, in plan order
    ranks: tuple[tuple[Pack, ...], ...]  # ranks x packs; equal numbers of packs
    digest: str  # hash of dataset, passes and record ids


@dataclass(frozen=True)
class StepPlan:
    """Steps 1, 2, ... of a stage. Raises ValueError for a plan that cannot be kept."""

    sources: tuple[PlanSource, ...]
    batch_size: int  # records a step, over all ranks
    seed: int
    stage: str
    tokens_per_pack: int
    patches_per_pack: int
    _quotas: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stage '{self.stage}': sources {names}, expected different names")
        for source in self.sources:
            self._check_source(source)
        quotas = largest_remainder([s.weight for s in self.sources], total=BLOCK_STEPS)
        if quotas.min() == 0:
            name = names[int(quotas.argmin())]
            raise ValueError(
                f"stage '{self.stage}': source '{name}' has so little weight that it gets none of "
                f"{BLOCK_STEPS} steps; raise its weight or leave it out"
            )
        object.__setattr__(self, "_quotas", quotas)

    def step(self, step: int, world_size: int) -> StepAssignment:
        """Return the records of `step` (the first is 1), dealt to `world_size` ranks.

        Every rank gets as many records and as many packs as every other one.
        """
        check_world_size(self.batch_size, world_size, stage=self.stage)
        index, before = self._source_of(step)
        source = self.sources[index]
        positions = np.arange(before * self.batch_size, (before + 1) * self.batch_size)
        passes, offsets = np.divmod(positions, source.num_records)
        records = np.empty(self.batch_size, dtype=np.int64)
        for one_pass in np.unique(passes):
            inside = passes == one_pass
            key = f"{self.seed}/{self.stage}/{source.name}/{one_pass}"
            records[inside] = permute(offsets[inside], size=source.num_records, key=key)
        ids, numbers = records.tolist(), passes.tolist()
        content = json.dumps([source.name, numbers, ids]).encode()
        return StepAssignment(
            step=step,
            dataset=source.name,
            passes=tuple(numbers),
            record_ids=tuple(ids),
            ranks=self._deal(source, records, numbers, world_size),
            digest=hashlib.blake2b(content, digest_size=16).hexdigest(),
        )

    @property
    def plan_hash(self) -> str:
        """Hash of everything that decides which records a step takes; packing is not part of it."""
        content = {
            "version": PLAN_VERSION,
            "seed": self.seed,
            "stage": self.stage,
            "batch_size": self.batch_size,
            "sources": [[s.name, s.num_records, s.weight, s.fingerprint] for s in self.sources],
        }
        encoded = json.dumps(content, sort_keys=True).encode()
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()

    def state(self, next_step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data; `next_step` is the first not yet trained."""
        start = {source.name: 0 for source in self.sources}
        return {
            "plan_hash": self.plan_hash,
            "segments": [{"start_step": 1, "cursor": start}],
            "next_step": next_step,
        }

    def check_state(self, state: dict[str, Any]) -> int:
        """Return the step to go on with. Raises ValueError if the state is of another plan."""
        found = state.get("plan_hash")
        if found != self.plan_hash:
            raise ValueError(
                f"stage '{self.stage}': the checkpoint's data plan is {found}, this recipe and "
                f"data give {self.plan_hash}: data, seed, batch size or sources have changed. Go "
                "on with the old ones, or start another run folder"
            )
        next_step = state.get("next_step")
        if not isinstance(next_step, int) or next_step < 1:
            raise ValueError(f"data state has next_step {next_step!r}, expected a number from 1 on")
        return next_step

    def _check_source(self, source: PlanSource) -> None:
        if source.num_records == 0:
            raise ValueError(f"stage '{self.stage}': source '{source.name}' has no records")
        budgets = (
            ("tokens", source.tokens, self.tokens_per_pack),
            ("patches", source.patches, self.patches_per_pack),
        )
        for unit, bounds, budget in budgets:
            largest = int(bounds.argmax())
            if bounds[largest] > budget:
                raise ValueError(
                    f"stage '{self.stage}': record {largest} of source '{source.name}' can have "
                    f"{bounds[largest]} {unit}, data.{unit}_per_pack is {budget}: raise it, or "
                    "lower data.max_text_tokens or data.image.max_pixels"
                )

    def _source_of(self, step: int) -> tuple[int, int]:
        """Return the source of a step and how many steps it had before."""
        if step < 1:
            raise ValueError(f"step {step}, expected one from 1 on")
        block, offset = divmod(step - 1, BLOCK_STEPS)
        order = _block_order(tuple(self._quotas.tolist()), f"{self.seed}/{self.stage}", block)
        index = int(order[offset])
        before = int(np.count_nonzero(order[:offset] == index))
        return index, block * int(self._quotas[index]) + before

    def _deal(
        self, source: PlanSource, records: Ints, passes: list[int], world_size: int
    ) -> tuple[tuple[Pack, ...], ...]:
        tokens, patches = source.tokens[records], source.patches[records]
        budgets = (self.tokens_per_pack, self.patches_per_pack)
        load = np.maximum(tokens / budgets[0], patches / budgets[1])
        ranks: list[list[Pack]] = []
        for lane in snake(load, world_size):
            bins = greedy_knapsack(np.stack([tokens[lane], patches[lane]], axis=1), budgets)
            ranks.append(
                [
                    tuple(
                        Slot(int(p), int(records[p]), passes[int(p)]) for p in lane[np.sort(inside)]
                    )
                    for inside in bins
                ]
            )
        most = max(map(len, ranks))
        return tuple((*packs, *[()] * (most - len(packs))) for packs in ranks)


def check_world_size(batch_size: int, world_size: int, *, stage: str) -> None:
    """Raise ValueError if the ranks cannot have equally many records, with sizes that work."""
    if world_size < 1 or batch_size % world_size:
        works = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ValueError(
            f"stage '{stage}': batch_size {batch_size} cannot be shared equally by {world_size} "
            f"processes; {batch_size} can be shared by {', '.join(map(str, works))}: change "
            "batch_size or the number of processes"
        )


def largest_remainder(weights: Sequence[float], *, total: int) -> Ints:
    """Share `total` in proportion to weights, in whole numbers that add up to it."""
    weight_sum = sum(weights)
    shares = np.array([weight / weight_sum * total for weight in weights], dtype=np.float64)
    quotas = np.floor(shares).astype(np.int64)
    missing = total - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    return quotas


def snake(load: NDArray[np.float64], num_lanes: int) -> list[Ints]:
    """Deal items to lanes, heaviest first and back and forth; equal counts if they divide.

    Returns each lane's items in ascending order.
    """
    heaviest_first = np.argsort(-load, kind="stable")
    turn, place = np.divmod(np.arange(len(load)), num_lanes)
    lanes = np.where(turn % 2 == 0, place, num_lanes - 1 - place)
    return [np.sort(heaviest_first[lanes == lane]) for lane in range(num_lanes)]


def greedy_knapsack(lengths: NDArray[np.integer[Any]], budgets: Sequence[int]) -> list[Ints]:
    """Put items into few bins that keep every budget, largest first; deterministic.

    `lengths` is (items, units), such as tokens and patches; an item is as large as the largest
    share of a budget that it takes. Fills one bin after the other with the largest item that still
    fits: research in packing says that no cleverer rule is worth its time.
    Raises ValueError for an item that fits into no bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    limits = np.asarray(budgets, dtype=np.int64)
    too_large = np.flatnonzero((sizes > limits).any(axis=1))
    if len(too_large):
        first = int(too_large[0])
        raise ValueError(f"item {first} has size {sizes[first].tolist()}, budgets are {budgets}")
    order = np.argsort(-(sizes / limits).max(axis=1), kind="stable")
    if (sizes.sum(axis=0) <= limits).all():
        return [order] if len(order) else []
    waiting = [(index, tuple(sizes[index].tolist())) for index in order.tolist()]
    bins: list[Ints] = []
    while waiting:
        room = limits.tolist()
        inside: list[int] = []
        left = []
        for index, size in waiting:
            if all(s <= r for s, r in zip(size, room, strict=True)):
                inside.append(index)
                room = [r - s for s, r in zip(size, room, strict=True)]
            else:
                left.append((index, size))
        bins.append(np.array(inside, dtype=np.int64))
        waiting = left
    return bins


def permute(values: Ints, *, size: int, key: str) -> Ints:
    """Map values of [0, size) one to one onto [0, size), differently for every key.

    A Feistel network over the next even power of two; what falls outside walks on until it falls
    inside (cycle walking, Black and Rogaway 2002). Needs no table.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    result = np.asarray(values, dtype=np.uint64)
    outside = np.ones(len(result), dtype=np.bool_)
    while outside.any():
        result[outside] = _feistel(result[outside], half=half, keys=keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], *, half: int, keys: NDArray[Any]) -> NDArray[np.uint64]:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & low
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & low)
    joined: NDArray[np.uint64] = (left << shift) | right
    return joined


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele et al. 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=16)
def _block_order(quotas: tuple[int, ...], key: str, block: int) -> Ints:
    """Return the source of each step of a block."""
    digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
    order: Ints = generator.permutation(np.repeat(np.arange(len(quotas)), quotas))
    return order
