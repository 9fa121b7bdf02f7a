"""The plan: every record once a pass, the same on any world size, equal work on every rank."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_dist.data.order import (
    BLOCK_STEPS,
    PlanSource,
    StepAssignment,
    StepPlan,
    greedy_knapsack,
    largest_remainder,
    permute,
    snake,
)


def source(name: str = "a", count: int = 50, weight: float = 1.0, seed: int = 0) -> PlanSource:
    random = np.random.default_rng(seed)
    return PlanSource(
        name=name,
        weight=weight,
        tokens=random.integers(10, 60, count),
        patches=random.integers(0, 5, count) * 16,
    )


def plan(*sources: PlanSource, **changes: object) -> StepPlan:
    fields: dict[str, object] = {
        "sources": sources or (source(),),
        "batch_size": 12,
        "seed": 3,
        "stage": "s",
        "tokens_per_pack": 150,
        "patches_per_pack": 256,
    }
    return StepPlan(**(fields | changes))  # type: ignore[arg-type]


def content(assignment: StepAssignment) -> list[tuple[int, int, int]]:
    """Records of a step as the ranks got them, in plan order."""
    slots = [slot for packs in assignment.ranks for pack in packs for slot in pack]
    return sorted((slot.position, slot.record, slot.passes) for slot in slots)


@given(size=st.integers(1, 300), key=st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_permutation_hits_every_record_once(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size=size, key=key).tolist()) == list(range(size))


def test_permutations_of_large_sets_stay_inside_and_do_not_collide() -> None:
    size = 10**9 + 7
    found = permute(np.arange(5000), size=size, key="k")
    assert len(set(found.tolist())) == 5000
    assert 0 <= found.min() < found.max() < size


def test_permutations_look_random() -> None:
    """Neighbours end up a third of the set apart on average, as for random pairs; 5 sigma."""
    size = 4000
    found = permute(np.arange(size), size=size, key="k")
    assert np.abs(np.diff(found)).mean() == pytest.approx(size / 3, rel=0.06)
    other = permute(np.arange(size), size=size, key="l")
    assert (found == other).sum() < 10


@pytest.mark.parametrize("batch_size", [12, 50, 120], ids=["part", "whole", "more than a pass"])
def test_every_record_comes_exactly_once_in_a_pass(batch_size: int) -> None:
    steps = plan(batch_size=batch_size)
    records: list[tuple[int, int]] = []
    for step in range(1, 2 + 3 * 50 // batch_size):
        assignment = steps.step(step, 1)
        records += list(zip(assignment.passes, assignment.record_ids, strict=True))
    for one_pass in range(2):
        inside = [record for number, record in records if number == one_pass]
        assert sorted(inside) == list(range(50))


def test_passes_have_different_orders() -> None:
    steps = plan(batch_size=50)
    assert steps.step(1, 1).record_ids != steps.step(2, 1).record_ids


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_a_step_is_the_same_on_any_world_size(world_size: int) -> None:
    for step in (1, 2, 17):
        one, many = plan().step(step, 1), plan().step(step, world_size)
        assert content(many) == content(one)
        assert (many.digest, many.record_ids) == (one.digest, one.record_ids)
        assert [record for _, record, _ in content(many)] == list(many.record_ids)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_have_equal_numbers_of_records_and_of_packs(world_size: int) -> None:
    for step in range(1, 40):
        ranks = plan().step(step, world_size).ranks
        assert {sum(map(len, packs)) for packs in ranks} == {12 // world_size}
        assert len({len(packs) for packs in ranks}) == 1


def test_a_rank_with_fewer_packs_gets_empty_ones() -> None:
    lengths = np.array([100, 10, 100, 10, 100, 10])
    skewed = PlanSource(name="a", weight=1.0, tokens=lengths, patches=np.zeros(6, dtype=np.int64))
    ranks = plan(skewed, batch_size=6, tokens_per_pack=120).step(1, 2).ranks
    assert [len(packs) for packs in ranks] == [2, 2]
    assert sorted(len(pack) for packs in ranks for pack in packs)[0] == 0
    assert {sum(map(len, packs)) for packs in ranks} == {3}


def test_packs_keep_both_budgets() -> None:
    one = source()
    for step in range(1, 20):
        for pack in itertools.chain(*plan(one).step(step, 2).ranks):
            assert sum(int(one.tokens[slot.record]) for slot in pack) <= 150
            assert sum(int(one.patches[slot.record]) for slot in pack) <= 256


def test_digest_differs_between_steps_and_passes() -> None:
    small = plan(source(count=12))
    digests = {small.step(step, 1).digest for step in range(1, 30)}
    assert len(digests) == 29


def test_blends_are_exact_in_every_block() -> None:
    blend = plan(source("a", weight=3.0), source("b", weight=1.0), source("c", weight=0.004))
    counted: Counter[str] = Counter()
    for step in range(1, BLOCK_STEPS + 1):
        counted[blend.step(step, 1).dataset] += 1
    assert counted == {"a": 749, "b": 250, "c": 1}


def test_sources_of_a_blend_are_seen_without_loss_or_repeat() -> None:
    blend = plan(source("a", 50, 3.0), source("b", 31, 1.0))
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(1, 60):
        assignment = blend.step(step, 1)
        seen[assignment.dataset] += assignment.record_ids
    for name, count in (("a", 50), ("b", 31)):
        assert sorted(seen[name][:count]) == list(range(count))
        assert len(set(seen[name][count : 2 * count])) == len(seen[name][count : 2 * count])


def test_a_block_goes_on_where_the_last_one_ended() -> None:
    blend = plan(source("a", 50, 1.0), source("b", 31, 1.0))
    last: dict[str, int] = {}
    for step in range(BLOCK_STEPS - 20, BLOCK_STEPS + 20):
        index, before = blend._source_of(step)
        assert before == last.get(str(index), before - 1) + 1
        last[str(index)] = before


def test_a_source_that_would_get_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="source 'b' has so little weight"):
        plan(source("a", weight=1.0), source("b", weight=1e-6))


def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_work() -> None:
    with pytest.raises(ValueError, match=r"batch_size 12 .* by 5 processes.* 1, 2, 3, 4, 6, 12"):
        plan().step(1, 5)


def test_a_record_larger_than_a_pack_is_refused_by_number() -> None:
    big = source()
    big.tokens[7] = 999
    with pytest.raises(ValueError, match=r"record 7 of source 'a' can have 999 tokens"):
        plan(big)


def test_state_names_the_plan_and_fits_into_a_manifest() -> None:
    steps = plan()
    state = json.loads(json.dumps(steps.state(18)))
    assert steps.check_state(state) == 18
    assert len(json.dumps(state)) < 1024


@pytest.mark.parametrize(
    "changes",
    [{"seed": 4}, {"batch_size": 6}, {"stage": "t"}, {"sources": (source(count=51),)}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_of_another_plan_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="have changed"):
        plan(**changes).check_state(plan().state(2))


def test_budgets_may_change_at_a_resume() -> None:
    assert plan(tokens_per_pack=500).check_state(plan().state(2)) == 2


def test_largest_remainder_adds_up() -> None:
    assert largest_remainder([1, 1, 1], total=1000).tolist() == [334, 333, 333]
    assert largest_remainder([3, 1], total=8).tolist() == [6, 2]


def test_snake_balances() -> None:
    load = np.random.default_rng(0).random(240)
    lanes = snake(load, 4)
    assert sorted(np.concatenate(lanes).tolist()) == list(range(240))
    sums = [load[lane].sum() for lane in lanes]
    assert max(sums) / min(sums) < 1.02


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), max_size=60),
    budgets=st.tuples(st.integers(50, 120), st.integers(30, 90)),
)
@settings(max_examples=80, deadline=None)
def test_knapsack_keeps_budgets_and_loses_nothing(
    lengths: list[tuple[int, int]], budgets: tuple[int, int]
) -> None:
    sizes = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    bins = greedy_knapsack(sizes, budgets)
    assert sorted(index for inside in bins for index in inside.tolist()) == list(range(len(sizes)))
    for inside in bins:
        assert (sizes[inside].sum(axis=0) <= np.array(budgets)).all()


def test_knapsack_fills_well() -> None:
    """A window of 256 lengths like these filled 97 % and more in a benchmark of packing rules."""
    sizes = np.random.default_rng(0).integers(50, 2000, (256, 1))
    bins = greedy_knapsack(sizes, [8192])
    assert sizes.sum() / (8192 * len(bins)) > 0.95


def test_knapsack_names_an_item_that_is_too_large() -> None:
    with pytest.raises(ValueError, match="item 1 has size"):
        greedy_knapsack(np.array([[1, 1], [9, 1]]), [8, 8])
