"""The order of a pass: one to one, at random, and read in windows of blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_dist.data.shuffle import NO_LANE, Shuffle, lanes_at, permute, records_at


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


def test_streams_are_permuted_for_themselves() -> None:
    values = np.tile(np.arange(50), 3)
    streams = np.repeat([7, 8, 9], 50)
    found = permute(values, size=50, key="k", streams=streams).reshape(3, 50)
    for one in found:
        assert sorted(one.tolist()) == list(range(50))
    assert (found[0] == found[1]).sum() < 10


@given(
    size=st.integers(1, 3000),
    block=st.integers(1, 20),
    per_lane=st.integers(1, 5),
    lanes=st.integers(1, 7),
)
@settings(max_examples=150, deadline=None)
def test_a_pass_has_every_record_once(size: int, block: int, per_lane: int, lanes: int) -> None:
    shuffle = Shuffle(block_records=block, window_blocks=per_lane * lanes, lanes=lanes)
    found = records_at(np.arange(size), size=size, key="k", shuffle=shuffle)
    assert sorted(found.tolist()) == list(range(size))
    part = np.arange(size)[::-3]  # any positions, in any order
    assert (records_at(part, size=size, key="k", shuffle=shuffle) == found[part]).all()


SHUFFLE = Shuffle(block_records=8, window_blocks=12, lanes=4)
SIZE = 8 * (12 * 5 + 9) + 3  # five windows, a shorter one, a block and three records


def test_a_window_reads_its_blocks_and_no_others() -> None:
    found = records_at(np.arange(SIZE), size=SIZE, key="k", shuffle=SHUFFLE)
    windows = [set((found[w * 96 : w * 96 + 96] // 8).tolist()) for w in range(5)]
    assert [len(blocks) for blocks in windows] == [12] * 5
    assert len(set.union(*windows)) == 60
    assert sorted(windows[0]) != list(range(12))  # and they are not neighbours


def test_a_lane_reads_its_blocks_of_a_window_and_no_others() -> None:
    offsets = np.arange(SIZE)
    found = records_at(offsets, size=SIZE, key="k", shuffle=SHUFFLE)
    lanes = lanes_at(offsets, size=SIZE, shuffle=SHUFFLE)
    owners: dict[int, set[int]] = {}
    for record, lane in zip(found.tolist(), lanes.tolist(), strict=True):
        owners.setdefault(record // 8, set()).add(lane)
    assert {len(lanes) for lanes in owners.values()} == {1}
    assert (lanes == NO_LANE).sum() == 8 + 3  # a block that is left, and the records behind
    for begin in range(0, 5 * 96, 16):  # every batch has its share of each lane
        assert np.bincount(lanes[begin : begin + 16]).tolist() == [4] * 4


def test_passes_draw_other_blocks() -> None:
    one, two = (records_at(np.arange(96), size=SIZE, key=k, shuffle=SHUFFLE) for k in "kl")
    assert len(set((one // 8).tolist()) & set((two // 8).tolist())) < 8


def test_a_small_data_set_is_shuffled_as_a_whole() -> None:
    offsets = np.arange(96)
    found = records_at(offsets, size=96, key="k", shuffle=SHUFFLE)
    assert (found == permute(offsets, size=96, key="k")).all()
    assert (lanes_at(offsets, size=96, shuffle=SHUFFLE) == NO_LANE).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_blocks": 10, "lanes": 4}, "10 blocks .* 4 lanes: give a multiple"),
        ({"block_records": 0}, "numbers from 1 on"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shuffle(**fields)
