"""The tool that puts the ledger beside what was done to a run: a real one, and its judgement."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_ledger
from bench_ledger import Disturbed, judge

from cocoa_dist.metrics import CAUSES
from launcher.ledger import Ledger

SECONDS = {"productive": 10.0, "queue": 22.0, "data_wait": 1.0, "replay": 0.5, "hang": 70.0}


@pytest.mark.slow
def test_two_preemptions_a_crash_and_a_stop_are_each_where_they_belong(tmp_path: Path) -> None:
    out = tmp_path / "ledger"
    command = [sys.executable, bench_ledger.__file__, "--hold", "5", "--hang", "63"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.with_suffix(".md").read_text()
    assert done.stdout == text
    assert text.count("| preempted |") == 2
    assert text.count("| crash |") == 1
    for cause in (*CAUSES, "all"):
        assert f"| {cause} |" in text


@pytest.fixture
def disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disturbed:
    """100 steps of 0.11 s, of which 0.01 s waiting; one of them held up by 70 s."""
    run = Disturbed(tmp_path)
    run.seen.held, run.seen.came, run.seen.stopped = [10.0, 10.0], [1.0, 1.0], 70.0
    run.seen.replayed, run.seen.replayed_seconds = 3, 0.33
    run.seen.ended = sum(SECONDS.values())
    step = {"step_seconds": 0.11, "data_wait_seconds": 0.01}
    lines = [step] * 99 + [{**step, "step_seconds": 70.11}]
    monkeypatch.setattr(run, "lines", lambda: iter(lines))
    return run


def differing(run: Disturbed, **changes: float) -> list[str]:
    seconds = {**dict.fromkeys(CAUSES, 0.0), **SECONDS, **changes}
    ledger = Ledger(seconds, rank_seconds=0.0, known=True)
    return [line.cause for line in judge(run, ledger) if not line.fits]


def test_a_ledger_that_says_what_happened_passes(disturbed: Disturbed) -> None:
    assert differing(disturbed) == []


@pytest.mark.parametrize(
    ("changes", "causes"),
    [
        ({"hang": 75.0, "productive": 5.0}, ["productive", "hang"]),
        ({"unknown": 4.0, "hang": 66.0}, ["hang", "unknown"]),
        ({"queue": 5.0, "start": 17.0}, ["queue"]),
        ({"replay": 7.0}, ["replay", "all"]),
        ({"start": 2.0}, ["all"]),
    ],
    ids=["hang", "unknown", "queue", "replay", "sum"],
)
def test_a_ledger_that_says_something_else_fails(
    disturbed: Disturbed, changes: dict[str, float], causes: list[str]
) -> None:
    assert differing(disturbed, **changes) == causes
