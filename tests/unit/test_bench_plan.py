"""The bench of planning on a small made data set: its table, and what it says of the order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_plan.py"


@pytest.mark.slow
def test_planning_is_measured_on_an_index_without_records(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--records", "70_000", "--ranks", "8", "--batch-size", "192"]
    command += ["--first-batch-records", "20_000", "--repeats", "1"]
    options = ["--steps", "3", "--folder", tmp_path, "--out", tmp_path / "plan"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["blocks_a_window"] == 960
    assert found["tokens_over_mean"] < 1.05
    assert found["lengths_seconds"] > 0  # the second process found them on disk
    for one in found["fills"]:
        assert one["fill"] == pytest.approx(one["whole_packs_allow"])
    assert 0 < found["first_batch_seconds"] < 60
    assert "first batch of 0.02 M records, lengths on disk" in (tmp_path / "plan.md").read_text()
    assert "| a step, all ranks |" in (tmp_path / "plan.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # nothing stays
