"""What a save promises: a whole checkpoint or none, and the older ones untouched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("checkpoint") / "seen.json"
    worker = Path(__file__).with_name("checkpoint_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(out.read_text())
    return found


KEPT = ["step_00000006", "step_00000008"]
SLOW_SECONDS = 1.0  # as in checkpoint_worker.py


@pytest.mark.slow
def test_retention_keeps_the_last_two(seen) -> None:
    assert seen["kept"] == KEPT


@pytest.mark.slow
def test_fenced_incarnation_cannot_commit(seen) -> None:
    assert "incarnation first is fenced: second runs now" in seen["fenced"]
    assert seen["after fence"] == KEPT


@pytest.mark.slow
def test_full_disk_is_named_and_older_checkpoints_stay(seen) -> None:
    assert "No space left on device" in seen["full"]
    assert seen["after full"] == KEPT


@pytest.mark.slow
def test_checkpoint_that_lost_its_manifest_is_replaced(seen) -> None:
    assert seen["replaced"] == ""
    assert seen["after replacing"] == KEPT


@pytest.mark.slow
def test_checkpoint_holds_what_its_manifest_lists_and_nothing_else(seen) -> None:
    assert seen["files"] == [*sorted([*seen["listed"], "manifest.json"])]


@pytest.mark.slow
def test_a_step_that_is_committed_is_not_committed_again(seen) -> None:
    assert "step_00000015 was committed by another incarnation" in seen["committed twice"]


@pytest.mark.slow
def test_failed_save_is_tried_again_at_the_next_boundary(seen) -> None:
    assert seen["after one failure"] == [True, KEPT]
    assert seen["after the retry"] == [False, ["step_00000008", "step_00000013"]]


@pytest.mark.slow
def test_training_waits_for_the_copy_alone(seen) -> None:
    assert seen["blocked by a slow disk"] < SLOW_SECONDS / 4  # measured: some milliseconds
    assert seen["training went on"]
    assert seen["stored what was copied"]  # and not what training made of it since
    assert seen["seconds"] > SLOW_SECONDS


@pytest.mark.slow
def test_the_optimizer_alone_waits_for_the_copy(seen) -> None:
    assert seen["blocked by a copy's begin"] < SLOW_SECONDS / 4
    assert SLOW_SECONDS / 4 < seen["blocked before the update"] < 2 * SLOW_SECONDS
    assert seen["stored the weights before the update"]


@pytest.mark.slow
def test_no_step_waits_for_a_commit_and_what_it_deletes(seen) -> None:
    assert seen["committing beside the update"]
    assert seen["blocked by a commit"] < SLOW_SECONDS / 4


@pytest.mark.slow
def test_save_that_still_runs_delays_the_next_one_and_is_counted(seen) -> None:
    assert seen["waited"] == 1
    assert seen["after slow saves"] == ["step_00000014", "step_00000015"]


@pytest.mark.slow
def test_a_save_that_is_waited_for_says_that_it_gets_on(seen) -> None:
    assert seen["progress of four saves"] >= 4  # or the watchdog would take it for a hang
