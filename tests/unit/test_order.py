"""The plan: every record once a pass, the same on any world size, equal work on every rank."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_dist.data.order import (
    BLOCK_STEPS,
    PlanSource,
    StepAssignment,
    StepPlan,
    largest_remainder,
)
from cocoa_dist.data.shuffle import Shuffle


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
        ((index, before),) = blend._turns_of(step)
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
    assert state["next_step"] == 18
    assert steps.resumed(state).plan_hash == steps.plan_hash
    assert len(json.dumps(state)) < 1024


@pytest.mark.parametrize(
    "changes",
    [{"seed": 4}, {"batch_size": 6}, {"stage": "t"}, {"sources": (source(count=51),)}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_of_another_plan_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="have changed"):
        plan(**changes).resumed(plan().state(2))


def test_budgets_may_change_at_a_resume() -> None:
    assert plan(tokens_per_pack=500).resumed(plan().state(2)).start_step == 1


def test_largest_remainder_adds_up() -> None:
    assert largest_remainder([1, 1, 1], total=1000).tolist() == [334, 333, 333]
    assert largest_remainder([3, 1], total=8).tolist() == [6, 2]


SMALL = Shuffle(block_records=4, window_blocks=6, lanes=3)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4])
def test_the_number_of_nodes_moves_no_record(num_nodes: int) -> None:
    steps = plan(source(count=200), shuffle=SMALL)
    for step in (1, 5, 33):
        one, many = steps.step(step, 1), steps.step(step, 12, num_nodes=num_nodes)
        assert content(many) == content(one)
        assert {sum(map(len, packs)) for packs in many.ranks} == {1}


def test_a_block_is_read_by_one_node_but_for_a_few_swaps() -> None:
    """Sizes are equal, so that nothing has to be swapped; three nodes share three lanes."""
    even = PlanSource(name="a", weight=1.0, tokens=np.full(20_000, 10), patches=np.full(20_000, 4))
    shuffle = Shuffle(block_records=16, window_blocks=60, lanes=6)
    steps = plan(even, batch_size=96, shuffle=shuffle)
    readers: dict[int, set[int]] = {}
    for step in range(1, 60):
        for rank, packs in enumerate(steps.step(step, 6, num_nodes=3).ranks):
            for slot in itertools.chain(*packs):
                readers.setdefault(slot.record // 16, set()).add(rank // 2)
    assert len(readers) > 300
    assert {len(nodes) for nodes in readers.values()} == {1}


def test_ranks_have_equal_work_in_tokens_and_patches() -> None:
    random = np.random.default_rng(0)
    many = PlanSource(
        name="a",
        weight=1.0,
        tokens=np.clip(random.lognormal(5.2, 0.6, 50_000), 20, 4000).astype(np.int64),
        patches=np.clip(random.normal(800, 300, 50_000), 100, 4000).astype(np.int64),
    )
    steps = plan(many, batch_size=4096, tokens_per_pack=8192, patches_per_pack=32768)
    for num_nodes in (1, 4):
        ranks = steps.step(3, 64, num_nodes=num_nodes).ranks
        for bounds in (many.tokens, many.patches):
            sums = [sum(int(bounds[s.record]) for p in packs for s in p) for packs in ranks]
            assert max(sums) / np.mean(sums) <= 1.02


def taken(steps: StepPlan, first: int, last: int) -> dict[str, list[tuple[int, int]]]:
    """What each source gave in some steps: (pass, record)."""
    seen: dict[str, list[tuple[int, int]]] = {}
    for step in range(first, last + 1):
        one = steps.step(step, 1)
        records = zip(one.passes, one.record_ids, strict=True)
        seen.setdefault(one.dataset, []).extend(records)
    return seen


CHANGES = {
    "weights": {"sources": (source("a", 50, 1.0), source("b", 200, 3.0))},
    "batch size": {"sources": (source("a", 50, 3.0), source("b", 200, 1.0)), "batch_size": 20},
    "one more": {"sources": (source("a", 50), source("b", 200), source("c", 30))},
    "one less": {"sources": (source("b", 200),)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_blend_goes_on_where_each_source_stands(change: dict[str, object]) -> None:
    before = plan(source("a", 50, 3.0), source("b", 200, 1.0))
    state = json.loads(json.dumps(before.state(8)))
    after = plan(**change).resumed(state, may_change=True)
    assert after.start_step == 8
    old, new = taken(before, 1, 7), taken(after, 8, 60)
    for name in new:
        both = old.get(name, []) + new[name]
        assert len(both) == len(set(both))  # nothing twice in a pass
        count = {"a": 50, "b": 200, "c": 30}[name]
        whole = [record for one_pass, record in both if one_pass == 0]
        if len(both) >= count:
            assert sorted(whole) == list(range(count))  # and nothing lost


def test_a_new_segment_is_resumed_as_it_is_and_changed_again() -> None:
    first = plan(source("a", 50, 3.0), source("b", 200, 1.0))
    second = plan(source("b", 200)).resumed(first.state(8), may_change=True)
    assert second.step(11, 1) == second.resumed(second.state(11)).step(11, 1)
    again = plan(source("b", 200)).resumed(second.state(11))
    assert (again.start_step, again.plan_hash) == (8, second.plan_hash)
    third = plan(source("a", 50), source("b", 200)).resumed(second.state(11), may_change=True)
    assert third.cursors_at(11) == {
        "a": first.cursors_at(8)["a"],  # it had left the blend and kept its place
        "b": second.cursors_at(11)["b"],
    }
    assert len(json.dumps(third.state(20))) < 1024


def test_other_data_under_an_old_name_has_no_place_to_go_on_from() -> None:
    old = PlanSource("a", 1.0, np.full(50, 10), np.full(50, 0), fingerprint="1" * 64)
    new = PlanSource("a", 1.0, np.full(70, 10), np.full(70, 0), fingerprint="2" * 64)
    with pytest.raises(ValueError, match=r"source 'a' had another data .* a name of its own"):
        plan(new).resumed(plan(old).state(5), may_change=True)


def test_a_source_that_comes_back_as_other_data_has_no_place_to_go_on_from() -> None:
    begun = plan(source("a"), source("b")).state(next_step=20)
    without = plan(source("a")).resumed(begun, may_change=True)
    later = without.resumed(json.loads(json.dumps(without.state(30))))  # resumed in between
    state = json.loads(json.dumps(later.state(40)))
    again = plan(source("a"), source("b")).resumed(state, may_change=True)
    assert again.cursors["b"] == begun["cursors"]["b"]
    other = replace(source("b", count=70), fingerprint="other")
    with pytest.raises(ValueError, match=r"source 'b' had another data .* a name of its own"):
        plan(source("a"), other).resumed(state, may_change=True)


def test_more_or_fewer_records_of_the_same_data_have_no_place_to_go_on_from() -> None:
    """Another limit is another permutation: records would come twice, and others never."""
    state = json.loads(json.dumps(plan(source("a", 50)).state(5)))
    with pytest.raises(
        ValueError, match=r"source 'a' had another number of records \(50, now 70\)"
    ):
        plan(source("a", 70)).resumed(state, may_change=True)
    assert plan(source("a", 70)).resumed({**state, "cursors": {}}, may_change=True)  # not begun


def test_what_is_left_out_keeps_its_place() -> None:
    whole, without = source(), source()
    without = PlanSource("a", 1.0, without.tokens, without.patches, left_out="digest")
    after = plan(without).resumed(plan(whole).state(3), may_change=True)
    assert after.plan_hash != plan(whole).plan_hash
    assert after.step(3, 1).record_ids == plan(whole).step(3, 1).record_ids


@pytest.mark.parametrize(
    ("state", "message"),
    [({"next_step": 0}, "next_step 0"), ({"next_step": 3}, "no cursors: another version")],
)
def test_a_state_that_is_none_is_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan().resumed(state)


def test_a_step_before_the_segment_is_refused() -> None:
    after = plan(batch_size=20).resumed(plan().state(5), may_change=True)
    with pytest.raises(ValueError, match="step 4, expected one from 5 on"):
        after.step(4, 1)


# --- Blocks of one task


def blended(block: int | None = 4, **changes: object) -> StepPlan:
    sources = (source("a", 50, 3.0), source("b", 201, 2.0, seed=1), source("c", 30, 1.0, seed=2))
    return plan(*sources, batch_size=24, task_block=block, **changes)


@pytest.mark.parametrize("block", [1, 4, 6, 24])
def test_every_block_is_of_one_source_and_quotas_are_exact_in_blocks(block: int) -> None:
    steps, per_step = blended(block), 24 // block
    counted: Counter[str] = Counter()
    for step in range(1, BLOCK_STEPS + 1):
        names = steps.step(step, 1).datasets
        blocks = [set(names[at : at + block]) for at in range(0, 24, block)]
        assert {len(one) for one in blocks} == {1}
        counted.update(name for one in blocks for name in one)
    total = BLOCK_STEPS * per_step
    expected = largest_remainder([3, 2, 1], total=total).tolist()
    assert [counted[name] for name in "abc"] == expected


def by_source(steps: StepPlan, first: int, last: int) -> dict[str, list[tuple[int, int]]]:
    """What each source gave in some steps, in plan order: (pass, record)."""
    seen: dict[str, list[tuple[int, int]]] = {}
    for step in range(first, last + 1):
        one = steps.step(step, 1)
        for name, passes, record in zip(one.datasets, one.passes, one.record_ids, strict=True):
            seen.setdefault(name, []).append((passes, record))
    return seen


def assert_each_once_a_pass(seen: dict[str, list[tuple[int, int]]]) -> None:
    for name, taken_records in seen.items():
        count = {"a": 50, "b": 201, "c": 30}[name]
        assert len(taken_records) == len(set(taken_records))
        for one_pass in range(taken_records[-1][0]):  # whole ones
            records = [record for number, record in taken_records if number == one_pass]
            assert sorted(records) == list(range(count))


@pytest.mark.parametrize("block", [1, 4, 8, 12])
def test_in_blocks_every_record_comes_once_in_a_pass(block: int) -> None:
    """Over the end of a cycle of BLOCK_STEPS too."""
    steps = blended(block)
    assert_each_once_a_pass(by_source(steps, 1, 60))
    near = by_source(steps, BLOCK_STEPS - 5, BLOCK_STEPS + 5)
    for taken_records in near.values():
        assert len(taken_records) == len(set(taken_records))
    before, after = (steps.cursors_at(step) for step in (BLOCK_STEPS - 5, BLOCK_STEPS + 6))
    assert {name: after[name] - before[name] for name in after} == {
        name: len(taken_records) for name, taken_records in near.items()
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 24])
def test_steps_in_blocks_are_the_same_on_any_world_size(world_size: int) -> None:
    for step in (1, 2, 17, BLOCK_STEPS + 3):
        one, many = blended().step(step, 1), blended().step(step, world_size)
        assert content(many) == content(one)
        assert (many.digest, many.record_ids, many.datasets) == (
            *(one.digest, one.record_ids),
            one.datasets,
        )
        assert {sum(map(len, packs)) for packs in many.ranks} == {24 // world_size}
        assert len({len(packs) for packs in many.ranks}) == 1


def test_ranks_have_equal_work_over_the_sources_of_a_step() -> None:
    """Records of a block may go anywhere: long ones of one task do not burden one rank."""
    short = PlanSource("a", 1.0, np.full(50_000, 20), np.full(50_000, 16))
    long = PlanSource("b", 1.0, np.full(50_000, 900), np.full(50_000, 1600))
    steps = plan(
        *(short, long),
        batch_size=2048,
        task_block=64,
        tokens_per_pack=8192,
        patches_per_pack=32768,
    )
    one = steps.step(1, 16)
    sizes = {"a": 20, "b": 900}
    sums = [sum(sizes[one.datasets[s.position]] for p in packs for s in p) for packs in one.ranks]
    assert max(sums) / np.mean(sums) <= 1.02


def test_blocks_are_mixed_and_digests_differ() -> None:
    steps = blended()
    mixed = [len(set(steps.step(step, 1).datasets)) for step in range(1, 30)]
    assert max(mixed) == 3
    assert len({steps.step(step, 1).digest for step in range(1, 100)}) == 99


def test_without_task_blocks_the_plan_is_what_it_was() -> None:
    """Figures of the version before task blocks."""
    steps = plan(source("a", 50, 3.0), source("b", 31, 1.0))
    assert steps.plan_hash == "49239e1d1258a144ea78cb2eb84968e8"
    assert steps.step(7, 2).digest == "8e3cecdc73f841ef8fa5adf4eaebab11"
    assert "task_block" not in json.dumps(steps.state(3))
    assert plan(source("a", 50, 3.0), source("b", 31, 1.0), task_block=12).plan_hash != (
        steps.plan_hash
    )


@pytest.mark.parametrize("step", [1, 2, 9, BLOCK_STEPS, BLOCK_STEPS + 1])
def test_steps_in_blocks_are_resumed_at_any_step(step: int) -> None:
    state = json.loads(json.dumps(blended().state(step)))
    assert blended().resumed(state).step(step, 3) == blended().step(step, 3)
    with pytest.raises(ValueError, match="have changed"):
        blended(6).resumed(state)


@pytest.mark.parametrize(("before", "after"), [(None, 4), (4, None), (4, 6)])
def test_blocks_may_begin_and_end_at_a_new_segment(before: int | None, after: int | None) -> None:
    first = blended(before)
    second = blended(after).resumed(json.loads(json.dumps(first.state(8))), may_change=True)
    assert second.start_step == 8
    old, new = by_source(first, 1, 7), by_source(second, 8, 60)
    assert_each_once_a_pass({name: old.get(name, []) + new[name] for name in new})
    third = blended(after).resumed(second.state(20))
    assert third.step(33, 2) == second.step(33, 2)


def test_a_block_that_a_source_cannot_fill_is_refused_with_counts() -> None:
    with pytest.raises(ValueError, match=r"task_block is 40, but source 'c' has 30 records"):
        plan(source("a"), source("c", 30), batch_size=80, task_block=40)


def test_a_batch_that_is_no_multiple_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 24 is not a multiple of .*task_block 5"):
        blended(5)


@given(
    block=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    step=st.integers(1, 3 * BLOCK_STEPS),
    counts=st.lists(st.integers(24, 300), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20.0), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_any_blend_in_blocks_keeps_its_promises(
    block: int, world: int, step: int, counts: list[int], weights: list[float]
) -> None:
    sources = [
        source(f"s{i}", count, weight, seed=i)
        for i, (count, weight) in enumerate(zip(counts, weights, strict=False))
    ]
    steps = plan(*sources, batch_size=24, task_block=block)
    one = steps.step(step, world)
    assert content(one) == content(steps.step(step, 1))
    assert len({(len(packs), sum(map(len, packs))) for packs in one.ranks}) == 1
    taken_now = {s.name: one.datasets.count(s.name) for s in sources}
    before, after = steps.cursors_at(step), steps.cursors_at(step + 1)
    assert {name: after[name] - before[name] for name in after} == taken_now
    for one_source in sources:  # its records of the step are those behind its cursor
        mine = [
            (passes, record)
            for name, passes, record in zip(one.datasets, one.passes, one.record_ids, strict=True)
            if name == one_source.name
        ]
        assert len(mine) == len(set(mine))
        expected = range(before[one_source.name], after[one_source.name])
        count = one_source.num_records
        assert [passes for passes, _ in mine] == [position // count for position in expected]
