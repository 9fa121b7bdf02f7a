"""The ledger of runs whose clocks, launchers and files did not do what they should."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_harness import put_checkpoint
from ledger_story import START, Story, spent, train

from cocoa_dist.events import Diary, Events
from launcher.history import clock_steps
from launcher.slurm.scheduler import parse_job, submitted_at


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setattr("launcher.runfolder.describe_code", lambda: "commit abc\n")
    return Story(tmp_path)


def two_incarnations(story: Story, *, behind: float) -> None:
    """Steps 1 to 4, a preemption, 7 s of waiting, steps 5 and 6 on a node with another clock."""
    story.start(0, name="7.0-1")
    train(story, 0)
    story.beat(56, step=4, steps=4, seconds=40)
    story.phase(56, "checkpoint", step=4)
    story.phase(58, "start")
    story.end(60, "preempted")
    begin = 67 - behind
    story.start(begin, from_step=4, name="7.1-1")
    train(story, begin, step=4)
    story.beat(begin + 36, step=6, steps=2, seconds=20)
    story.phase(begin + 36, "start")
    story.end(begin + 40, "stopped")
    put_checkpoint(story.run_dir, stage="a", step=6)


def test_a_node_whose_clock_is_an_hour_behind_loses_no_second_of_work(story):
    two_incarnations(story, behind=3600)
    found = spent(story.ledger(100))
    assert (found["productive"], found["checkpoint"], found["restore"]) == (60, 2, 10)
    assert found["start"] == 11 + 2 + 11 + 4
    assert set(found) == {"productive", "checkpoint", "restore", "start"}  # of the wait none knows
    assert clock_steps(story.run_dir) == {"7.1-1": pytest.approx(3600 - 7)}


def test_a_clock_a_little_behind_makes_a_wait_shorter_and_nothing_else(story):
    two_incarnations(story, behind=3)
    assert clock_steps(story.run_dir) == {}
    assert spent(story.ledger(100))["queue"] == 4
    assert spent(story.ledger(100))["productive"] == 60


def test_a_node_whose_clock_is_ahead_makes_the_wait_longer(story):
    two_incarnations(story, behind=-30)
    found = spent(story.ledger(140))
    assert (found["queue"], found["productive"]) == (37, 60)


def test_the_end_that_a_cut_off_launcher_writes_late_takes_no_time_from_its_successor(story):
    story.start(0, name="7.0-1")
    train(story, 0)
    story.beat(36, step=2, steps=2, seconds=20)
    story.end(36, "lost")
    story.start(50, from_step=0, name="7.1-1")
    train(story, 50)
    before = spent(story.ledger(66, live=True))
    ours = story._epoch, story._at
    story._epoch, story._at = "7.0-1", 0
    story.end(64, "crash")  # the link is back
    story._epoch, story._at = ours
    assert spent(story.ledger(66, live=True))["start"] == before["start"] == 11 + 11
    assert spent(story.ledger(66, live=True))["restore"] == before["restore"] == 10


@pytest.mark.parametrize("phase", ["train", "checkpoint", "start"])
def test_a_launcher_that_was_killed_and_not_started_again_waits_and_does_not_hang(story, phase):
    story.start(0)
    train(story, 0)
    story.beat(36, step=2, steps=2, seconds=20)
    story.phase(36, phase, step=2)
    put_checkpoint(story.run_dir, stage="a", step=2)
    ledger = story.ledger(5000)
    assert spent(ledger)["queue"] == 5000 - 36
    assert "hang" not in spent(ledger)
    assert ledger.wall_seconds == pytest.approx(5000)
    assert ledger.rank_seconds == pytest.approx(4 * 36)


def test_a_launcher_that_dies_between_two_attempts_leaves_a_wait(story):
    story.start(0)
    story.end(10, "crash")
    story.launch(900)
    story.start(905)
    story.end(915, "preempted")
    assert spent(story.ledger(915)) == {"queue": 890, "start": 10 + 5 + 10}


def test_a_run_that_was_ended_after_a_stage_waits_for_the_next_command(story):
    story.start(0)
    story.end(10, "finished")
    story.launch(86_400)
    story.start(86_402, stage="b")
    story.end(86_410, "preempted")
    assert spent(story.ledger(86_410))["queue"] == 86_390


def test_what_a_launcher_does_before_its_ranks_is_start(story):
    """Looking at inputs and nodes, waiting for data that is away."""
    story._append("events.jsonl", {"kind": "submitted", "time": START - 300})
    story.launch(-40)
    story.start(0)
    story.end(10, "preempted")
    story.launch(100)
    story.start(130)
    story.end(140, "stopped")
    assert spent(story.ledger(140)) == {"queue": 260 + 90, "start": 40 + 10 + 30 + 10}


def test_looking_at_the_inputs_of_a_new_run_is_start(story):
    """A run by hand is submitted when its launcher starts."""
    story._append("events.jsonl", {"kind": "submitted", "time": START - 20})
    story.launch(-20)
    story.start(0)
    story.end(10, "stopped")
    assert spent(story.ledger(10)) == {"start": 30}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("JobId=7 JobState=RUNNING SubmitTime=2026-11-21T19:36:39 EligibleTime=x", 19),
        ("JobId=7 JobState=RUNNING SubmitTime=Unknown", None),
        ("JobId=7 JobState=RUNNING", None),
        (None, None),
    ],
)
def test_slurms_time_of_submission_is_local_time(monkeypatch, line, expected):
    known = None if line is None else parse_job(line)
    monkeypatch.setattr("launcher.slurm.scheduler.show_job", lambda job: known)
    found = submitted_at("7")
    assert (None if found is None else time.localtime(found).tm_hour) == expected


def test_the_launchers_own_imports_are_start():
    before = time.time()
    script = "from launcher.process import process_began as p; import time; print(p(), time.time())"
    command = [sys.executable, "-c", f"import time; time.sleep(1); {script}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    began, now = map(float, done.stdout.split())
    assert before - 0.1 < began < now - 1.0


def test_a_launcher_at_work_again_is_start_even_before_its_ranks(story):
    story.start(0)
    story.end(10, "preempted")
    story.launch(50)
    assert spent(story.ledger(60, live=True)) == {"queue": 40, "start": 20}


def test_two_stages_on_changing_numbers_of_ranks_cost_what_was_held(story):
    story.start(0, ranks=4)
    train(story, 0)
    story.beat(116, step=10, steps=10, seconds=100)
    story.end(116, "finished")
    put_checkpoint(story.run_dir, stage="a", step=10)
    story.start(116, stage="b", ranks=4)
    train(story, 116)
    story.beat(152, step=2, steps=2, seconds=20)
    story.end(152, "preempted")
    story.start(200, stage="b", ranks=2)
    train(story, 200)
    story.beat(256, step=2, steps=2, seconds=40)  # again, on half of the ranks
    story.end(256, "preempted")
    put_checkpoint(story.run_dir, stage="b", step=2)
    ledger = story.ledger(256)
    found = spent(ledger)
    assert (found["productive"], found["replay"], found["queue"]) == (140, 20, 48)
    assert ledger.rank_seconds == pytest.approx(4 * 152 + 2 * 56)
    assert ledger.wall_seconds == pytest.approx(256)


def test_the_line_after_a_torn_one_is_whole(tmp_path: Path):
    """A rank killed while it writes must not take the first line of the next one with it."""
    path = tmp_path / "events.jsonl"
    Events(tmp_path, stage="a", epoch="7.0-1", every_seconds=0).phase("start", step=0)
    with path.open("ab") as file:
        file.write(b'{"time": 1.0, "kind": "be')
    events = Events(tmp_path, stage="a", epoch="7.1-1", every_seconds=0)
    events.phase("start", step=0)
    events.close()
    lines = path.read_text().split("\n")
    assert [json.loads(lines[i])["epoch"] for i in (0, 2)] == ["7.0-1", "7.1-1"]
    diary = Diary(tmp_path)
    diary.append({"kind": "launched", "time": 2.0})
    diary.close()
    assert path.read_text().count("\n") == 4


def test_a_diary_cut_anywhere_still_adds_up(story):
    """Whatever a kill leaves of the file: every byte is a place where it may end."""
    two_incarnations(story, behind=0)
    path = story.run_dir / "events.jsonl"
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        ledger = story.ledger(107)
        assert ledger.wall_seconds == pytest.approx(107), length
        assert min(ledger.seconds.values()) >= 0
