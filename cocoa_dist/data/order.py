"""Which records a step takes, on which rank, in which pack: a pure function of (plan, step).

Every record comes exactly once in a pass, whatever the number of ranks, workers or restarts; a
resume needs the next step and nothing else. When the blend, the batch size or what is left out
changes, a new segment of the plan goes on from where each data set stands. No torch, no files, no
state.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.data.dealing import deal, greedy_knapsack
from cocoa_dist.data.shuffle import Shuffle, lanes_at, records_at

Ints = NDArray[np.int64]

PLAN_VERSION = 2  # a change that moves any record raises it
BLOCK_STEPS = 1000  # blends are exact in each block of so many steps


@dataclass(frozen=True, eq=False)
class PlanSource:
    """One data set of a blend, as the plan sees it."""

    name: str
    weight: float  # relative to the other sources
    tokens: NDArray[np.integer[Any]]  # (records,): upper bound of the tokens of its samples
    patches: NDArray[np.integer[Any]]  # (records,): upper bound of their patches
    fingerprint: str = ""  # of the data, so that a plan of other data is another plan
    left_out: str = ""  # digest of the list of records that are not used
    largest: tuple[int, int] | None = None  # records with the most tokens and patches, if known

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
    """Steps `start_step`, ... of a stage. Raises ValueError for a plan that cannot be kept."""

    sources: tuple[PlanSource, ...]
    batch_size: int  # records a step, over all ranks
    seed: int
    stage: str
    tokens_per_pack: int
    patches_per_pack: int
    shuffle: Shuffle = field(default_factory=Shuffle)
    start_step: int = 1  # of this segment
    cursors: Mapping[str, int] = field(
        default_factory=dict
    )  # records of each source taken before it
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

    def step(self, step: int, world_size: int, *, num_nodes: int = 1) -> StepAssignment:
        """Return the records of `step`, dealt to `world_size` ranks on `num_nodes` nodes.

        Every rank gets as many records and as many packs as every other one. The number of nodes
        decides who reads a record, never which ones are read.
        """
        check_world_size(self.batch_size, world_size, stage=self.stage)
        index, before = self._source_of(step)
        source = self.sources[index]
        first = self.cursors.get(source.name, 0) + before * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        passes, offsets = np.divmod(positions, source.num_records)
        records = np.empty(self.batch_size, dtype=np.int64)
        for one_pass in np.unique(passes):
            inside = passes == one_pass
            records[inside] = records_at(
                offsets[inside],
                size=source.num_records,
                key=f"{self.seed}/{self.stage}/{source.name}/{one_pass}",
                shuffle=self.shuffle,
            )
        lanes = lanes_at(offsets, size=source.num_records, shuffle=self.shuffle)
        ids, numbers = records.tolist(), passes.tolist()
        content = json.dumps([source.name, numbers, ids]).encode()
        return StepAssignment(
            step=step,
            dataset=source.name,
            passes=tuple(numbers),
            record_ids=tuple(ids),
            ranks=self._deal(
                source, records, passes, world_size=world_size, num_nodes=num_nodes, lanes=lanes
            ),
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
            "shuffle": vars(self.shuffle),
            "start": [self.start_step, sorted(self.cursors.items())],
            "sources": [
                [s.name, s.num_records, s.weight, s.fingerprint, s.left_out] for s in self.sources
            ],
        }
        encoded = json.dumps(content, sort_keys=True).encode()
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()

    def cursors_at(self, step: int) -> dict[str, int]:
        """Return how many records of each data set the steps before `step` have taken.

        Data sets that have left the blend keep their place.
        """
        done = dict(self.cursors)
        for index, source in enumerate(self.sources):
            steps = self._steps_before(step, index)
            done[source.name] = done.get(source.name, 0) + steps * self.batch_size
        return done

    def state(self, next_step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data; `next_step` is the first not yet trained."""
        return {
            "plan_hash": self.plan_hash,
            "start_step": self.start_step,
            "start": dict(self.cursors),
            "fingerprints": {s.name: _short(s.fingerprint) for s in self.sources},
            "num_records": {s.name: s.num_records for s in self.sources},
            "cursors": self.cursors_at(next_step),
            "next_step": next_step,
        }

    def resumed(self, state: Mapping[str, Any], *, may_change: bool = False) -> "StepPlan":
        """Return the plan that goes on from a checkpoint's `state`.

        It is the checkpoint's own if nothing has changed; else, if it `may_change`, a new segment
        that begins at the next step with each data set where it stands. Raises ValueError if the
        state is not one, or of another plan that may not change.
        """
        next_step, start, cursors = _checked(state, stage=self.stage)
        same = replace(self, start_step=state.get("start_step", 1), cursors=start)
        if same.plan_hash == state.get("plan_hash"):
            return same
        if not may_change:
            raise ValueError(
                f"stage '{self.stage}': the checkpoint's data plan is {state.get('plan_hash')}, "
                f"this recipe and data give {same.plan_hash}: data, seed, batch size or sources "
                "have changed. Go on with the old ones, start another run folder, or set "
                "data.on_change=continue to go on with the new ones from where each data set stands"
            )
        for source in self.sources:
            if cursors.get(source.name, 0):
                self._check_standing(source, state)
        return replace(self, start_step=next_step, cursors=cursors)

    def _check_standing(self, source: PlanSource, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a begun source holds other records than the checkpoint's."""
        for what, key, now in (
            ("data", "fingerprints", _short(source.fingerprint)),
            ("number of records", "num_records", source.num_records),
        ):
            before = state.get(key, {}).get(source.name, now)
            if before != now:
                raise ValueError(
                    f"stage '{self.stage}': source '{source.name}' had another {what} ({before}, "
                    f"now {now}), so that where it stands says nothing: give it a name of its own, "
                    "and its passes begin anew"
                )

    def _check_source(self, source: PlanSource) -> None:
        if source.num_records == 0:
            raise ValueError(f"stage '{self.stage}': source '{source.name}' has no records")
        most = source.largest or (int(source.tokens.argmax()), int(source.patches.argmax()))
        budgets = (
            ("tokens", source.tokens, self.tokens_per_pack, most[0]),
            ("patches", source.patches, self.patches_per_pack, most[1]),
        )
        for unit, bounds, budget, largest in budgets:
            if bounds[largest] > budget:
                raise ValueError(
                    f"stage '{self.stage}': record {largest} of source '{source.name}' can have "
                    f"{bounds[largest]} {unit}, data.{unit}_per_pack is {budget}: raise it, or "
                    "lower data.max_text_tokens or data.image.max_pixels"
                )

    def _source_of(self, step: int) -> tuple[int, int]:
        """Return the source of a step and how many steps of the segment it had before."""
        if step < self.start_step:
            raise ValueError(f"step {step}, expected one from {self.start_step} on")
        order, _, offset = self._block(step)
        index = int(order[offset])
        return index, self._steps_before(step, index)

    def _steps_before(self, step: int, index: int) -> int:
        """Return how many steps of the segment before `step` a source has."""
        order, block, offset = self._block(step)
        inside = int(np.count_nonzero(order[:offset] == index))
        return block * int(self._quotas[index]) + inside

    def _block(self, step: int) -> tuple[Ints, int, int]:
        """Return the order of sources in the step's block, the block, and the place in it."""
        block, offset = divmod(step - self.start_step, BLOCK_STEPS)
        key = f"{self.seed}/{self.stage}"
        if self.start_step > 1:
            key += f"/{self.start_step}"
        return _block_order(tuple(self._quotas.tolist()), key, block), block, offset

    def _deal(
        self,
        source: PlanSource,
        records: Ints,
        passes: Ints,
        *,
        world_size: int,
        num_nodes: int,
        lanes: Ints,
    ) -> tuple[tuple[Pack, ...], ...]:
        sizes = np.stack([source.tokens[records], source.patches[records]], axis=1)
        budgets = (self.tokens_per_pack, self.patches_per_pack)
        at_home = num_nodes > 1 and self.shuffle.lanes % num_nodes == 0
        nodes = np.where(lanes < 0, lanes, lanes * num_nodes // self.shuffle.lanes)
        ranks: list[list[Pack]] = []
        for items in deal(
            sizes,
            num_ranks=world_size,
            num_nodes=num_nodes if at_home else 1,
            node=nodes if at_home else None,
        ):
            bins = greedy_knapsack(sizes[items], budgets)
            chosen = [items[np.sort(inside)] for inside in bins]
            ranks.append([_pack(places, records[places], passes[places]) for places in chosen])
        most = max(map(len, ranks))
        return tuple((*packs, *[()] * (most - len(packs))) for packs in ranks)


def _pack(places: Ints, records: Ints, passes: Ints) -> Pack:
    return tuple(map(Slot, places.tolist(), records.tolist(), passes.tolist()))


def _short(fingerprint: str) -> str:
    return fingerprint[:16]


def _checked(
    state: Mapping[str, Any], *, stage: str
) -> tuple[int, Mapping[str, int], Mapping[str, int]]:
    """Return the next step of a state, and its cursors at the segment's start and now."""
    next_step, start, now = (state.get(key) for key in ("next_step", "start", "cursors"))
    if not isinstance(next_step, int) or next_step < 1:
        raise ValueError(
            f"stage '{stage}': data state has next_step {next_step!r}, expected a number from 1 on"
        )
    if not isinstance(start, dict) or not isinstance(now, dict):
        raise ValueError(f"stage '{stage}': data state has no cursors: another version wrote it")
    return next_step, start, now


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


@lru_cache(maxsize=16)
def _block_order(quotas: tuple[int, ...], key: str, block: int) -> Ints:
    """Return the source of each step of a block."""
    digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
    order: Ints = generator.permutation(np.repeat(np.arange(len(quotas)), quotas))
    return order
