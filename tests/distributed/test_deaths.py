"""kill -9 at every exact moment of a save, a hand-over and a load: the run that would have been."""

import shutil
import signal
from pathlib import Path

import pytest
from incarnations import (
    NEXT_STAGE,
    STAGE,
    Incarnation,
    Moment,
    assert_same_run,
    end,
    history,
    left_overs,
)

from cocoa_dist.manifest import step_folders

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("first_stage") / "run"
    Incarnation(run_dir).finish()
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(first_stage, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(first_stage, run_dir)
    Incarnation(run_dir, stage=NEXT_STAGE).finish()
    return run_dir


def go_on_to_the_end(run_dir: Path, undisturbed: Path) -> None:
    Incarnation(run_dir).finish()
    assert_same_run(run_dir, undisturbed)
    assert left_overs(run_dir) == []


def steps_on_disk(run_dir: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in step_folders(run_dir, stage=STAGE)]


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        (Moment("in_copy", "1", 2), None),
        (Moment("in_write", "1", 2), [2]),
        (Moment("in_digest_gather", "1", 2), [2]),
        (Moment("before_rename", "0", 2), [2]),
        (Moment("after_rename", "0", 2), [4, 2]),
        (Moment("in_retention", "0", 1), [8, 6, 4]),
    ],
    ids=lambda value: value.name if isinstance(value, Moment) else "",
)
def test_kill_9_during(moment, kept, undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    Incarnation(run_dir, moment=moment).die()
    if kept is not None:  # else: how far the save before had come is a matter of milliseconds
        assert steps_on_disk(run_dir) == kept
    go_on_to_the_end(run_dir, undisturbed)


def test_save_that_fails_is_reported_and_tried_again_soon(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    moment = Moment("in_failing_write", "1", 1)
    overrides = ("checkpoint.keep_last=9", "checkpoint.every_steps=4")
    said = Incarnation(run_dir, *overrides, moment=moment).finish()
    assert "step_00000004 could not be saved (1 in a row, checkpoint.max_failed_saves=3)" in said
    assert "Input/output error" in said
    saved = steps_on_disk(run_dir)
    assert 4 not in saved
    assert {6, 7} & set(saved)  # told at one boundary, read at the next
    assert_same_run(run_dir, undisturbed)
    assert left_overs(run_dir) == []


def test_kill_9_in_the_last_save_of_a_stage(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    Incarnation(run_dir, moment=Moment("in_write_of_weights")).die()
    assert not end(run_dir)[1].complete
    go_on_to_the_end(run_dir, undisturbed)


def test_kill_9_while_the_next_stage_takes_over(first_stage, undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(first_stage, run_dir)
    Incarnation(run_dir, stage=NEXT_STAGE, moment=Moment("in_hand_over", "0")).die()
    Incarnation(run_dir, stage=NEXT_STAGE).finish()
    assert_same_run(run_dir, undisturbed, stages=(STAGE, NEXT_STAGE))


def test_kill_9_while_the_record_is_cut_back(undisturbed, tmp_path) -> None:
    """Steps behind the checkpoint are in the record; half of what is kept is written anew."""
    run_dir = tmp_path / "run"
    Incarnation(run_dir, moment=Moment("before_rename", "0", 2)).die()
    recorded = len(history(run_dir))
    assert recorded > steps_on_disk(run_dir)[0]
    Incarnation(run_dir, moment=Moment("in_cut_back")).die()
    assert len(history(run_dir)) == recorded  # the old record, whole
    go_on_to_the_end(run_dir, undisturbed)


def test_kill_9_during_an_elastic_load(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    Incarnation(run_dir, moment=Moment("leaves", "all", 3)).finish()
    Incarnation(run_dir, world_size=3, moment=Moment("in_load", "1", 20)).die()
    go_on_to_the_end(run_dir, undisturbed)  # on two ranks again: as if nothing had been


def test_a_taken_over_incarnation_that_still_lives_cannot_commit(undisturbed, tmp_path) -> None:
    """The first stands between its manifest and the rename while the second trains to the end.

    Its ranks are stopped meanwhile: one that runs on leaves at its next step, at the same fence.
    """
    run_dir = tmp_path / "run"
    first = Incarnation(run_dir, moment=Moment("waits_before_rename", "0", 2), epoch="first")
    while not (run_dir / "standing").exists():
        assert all(rank.poll() is None for rank in first.ranks), first.log.read_text()
    for rank in first.ranks:
        rank.send_signal(signal.SIGSTOP)
    second = Incarnation(run_dir, epoch="second")
    second.finish()
    finished = end(run_dir)
    assert finished[1].epoch == "second"
    assert [rank.poll() for rank in first.ranks] == [None, None]  # both were alive all along
    before, steps = history(run_dir), steps_on_disk(run_dir)
    (run_dir / "go_on").touch()
    for rank in first.ranks:
        rank.send_signal(signal.SIGCONT)
    assert any(first.wait())
    assert "incarnation first is fenced: second runs now; not committing" in first.log.read_text()
    assert steps_on_disk(run_dir) == steps
    assert end(run_dir) == finished
    assert history(run_dir) == before
    assert (finished[0] / "weights.safetensors").read_bytes() == (
        end(undisturbed)[0] / "weights.safetensors"
    ).read_bytes()
