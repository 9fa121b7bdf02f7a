"""Spikes, skipped steps, the watchdog, and every way a pre-flight can fail."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cocoa_dist.config import GradCacheConfig, GuardsConfig
from cocoa_dist.data.fullest import Fullest
from cocoa_dist.distributed import Exchange
from cocoa_dist.runtime import EXIT_HUNG, random_state
from cocoa_dist.train import preflight
from cocoa_dist.train.engine import Term, TrainEngine
from cocoa_dist.train.guards import SpikeDetector, check_skips, name_records, recent_losses
from cocoa_dist.train.watchdog import Watchdog, Whereabouts

GIB = 2**30


def falling_losses(count: int, *, seed: int = 0) -> list[float]:
    noise = np.random.default_rng(seed).normal(size=count)
    return [2.0 + 3.0 * 0.97**i + 0.05 * noise[i] for i in range(count)]


def test_a_jump_is_a_spike_and_a_noisy_fall_is_none() -> None:
    detector = SpikeDetector(GuardsConfig())
    found = [detector.deviations(loss) for loss in falling_losses(400)]
    assert found[:16] == [None] * 16
    assert not any(detector.is_spike(above) for above in found)
    jump = detector.deviations(5.0)
    assert jump is not None
    assert jump > 30
    assert detector.is_spike(jump)


def test_one_spike_does_not_hide_the_next() -> None:
    detector = SpikeDetector(GuardsConfig(), history=falling_losses(400))
    assert all(detector.is_spike(detector.deviations(9.0)) for _ in range(8))


def test_a_loss_that_hardly_moves_makes_no_spike_of_a_ripple() -> None:
    detector = SpikeDetector(GuardsConfig(), history=[1.0] * 64)
    assert not detector.is_spike(detector.deviations(1.005))
    assert detector.is_spike(detector.deviations(1.1))


def test_a_loss_that_is_not_finite_is_not_taken_into_the_window() -> None:
    detector = SpikeDetector(GuardsConfig(), history=[1.0] * 20)
    assert detector.deviations(float("nan")) is None
    assert detector.deviations(float("inf")) is None
    assert list(detector.recent) == [1.0] * 20


def test_a_window_of_zero_turns_the_comparison_off() -> None:
    detector = SpikeDetector(GuardsConfig(spike_window=0), history=[1.0] * 64)
    assert detector.deviations(1e9) is None


def test_losses_before_an_interruption_are_read_back(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"stage": "a", "step": i, "loss": float(i)} for i in range(5)]
    lines[2]["loss"] = None
    lines.append({"stage": "b", "step": 1, "loss": 7.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recent_losses(path, stage="a", count=3) == [1.0, 3.0, 4.0]
    assert recent_losses(tmp_path / "absent.jsonl", stage="a", count=3) == []


def skips(tmp_path, *, in_a_row: int, in_stage: int) -> None:
    check_skips(
        GuardsConfig(max_skipped_in_a_row=3, max_skipped=5),
        stage="contrastive",
        step=40,
        in_a_row=in_a_row,
        in_stage=in_stage,
        records=["rec-7", "rec-9"],
        listed_in=tmp_path / "skipped",
    )


def test_skipped_steps_stop_the_run_at_either_limit_and_name_records(tmp_path) -> None:
    skips(tmp_path, in_a_row=2, in_stage=4)
    with pytest.raises(
        ValueError, match=r"3 steps in a row .*step 40 of contrastive.*rec-7, rec-9"
    ):
        skips(tmp_path, in_a_row=3, in_stage=3)
    with pytest.raises(ValueError, match=r"5 steps in the stage .*guards\.max_skipped=5"):
        skips(tmp_path, in_a_row=1, in_stage=5)


def test_a_long_list_of_records_is_cut_for_a_message() -> None:
    assert name_records(["a", "b"]) == "a, b"
    assert name_records([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def with_free_bytes(monkeypatch, free: int) -> None:
    found = SimpleNamespace(f_blocks=100 * GIB, f_bfree=free, f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: found)


def test_a_disk_without_room_for_two_checkpoints_is_refused_in_numbers(
    monkeypatch, tmp_path
) -> None:
    with_free_bytes(monkeypatch, 3 * GIB)
    preflight.check_disk(tmp_path, needed=3 * GIB, keep_last=2)
    message = (
        r"has 3\.00 GiB free, 2 checkpoints, one with all weights, need 3\.50 GiB: "
        r".*keep_last \(now 2\)"
    )
    with pytest.raises(ValueError, match=message):
        preflight.check_disk(tmp_path, needed=3 * GIB + GIB // 2, keep_last=2)


def test_a_run_folder_that_takes_no_file_is_refused(tmp_path) -> None:
    preflight.check_write(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the folder belongs")
    with pytest.raises(ValueError, match=r"takes no file of 65536 bytes: .*another --run-dir"):
        preflight.check_write(tmp_path / "run")


def test_a_disk_that_returns_other_bytes_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: b"other")
    with pytest.raises(ValueError, match="read back 5 bytes unlike the 65536 written"):
        preflight.check_write(tmp_path)


def test_a_wrong_sum_over_the_ranks_is_refused(monkeypatch) -> None:
    preflight.check_collective()
    monkeypatch.setattr(preflight, "sum_over_ranks", lambda values: values + 1)
    with pytest.raises(ValueError, match="all-reduce of 1 to 1 gave 2 on rank 0, expected 1"):
        preflight.check_collective()


PACK = SimpleNamespace(num_tokens=8192, pixel_values=torch.zeros(40, 2))


def engine_that(accumulate, **attributes) -> SimpleNamespace:
    engine = SimpleNamespace(discarded=0, **attributes)
    engine.accumulate = accumulate

    def discard() -> None:
        engine.discarded += 1

    engine.discard_gradients = discard
    return engine


def test_the_largest_pack_leaves_generators_and_gradients_as_they_were() -> None:
    def accumulate(packs):
        torch.rand(3), np.random.rand(3)  # as dropout would
        return {"text": Term(2.0 * len(packs), 1.0)}

    engine, before = engine_that(accumulate), random_state()
    assert preflight.loss_of_pack(engine, PACK, held=3) == 6.0
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["numpy"][2:] == after["numpy"][2:]
    assert engine.discarded == 1


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 GiB",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_a_pack_that_does_not_fit_into_memory_says_what_to_lower(message) -> None:
    def accumulate(packs):
        raise RuntimeError(message)

    expected = (
        r"largest pack of the stage \(8192 tokens, 40 patches, 2 at once\) does not fit into "
        r"memory .*data\.tokens_per_pack"
    )
    with pytest.raises(ValueError, match=expected):
        preflight.loss_of_pack(engine_that(accumulate), PACK, held=2)


def test_another_error_of_the_largest_pack_passes_unchanged() -> None:
    def accumulate(packs):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        preflight.loss_of_pack(engine_that(accumulate), PACK, held=1)


def packs_with(*losses: float):
    """Make an engine whose n-th pack has the n-th loss, and what makes its packs."""
    left = list(losses)
    engine = engine_that(lambda packs: {"text": Term(left.pop(0), 1.0)})

    def fullest(without):
        number = len(without)
        if number == len(losses):
            return None
        return Fullest(PACK, "emoji", (*without, number), (*(f"k{i}" for i in without), "k"))

    return engine, fullest


@pytest.mark.parametrize("losses", [(math.nan, math.inf), (math.nan,)], ids=["two", "no_second"])
def test_a_largest_pack_with_a_loss_that_is_not_finite_is_refused(losses) -> None:
    engine, fullest = packs_with(*losses)
    with pytest.raises(ValueError, match=r"loss of the largest pack .* is nan: are the weights"):
        preflight.check_fullest_pack(engine, fullest, held=1)
    assert engine.discarded == len(losses)


def test_a_record_whose_loss_is_not_finite_is_named_and_does_not_stop_the_run(caplog) -> None:
    engine, fullest = packs_with(math.nan, 2.0)
    assert preflight.check_fullest_pack(engine, fullest, held=1) is PACK
    assert "the loss of the largest pack is nan" in caplog.text
    assert "It is among k of emoji" in caplog.text
    assert engine.discarded == 2


@pytest.mark.parametrize(
    ("step_wide", "mode", "held"),
    [(False, "auto", 1), (True, "auto", 2), (True, "always", 2), (True, "never", 7)],
)
def test_as_many_packs_are_tried_as_a_step_keeps_at_once(step_wide, mode, held) -> None:
    engine = object.__new__(TrainEngine)
    engine.objective = SimpleNamespace(step_wide=step_wide)
    engine.grad_cache = GradCacheConfig(mode=mode, packs=2)
    assert preflight.packs_held(engine, 7) == held
    assert preflight.packs_held(engine, 1) == 1


SLEEPER = """
import sys, time
from pathlib import Path
from cocoa_dist.train.watchdog import Watchdog

def load_something_forever():
    time.sleep(60)

with Watchdog(seconds=0.5, stacks=Path(sys.argv[1]), rank=3) as watchdog:
    for _ in range(12):
        watchdog.beat("warming up")
        time.sleep(0.1)
    watchdog.beat("loading step 5")
    load_something_forever()
"""


def sleep_under_a_watchdog(stacks) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SLEEPER, str(stacks)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_rank_that_hangs_dumps_its_stacks_and_leaves_with_its_own_code(tmp_path) -> None:
    stacks = tmp_path / "logs" / "stage.rank3.stacks"
    done = sleep_under_a_watchdog(stacks)
    assert done.returncode == EXIT_HUNG
    line = done.stderr.splitlines()[-1]
    assert line.startswith("HangError: no progress for ")
    assert "in loading step 5: rank 3 is in load_something_forever (<string>:" in line
    assert str(stacks) in line
    dump = stacks.read_text()
    assert "load_something_forever" in dump
    assert dump.count("hread 0x") >= 2  # the watchdog's own thread as well


@pytest.mark.slow
def test_a_rank_that_hangs_leaves_also_when_the_stacks_cannot_be_written(tmp_path) -> None:
    (tmp_path / "logs").write_text("no folder")
    done = sleep_under_a_watchdog(tmp_path / "logs" / "stacks")
    assert done.returncode == EXIT_HUNG
    assert "stacks could not be written: " in done.stderr


def test_a_collective_is_named_with_the_function_that_called_it() -> None:
    scope: dict[str, object] = {"look": lambda: Whereabouts.of(sys._getframe(1))}
    theirs = "def all_reduce():\n    return look()\n"
    exec(compile(theirs, "/x/torch/distributed/distributed_c10d.py", "exec"), scope)
    ours = "def sum_over_ranks():\n    return all_reduce()\n"
    exec(compile(ours, "/x/cocoa_dist/distributed.py", "exec"), scope)
    where = scope["sum_over_ranks"]()
    expected = (
        "waits for the other ranks in all_reduce, called by sum_over_ranks (distributed.py:2)"
    )
    assert where.describe() == expected


def test_a_rank_that_reads_an_exchange_waits_for_the_others() -> None:
    """Nothing of torch's is on its stack: it waits in C++, and is not to blame."""
    seen = []
    exchange = Exchange("text", max_bytes=10)
    wait = lambda: seen.append(Whereabouts.of(sys._getframe(1)))  # noqa: E731
    exchange._work = SimpleNamespace(wait=wait)
    assert exchange.read() == ["text"]
    assert seen[0].describe().startswith("waits for the other ranks in Exchange.read")


def test_a_watchdog_that_is_turned_off_never_fires(tmp_path) -> None:
    with Watchdog(seconds=float("inf"), stacks=tmp_path / "stacks", rank=0):
        time.sleep(0.5)  # of ticks
    assert not (tmp_path / "stacks").exists()
