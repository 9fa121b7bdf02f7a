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

from cocoa_dist.data.dealing import deal, pack_ranks
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
    datasets: tuple[str, ...]  # of each record; one and the same without task blocks
    passes: tuple[int, ...]  # of each record
    record_ids: tuple[int, ...]  # of the global batch, in plan order
    ranks: tuple[tuple[Pack, ...], ...]  # ranks x packs; equal numbers of packs
    digest: str  # hash of datasets, passes and record ids

    @property
    def dataset(self) -> str:
        """Name of the data set, or of all that the step has, in the order they begin in."""
        return " + ".join(dict.fromkeys(self.datasets))


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
    task_block: int | None = None  # records of one source in a row; default: the whole step
    start_step: int = 1  # of this segment
    cursors: Mapping[str, int] = field(
        default_factory=dict
    )  # records of each source taken before it
    absent: Mapping[str, tuple[str, int]] = field(
        default_factory=dict, compare=False
    )  # fingerprint and records of the sources with a cursor that have left the blend
    _quotas: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stage '{self.stage}': sources {names}, expected different names")
        for source in self.sources:
            self._check_source(source)
        if self.task_block is not None:
            self._check_task_block(self.task_block)
        total = BLOCK_STEPS * self._turns_a_step
        quotas = largest_remainder([s.weight for s in self.sources], total=total)
        if quotas.min() == 0:
            name = names[int(quotas.argmin())]
            turns = f"{total} {'steps' if self.task_block is None else 'blocks of records'}"
            raise ValueError(
                f"stage '{self.stage}': source '{name}' has so little weight that it gets none of "
                f"{turns}; raise its weight or leave it out"
            )
        object.__setattr__(self, "_quotas", quotas)

    def step(self, step: int, world_size: int, *, num_nodes: int = 1) -> StepAssignment:
        """Return the records of `step`, dealt to `world_size` ranks on `num_nodes` nodes.

        Every rank gets as many records and as many packs as every other one. The number of nodes
        decides who reads a record, never which ones are read.
        """
        check_world_size(self.batch_size, world_size, stage=self.stage)
        drawn = self._draw(step)
        ids, numbers = drawn.records.tolist(), drawn.passes.tolist()
        turns = [self.sources[index].name for index in drawn.turns]
        size = self.batch_size // len(turns)
        content = json.dumps([turns if self.task_block else turns[0], numbers, ids]).encode()
        return StepAssignment(
            step=step,
            datasets=tuple(name for name in turns for _ in range(size)),
            passes=tuple(numbers),
            record_ids=tuple(ids),
            ranks=self._deal(drawn, world_size=world_size, num_nodes=num_nodes),
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
        if self.task_block is not None:
            content["task_block"] = self.task_block
        encoded = json.dumps(content, sort_keys=True).encode()
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()

    def cursors_at(self, step: int) -> dict[str, int]:
        """Return how many records of each data set the steps before `step` have taken.

        Data sets that have left the blend keep their place.
        """
        done = dict(self.cursors)
        for index, source in enumerate(self.sources):
            turns = self._turns_before(step, index)
            done[source.name] = done.get(source.name, 0) + turns * self._turn_records
        return done

    def state(self, next_step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data; `next_step` is the first not yet trained."""
        return {
            "plan_hash": self.plan_hash,
            "start_step": self.start_step,
            "start": dict(self.cursors),
            "fingerprints": {
                **{name: fingerprint for name, (fingerprint, _) in self.absent.items()},
                **{s.name: _short(s.fingerprint) for s in self.sources},
            },
            "num_records": {
                **{name: count for name, (_, count) in self.absent.items()},
                **{s.name: s.num_records for s in self.sources},
            },
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
        absent = self._absent(state)
        same = replace(self, start_step=state.get("start_step", 1), cursors=start, absent=absent)
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
        return replace(self, start_step=next_step, cursors=cursors, absent=absent)

    def _absent(self, state: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
        """Return what the data sets were that a state knows and this blend does not have."""
        counts, here = state.get("num_records", {}), {source.name for source in self.sources}
        found = state.get("fingerprints", {}).items()
        return {name: (old, counts[name]) for name, old in found if name in counts.keys() - here}

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

    def _check_task_block(self, records: int) -> None:
        if self.batch_size % records:
            raise ValueError(
                f"stage '{self.stage}': batch_size {self.batch_size} is not a multiple of "
                f"data.task_block {records}"
            )
        short = [f"'{s.name}' has {s.num_records}" for s in self.sources if s.num_records < records]
        if short:
            raise ValueError(
                f"stage '{self.stage}': data.task_block is {records}, but source "
                f"{', '.join(short)} records, so that every block would have some of them twice: "
                "lower data.task_block or leave the source out"
            )

    @property
    def _turn_records(self) -> int:
        """Records that a source gives when it is its turn."""
        return self.task_block or self.batch_size

    @property
    def _turns_a_step(self) -> int:
        return self.batch_size // self._turn_records

    def _turns_of(self, step: int) -> list[tuple[int, int]]:
        """Return the source of each turn of a step, and the turns it had before in the segment."""
        if step < self.start_step:
            raise ValueError(f"step {step}, expected one from {self.start_step} on")
        order, _, offset = self._block(step)
        indices = order[offset : offset + self._turns_a_step].tolist()
        had = {index: self._turns_before(step, index) for index in set(indices)}
        turns = []
        for index in indices:
            turns.append((index, had[index]))
            had[index] += 1
        return turns

    def _turns_before(self, step: int, index: int) -> int:
        """Return how many turns of the segment before `step` a source has."""
        order, block, offset = self._block(step)
        inside = int(np.count_nonzero(order[:offset] == index))
        return block * int(self._quotas[index]) + inside

    def _block(self, step: int) -> tuple[Ints, int, int]:
        """Return the order of sources in the step's block, the block, and the place in it."""
        block, offset = divmod(step - self.start_step, BLOCK_STEPS)
        key = f"{self.seed}/{self.stage}"
        if self.start_step > 1:
            key += f"/{self.start_step}"
        order = _block_order(tuple(self._quotas.tolist()), key, block)
        return order, block, offset * self._turns_a_step

    def _draw(self, step: int) -> "_Drawn":
        """Look up the records of a step."""
        turns, size = self._turns_of(step), self._turn_records
        records, passes, lanes = (np.empty(self.batch_size, dtype=np.int64) for _ in range(3))
        sizes = np.empty((self.batch_size, 2), dtype=np.int64)
        for index in {index for index, _ in turns}:
            source = self.sources[index]
            mine = [(place, had) for place, (one, had) in enumerate(turns) if one == index]
            row = np.arange(size)
            places = np.concatenate([place * size + row for place, _ in mine])
            taken = np.concatenate([had * size + row for _, had in mine])
            positions = self.cursors.get(source.name, 0) + taken
            passes[places], offsets = np.divmod(positions, source.num_records)
            found = self._records_of(source, passes[places], offsets)
            records[places] = found
            lanes[places] = lanes_at(offsets, size=source.num_records, shuffle=self.shuffle)
            sizes[places, 0], sizes[places, 1] = source.tokens[found], source.patches[found]
        return _Drawn([index for index, _ in turns], records, passes, lanes, sizes)

    def _records_of(self, source: PlanSource, passes: Ints, offsets: Ints) -> Ints:
        records = np.empty(len(offsets), dtype=np.int64)
        for one_pass in np.unique(passes):
            inside = passes == one_pass
            records[inside] = records_at(
                offsets[inside],
                size=source.num_records,
                key=f"{self.seed}/{self.stage}/{source.name}/{one_pass}",
                shuffle=self.shuffle,
            )
        return records

    def _deal(
        self, drawn: "_Drawn", *, world_size: int, num_nodes: int
    ) -> tuple[tuple[Pack, ...], ...]:
        sizes, lanes = drawn.sizes, drawn.lanes
        budgets = (self.tokens_per_pack, self.patches_per_pack)
        at_home = num_nodes > 1 and self.shuffle.lanes % num_nodes == 0
        nodes = np.where(lanes < 0, lanes, lanes * num_nodes // self.shuffle.lanes)
        parts = deal(
            sizes,
            num_ranks=world_size,
            num_nodes=num_nodes if at_home else 1,
            node=nodes if at_home else None,
        )
        ranks = [
            [_pack(np.sort(places), drawn) for places in bins]
            for bins in pack_ranks(sizes, parts, budgets)
        ]
        most = max(map(len, ranks))
        return tuple((*packs, *[()] * (most - len(packs))) for packs in ranks)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The records of a step in plan order, before they are dealt."""

    turns: list[int]  # index of the source of each turn
    records: Ints  # (batch_size,), as all below
    passes: Ints
    lanes: Ints
    sizes: Ints  # (batch_size, 2): bounds of tokens and patches


def _pack(places: Ints, drawn: _Drawn) -> Pack:
    records, passes = drawn.records[places], drawn.passes[places]
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
