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
