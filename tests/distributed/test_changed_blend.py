"""Go on in the middle of a stage with another batch size and another blend: nothing comes twice."""

import math
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from incarnations import (
    LIMIT,
    STAGE,
    Incarnation,
    Moment,
    end,
    history,
    losses,
    records,
)
from test_resume import finish, start, wait_for_step

from cocoa_dist.manifest import newest
from cocoa_dist.metrics import read_json_lines

pytestmark = pytest.mark.slow

STEPS = [f"stages.{STAGE}.steps=12", "checkpoint.keep_last=20"]
OLD_BATCH, NEW_BATCH, PASS = 24, 12, 64
SECOND = f"stages.{STAGE}.data.sources.more"
BLEND = [
    f"stages.{STAGE}.batch_size={NEW_BATCH}",
    f"{SECOND}.path=asset:emoji/validation",
    f"{SECOND}.limit=32",
]
CONTINUE = "data.on_change=continue"


def left_after(run_dir: Path, *more: str, world_size: int = 2) -> int:
    """Train until asked to leave; return the step that the run stands at."""
    leaves = Moment("leaves", "all", 3)
    Incarnation(run_dir, *STEPS, *more, world_size=world_size, moment=leaves).finish()
    return end(run_dir)[1].step


@pytest.fixture(scope="module")
def left_early(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("early") / "run"
    assert 0 < left_after(run_dir) < 12
    return run_dir


@pytest.fixture(scope="module")
def changed(left_early, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(left_early, run_dir)
    said = Incarnation(run_dir, *STEPS, *BLEND, CONTINUE).finish()
    assert f"stages.{STAGE}.batch_size: {OLD_BATCH} -> {NEW_BATCH}" in said
    assert f"{SECOND}.path: None -> 'asset:emoji/validation'" in said
    return run_dir


def taken(run_dir: Path, dataset: str) -> list[int]:
    """The records of a data set in the order in which they were trained on."""
    lines = read_json_lines(run_dir / "samples" / f"{STAGE}.jsonl")
    return [number for line in lines if line["dataset"] == dataset for number in line["records"]]


def test_another_blend_is_refused_unless_the_recipe_says_so(left_early, tmp_path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(left_early, run_dir)
    again = Incarnation(run_dir, *STEPS, *BLEND)
    assert set(again.wait()) == {2}
    said = again.log.read_text()
    assert f"stages.{STAGE}.batch_size: {OLD_BATCH} -> {NEW_BATCH}" in said
    assert history(run_dir) == history(left_early)


def test_records_go_on_where_each_data_set_stands(left_early, changed) -> None:
    before, steps = len(history(left_early)), history(changed)
    assert [step for _, step, *_ in steps] == list(range(1, 13))
    assert steps[:before] == history(left_early)
    sizes = [len(step) for step in records(changed)]
    assert sizes == [OLD_BATCH] * before + [NEW_BATCH] * (12 - before)
    for dataset, size in (("emoji", PASS), ("more", 32)):
        numbers = taken(changed, dataset)
        assert numbers, f"{dataset} was never drawn"
        for begin in range(0, len(numbers), size):
            seen = Counter(numbers[begin : begin + size])
            assert max(seen.values()) == 1, f"{dataset}: twice in a pass"
    assert taken(changed, "emoji")[: before * OLD_BATCH] == taken(left_early, "emoji")


def test_the_record_of_the_run_counts_both_batch_sizes(left_early, changed) -> None:
    lines = list(read_json_lines(changed / "metrics.jsonl"))
    before = len(history(left_early))
    assert [line["samples"] for line in lines] == [
        OLD_BATCH if line["step"] <= before else NEW_BATCH for line in lines
    ]
    manifest = end(changed)[1]
    assert manifest.complete
    assert manifest.samples == before * OLD_BATCH + (12 - before) * NEW_BATCH
    assert manifest.data_state["cursors"] == {
        "emoji": len(taken(changed, "emoji")),
        "more": len(taken(changed, "more")),
    }
    assert all(math.isfinite(loss) for loss in losses(changed))
    assert losses(changed)[-1] < losses(changed)[0]


def test_a_changed_run_is_resumed_bit_for_bit_and_on_one_process(
    left_early, changed, tmp_path
) -> None:
    """The change is part of the run from then on: asked for once, whatever dies afterwards."""
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    shutil.copytree(left_early, run_dir)
    assert left_after(run_dir, *BLEND, CONTINUE) < 12
    shutil.copytree(run_dir, alone)
    Incarnation(run_dir, *STEPS, *BLEND).finish()  # `continue` is not asked for again
    assert history(run_dir) == history(changed)
    assert records(run_dir) == records(changed)
    Incarnation(alone, *STEPS, *BLEND, world_size=1).finish()
    assert records(alone) == records(changed)
    torch.testing.assert_close(
        torch.tensor(losses(alone)), torch.tensor(losses(changed)), rtol=1e-5, atol=1e-5
    )


def test_a_data_set_of_another_size_under_its_old_name_is_refused(left_early, tmp_path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(left_early, run_dir)
    again = Incarnation(run_dir, *STEPS, f"stages.{STAGE}.data.sources.emoji.limit=32", CONTINUE)
    assert set(again.wait()) == {2}
    assert "source 'emoji' had another number of records (64, now 32)" in again.log.read_text()
    assert history(run_dir) == history(left_early)


def test_the_launcher_adopts_the_change_and_finishes_the_stage(tmp_path) -> None:
    run_dir = tmp_path / "run"
    launcher = start(run_dir)
    wait_for_step(run_dir, stage=STAGE, step=2)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=LIMIT)
    found = newest(run_dir, stage=STAGE)
    assert found is not None
    before = found[1].step
    assert before < 8
    out = finish(run_dir, *BLEND, CONTINUE, "--until", STAGE)
    assert f"stages.{STAGE}.batch_size: {OLD_BATCH} -> {NEW_BATCH}" in out
    sizes = [len(step) for step in records(run_dir)]
    assert sizes == [OLD_BATCH] * before + [NEW_BATCH] * (8 - before)
    assert finish(run_dir, *BLEND, "--until", STAGE)  # adopted: the new values are the run's
