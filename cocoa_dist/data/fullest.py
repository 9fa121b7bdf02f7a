"""The fullest pack a stage can meet, made of real records, to try its memory before step 1."""

import numpy as np

from cocoa_dist.batch import PackedBatch
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.order import PlanSource, Slot, StepPlan, greedy_knapsack


def fullest_pack(loader: StageLoader, *, world_size: int) -> PackedBatch:
    """Build one pack of the largest records that fit together; the same on every rank.

    No step is taken from the loader. Never raises for what a record holds.
    """
    dataset = loader._dataset
    source, slots = fullest_slots(loader.plan, world_size=world_size)
    encoder = dataset._encoder
    draft = encoder._encode_pack(slots, dataset._sources[source], keys=[], bad=[])
    return encoder._build(draft)


def fullest_slots(plan: StepPlan, *, world_size: int) -> tuple[str, tuple[Slot, ...]]:
    """Return a source and the records of its fullest pack: what a rank's share can at most be."""
    found = [(source, _fullest(source, plan, world_size)) for source in plan.sources]
    source, records = max(found, key=lambda pair: float(_load(pair[0], plan)[pair[1]].sum()))
    slots = tuple(Slot(position, int(record), 0) for position, record in enumerate(records))
    return source.name, slots


def _fullest(source: PlanSource, plan: StepPlan, world_size: int) -> list[int]:
    """Fill one pack with the largest records, as `order.py` fills packs."""
    largest = np.argsort(-_load(source, plan), kind="stable")[: plan.batch_size // world_size]
    sizes = np.stack([source.tokens[largest], source.patches[largest]], axis=1)
    first = greedy_knapsack(sizes, (plan.tokens_per_pack, plan.patches_per_pack))[0]
    return [int(record) for record in largest[np.sort(first)]]


def _load(source: PlanSource, plan: StepPlan) -> np.ndarray:
    """Return the share of a pack that each record can take, the larger of both budgets'."""
    shares = (source.tokens / plan.tokens_per_pack, source.patches / plan.patches_per_pack)
    return np.maximum(*shares)
