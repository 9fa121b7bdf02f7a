"""The largest pack that fits is foretold from two smaller ones, and named before the first step."""

from mmap import mmap
from types import SimpleNamespace

import pytest
import torch
from test_fullest import loader

from cocoa_dist.config import load_recipe
from cocoa_dist.data.fullest import Fullest, fullest_pack
from cocoa_dist.train import pack_memory, preflight
from cocoa_dist.train.engine import Term
from cocoa_dist.train.pack_memory import Foretold, HostMeter, advice, foretell

FULL = (8192, 32768)  # tokens and patches
FIXED, ROW = 300 * 2**20, 16 * 2**10  # bytes whatever the pack is, and of a token


def pack_of(rows: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(num_tokens=rows[0], pixel_values=torch.empty(rows[1], 0))


class FakeMeter:
    """Says what a linear model takes."""

    def __init__(self, room: float) -> None:
        self.tried: list[int] = []
        self._room = int(room)

    def begin(self) -> None:
        pass

    def peak(self) -> int:
        return FIXED + ROW * self.tried[-1]

    def room(self) -> int:
        return self._room

    def run(self, pack) -> None:
        self.tried.append(pack.num_tokens)


def foretold(room: float) -> tuple[Foretold | None, FakeMeter]:
    meter = FakeMeter(room)
    return foretell(pack_of(FULL), pack_of, meter.run, by=meter), meter


def test_a_line_through_two_packs_says_what_the_whole_takes() -> None:
    found, meter = foretold(2**30)
    assert meter.tried == [2048, 4096]  # never the whole
    assert found is not None
    assert found.fixed == pytest.approx(FIXED)
    assert found.whole == pytest.approx(ROW * FULL[0])
    assert found.fits


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_largest_budget_that_fits_is_named(share) -> None:
    room = (FIXED + share * ROW * FULL[0]) / 0.95
    found, _ = foretold(room)
    assert found is not None
    assert found.fits == (FIXED + ROW * FULL[0] <= room)
    text = advice(found, budgets=FULL, full=pack_of(FULL))
    named = int(text.split("data.tokens_per_pack=")[1].split()[0])
    assert named % 64 == 0
    assert share * FULL[0] - 64 <= named <= share * FULL[0] + 1
    assert FIXED + ROW * named <= 0.95 * room
    assert int(text.split("data.patches_per_pack=")[1]) == pytest.approx(4 * named, abs=4 * 64)


def test_without_room_for_the_model_alone_no_pack_fits() -> None:
    found, _ = foretold(FIXED / 2)
    assert found is not None
    assert found.share == 0.0
    assert advice(found, budgets=FULL, full=pack_of(FULL)).endswith("no pack fits")


def test_where_memory_is_not_measured_nothing_is_tried_and_nothing_said() -> None:
    tried: list[object] = []
    found = foretell(pack_of(FULL), pack_of, tried.append, by=None)
    assert (found, tried) == (None, [])
    assert advice(found, budgets=FULL, full=pack_of(FULL)) == ""
    alone = foretell(pack_of(FULL), lambda room: None, tried.append, by=FakeMeter(1))
    assert (alone, tried) == (None, [])


def test_packs_that_the_allocator_hides_do_not_grow_downwards() -> None:
    found = Foretold.through((0.25, 0.5), (900, 800), room=1000)
    assert (found.fixed, found.whole, found.fits) == (800, 0.0, True)


def test_a_host_measures_what_is_really_taken() -> None:
    """64 MiB that are written; 20 %: what else the process does in between.

    From the system itself: a tensor may lie where the tests before left resident memory free.
    """
    meter = pack_memory.meter()
    assert isinstance(meter, HostMeter)
    meter.begin()
    before = meter.peak()
    with mmap(-1, 64 * 2**20) as taken:
        for _ in range(64):
            taken.write(bytes(2**20))
    assert meter.peak() - before == pytest.approx(64 * 2**20, rel=0.2)
    assert meter.room() > meter.peak() - 64 * 2**20 * 1.2


@pytest.mark.parametrize("stage", ["joint_reconstruction", "contrastive"])
def test_a_smaller_pack_is_as_large_as_it_may_be(stage, tmp_path) -> None:
    config = load_recipe("debug", ["data.tokens_per_pack=640", f"stages.{stage}.batch_size=96"])
    made = loader(config, stage, tmp_path)
    full = fullest_pack(made, world_size=1)
    assert full is not None
    half = (full.pack.num_tokens // 2, len(full.pack.pixel_values) // 2)
    found = fullest_pack(made, world_size=1, room=half)
    assert found is not None
    assert 0.8 * half[0] <= found.pack.num_tokens <= half[0]
    assert len(found.pack.pixel_values) <= half[1]


def test_a_budget_that_will_not_fit_is_refused_before_it_is_tried(monkeypatch) -> None:
    """The engine is asked for two small packs; the large one would have ended the process."""
    meter = FakeMeter((FIXED + 0.5 * ROW * FULL[0]) / 0.95)
    monkeypatch.setattr(preflight, "meter", lambda: meter)
    engine = SimpleNamespace(discard_gradients=lambda: None)

    def accumulate(packs):
        meter.run(packs[0])
        return {"text": Term(1.0, 1.0)}

    engine.accumulate = accumulate
    trial = preflight.Trial(
        fullest=lambda without: None,
        packs_a_step=2,
        smaller=lambda room: Fullest(pack_of(room), "emoji", (), ()),
        budgets=FULL,
    )
    expected = (
        r"largest pack of the stage \(8192 tokens, 32768 patches, 2 at once\) would not fit into "
        r"memory: 0.42 GiB are needed, .* the largest that fits is data.tokens_per_pack=4032 "
        r"data.patches_per_pack=16\d\d\d\. Lower"
    )
    with pytest.raises(ValueError, match=expected):
        preflight.check_memory(engine, trial, pack_of(FULL), held=2)
    assert max(meter.tried) == 4096
