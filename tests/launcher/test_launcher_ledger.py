"""Where a run's wall time went: every second has one cause, whatever happened to the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_harness import make_launch, processes_about, put_checkpoint, wait_until
from ledger_story import START, Story, spent, train

from cocoa_dist.config import load_recipe, load_resolved
from cocoa_dist.exporter import target_name
from cocoa_dist.metrics import CAUSES, METRICS
from launcher.ledger import read_ledger
from launcher.run_metrics import RunExporter
from launcher.runfolder import prepare
from launcher.signals import Interrupts
from launcher.table import show_status


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setattr("launcher.runfolder.describe_code", lambda: "commit abc\n")
    return Story(tmp_path)


def test_an_undisturbed_stage(story):
    story.start(0)
    train(story, 0)
    story.beat(46, step=6, steps=6, seconds=30, waited=3)
    story.phase(46, "checkpoint", step=6)
    story.phase(50, "evaluation", step=6)
    story.phase(60, "train", step=6)
    story.beat(81, step=10, steps=4, seconds=20)
    story.phase(81, "start")
    story.end(84, "finished")
    put_checkpoint(story.run_dir, stage="a", step=10)
    ledger = story.ledger(84)
    assert spent(ledger) == {
        "start": 10 + 1 + 3,
        "restore": 5,
        "productive": 27 + 20,
        "data_wait": 3,
        "checkpoint": 4,
        "evaluation": 10,
        "unknown": 1,  # between two steps
    }
    assert ledger.wall_seconds == pytest.approx(84)
    assert ledger.goodput == pytest.approx(47 / 84)
    assert ledger.rank_seconds == pytest.approx(4 * 84)


def test_steps_behind_the_checkpoint_of_a_crash_become_replay(story):
    story.start(0)
    train(story, 0)
    story.beat(56, step=4, steps=4, seconds=40)
    story.beat(96, step=8, steps=4, seconds=40)
    story.end(101, "crash", reason="rank 1 was killed by SIGKILL")
    story.start(103, from_step=6)
    train(story, 103, step=6)
    story.beat(139, step=8, steps=2, seconds=20)
    story.end(140, "preempted")
    put_checkpoint(story.run_dir, stage="a", step=8)
    assert spent(story.ledger(140)) == {
        "start": 11 + 2 + 11,  # the launcher's pause is its own
        "restore": 5 + 5,
        "productive": 40 + 20 + 20,
        "replay": 20 + 5 + 1,  # steps 7 and 8, and those that were under way
    }


def test_a_trainer_that_falls_back_further_than_the_launcher_thought(story):
    """The trainer found the checkpoint of step 6 broken and went on from step 2."""
    story.start(0)
    train(story, 0)
    story.beat(96, step=8, steps=8, seconds=80)
    story.end(96, "preempted")
    story.start(96, from_step=6)
    train(story, 96, step=2)
    story.beat(172, step=8, steps=6, seconds=60)
    story.end(172, "preempted")
    put_checkpoint(story.run_dir, stage="a", step=8)
    found = spent(story.ledger(172))
    assert (found["replay"], found["productive"]) == (60, 20 + 60)


def test_replay_of_one_stage_leaves_the_others_alone(story):
    story.start(0)
    train(story, 0)
    story.beat(116, step=10, steps=10, seconds=100)
    story.end(116, "finished")
    put_checkpoint(story.run_dir, stage="a", step=10)
    story.start(116, stage="b")
    train(story, 116)
    story.beat(142, step=1, steps=1, seconds=10)
    story.end(142, "crash")
    found = spent(story.ledger(142))
    assert found["productive"] == 100
    assert found["replay"] == 10  # no checkpoint holds it


def test_what_a_running_incarnation_does_counts_as_productive(story):
    story.start(0)
    train(story, 0)
    story.beat(36, step=2, steps=2, seconds=20)
    assert spent(story.ledger(40, live=True))["productive"] == 24


@pytest.mark.parametrize(
    ("verdict", "cause"),
    [("preempted", "queue"), ("lost", "queue"), ("crash", "start"), ("finished", "start")],
)
def test_time_between_incarnations(story, verdict, cause):
    story.start(0)
    story.end(10, verdict)
    story.start(110)
    story.end(120, "preempted")
    assert spent(story.ledger(120))[cause] >= 100


@pytest.mark.parametrize(
    ("verdict", "wall"), [("preempted", 500), ("stopped", 10), ("given_up", 10)]
)
def test_a_run_that_waits_for_its_queue_goes_on_costing_time(story, verdict, wall):
    story.start(0)
    story.end(10, verdict)
    assert story.ledger(500).wall_seconds == pytest.approx(wall)


@pytest.mark.parametrize(
    ("steps_took", "silence", "cause"),
    [(1, 59, "replay"), (1, 70, "hang"), (5, 95, "replay"), (5, 130, "hang")],
)
def test_silence_before_a_crash_is_a_hang_if_it_is_long(story, steps_took, silence, cause):
    story.start(0)
    train(story, 0)
    story.beat(16 + 4 * steps_took, step=4, steps=4, seconds=4 * steps_took)
    story.end(16 + 4 * steps_took + silence, "crash")
    put_checkpoint(story.run_dir, stage="a", step=4)
    assert spent(story.ledger(16 + 4 * steps_took + silence))[cause] == silence


def test_a_watchdogs_verdict_is_a_hang_however_short(story):
    story.start(0)
    train(story, 0)
    story.beat(17, step=1, steps=1, seconds=1)
    story.end(27, "crash", reason="rank 1 exit code 94: HangError: no progress for 9 s in step 2")
    assert spent(story.ledger(27))["hang"] == 10


def test_a_run_that_hangs_now_says_so(story):
    story.start(0)
    train(story, 0)
    story.beat(17, step=1, steps=1, seconds=1)
    assert spent(story.ledger(117, live=True))["hang"] == 100


def test_a_suspended_step_is_a_hang_and_no_work(story):
    story.start(0)
    train(story, 0)
    story.beat(22, step=6, steps=6, seconds=6)
    story.beat(28, step=12, steps=6, seconds=6)
    story.beat(329, step=13, steps=1, seconds=301)
    found = spent(story.ledger(329, live=True))
    assert found["hang"] == 300
    assert found["productive"] == 13


def test_a_killed_start_is_start(story):
    story.start(0)
    story.end(30, "crash")
    assert spent(story.ledger(30)) == {"start": 30}


def test_torn_foreign_and_late_lines_change_no_sum(story):
    story.start(0)
    train(story, 0)
    story.beat(36, step=2, steps=2, seconds=20)
    with (story.run_dir / "events.jsonl").open("a") as file:
        file.write('{"kind": "beat", "time": 1\nnull\n{"kind": "saved", "step": 2}\n"x"\n')
    story.beat(30, step=3, steps=1, seconds=99)  # a clock that went back
    story.end(40, "preempted")
    story.start(39, from_step=2)  # another node's clock
    story.end(45, "preempted")
    assert story.ledger(60).wall_seconds == pytest.approx(60)


def test_the_first_wait_in_the_queue_counts(story):
    story._append("events.jsonl", {"kind": "submitted", "time": START - 300})
    story.start(0)
    story.end(30, "crash")
    assert spent(story.ledger(30)) == {"queue": 300, "start": 30}


def test_a_run_folder_begins_with_its_submission(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.runfolder.describe_code", lambda: "commit abc\n")
    launch = make_launch(tmp_path)
    launch.run_dir.mkdir()
    for _ in range(2):
        prepare(launch.run_dir, config=load_recipe(str(launch.recipe)), recipe_file=launch.recipe)
    (line,) = (launch.run_dir / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "submitted"
    assert json.loads(line)["time"] == pytest.approx(time.time(), abs=10)


def test_what_a_zombie_writes_after_the_next_start_takes_no_time_from_it(story):
    story.start(0)
    train(story, 0)
    story.beat(36, step=2, steps=2, seconds=20)
    story.end(40, "lost")
    zombie = story._epoch
    story.start(50, from_step=2)
    train(story, 50, step=2)
    story.beat(86, step=4, steps=2, seconds=20)
    story.end(90, "preempted")
    before = spent(story.ledger(90))
    story._epoch = zombie
    story.beat(80, step=9, steps=7, seconds=40)
    assert spent(story.ledger(90)) == before


@pytest.mark.parametrize(("verdict", "lingers"), [("given_up", True), ("stopped", False)])
def test_a_launcher_that_gave_up_stays_until_it_was_seen(story, verdict, lingers):
    metrics = story.config.metrics.model_copy(update={"linger_seconds": 1.0})
    config = story.config.model_copy(update={"metrics": metrics})
    story.start(0)
    story.end(10, verdict)
    began = time.monotonic()
    with RunExporter(config, story.run_dir, interrupts=Interrupts()) as exporter:
        entered = time.monotonic() - began
    assert (time.monotonic() - began - entered > 0.9) == lingers
    given_up = exporter.values.get("cocoa_run_state", state="given_up")
    assert given_up == float(lingers)


def test_a_run_without_diary_has_a_wall_time_and_no_goodput(story):
    assert story.ledger(0).wall_seconds == 0
    story.start(0)
    story.end(10, "preempted")
    ledger = story.ledger(20)
    assert (ledger.wall_seconds, ledger.goodput) == (pytest.approx(20), None)


def test_a_month_of_heartbeats_is_read_in_seconds(story):
    story.start(0)
    train(story, 0)
    with (story.run_dir / "events.jsonl").open("a") as file:
        for number in range(1, 172_800):  # one every 15 s
            beat = {"time": START + 16 + 15 * number, "kind": "beat", "steps": 3}
            beat |= {"step": 3 * number, "seconds": 14.9, "waited": 0.1, "longest": 5.0}
            file.write(json.dumps({**beat, "stage": "a", "epoch": story._epoch}) + "\n")
    before = time.process_time()
    ledger = story.ledger(16 + 15 * 172_800, live=True)
    spent = time.process_time() - before
    assert ledger.goodput > 0.9
    before = time.process_time()
    for line in (story.run_dir / "events.jsonl").read_text().splitlines():
        json.loads(line)
    parsed = time.process_time() - before
    assert spent < 15 * parsed  # 4 on a quiet machine; beside other jobs both grow


def test_the_table_has_a_line_for_each_cause(story, capsys):
    from rich.console import Console

    from launcher.status import read_status

    story.start(0)
    train(story, 0)
    story.beat(36, step=2, steps=2, seconds=20)
    story.end(40, "stopped")
    put_checkpoint(story.run_dir, stage="a", step=2)
    status = read_status(story.run_dir)
    assert status.seconds["productive"] == 20
    assert sum(status.seconds.values()) == pytest.approx(40)
    show_status(Console(width=100), status, run_dir=story.run_dir)
    shown = capsys.readouterr().out
    assert "50.0% of 0:00:40" in shown
    assert "restore 0:00:05, 12.5%" in shown


def test_the_launcher_exports_what_status_shows(story):
    story.start(0)
    story.end(10, "crash")
    story.start(12)
    story.end(22, "preempted")
    stale = story.run_dir / "sd" / target_name(story.run_dir, epoch="7.0-1", who="r00000")
    stale.parent.mkdir()
    stale.write_text("[]")
    with RunExporter(story.config, story.run_dir, interrupts=Interrupts()) as exporter:
        assert not stale.exists()
        targets = [json.loads(path.read_text())[0] for path in stale.parent.iterdir()]
        assert [t["labels"]["instance"] for t in targets] == [f"{story.run_dir.name}/launcher"]
        assert exporter.values.get("cocoa_run_restarts_total", reason="crash") == 1.0
        wall = exporter.values.get("cocoa_run_wall_seconds")
        causes = [exporter.values.get("cocoa_run_seconds", cause=cause) for cause in CAUSES]
        assert sum(causes) == pytest.approx(wall)
        with exporter.ranks("7.1-1"):
            left = target_name(story.run_dir, epoch="7.1-1", who="r00001")
            stale.with_name(left).write_text("[]")
        assert len(list(stale.parent.iterdir())) == 1
        (story.run_dir / "resolved.yaml").write_text("x: [")
        exporter.refresh()
        exporter.refresh()
        assert exporter.values.get("cocoa_exporter_faults_total", reason="files") == 2.0
    assert list(stale.parent.iterdir()) == []


@pytest.mark.slow
def test_a_real_run_with_a_kill_and_a_signal_adds_up(tmp_path):
    """A rank is killed, later the launcher is told to leave; the same command ends the run."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launcher", "run", "debug", "--run-dir", str(run_dir)]
    command += ["--until", "joint_reconstruction", "stages.joint_reconstruction.steps=60"]
    command += ["checkpoint.every_steps=8", "metrics.heartbeat_seconds=1"]
    began = time.time()
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(lambda: reached(run_dir) >= 13, seconds=200)
            os.kill(ranks_of(run_dir)[-1], signal.SIGKILL)
            wait_until(lambda: incarnations(run_dir) == 2, seconds=100)
            wait_until(lambda: reached(run_dir) >= 30, seconds=200)
            first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=100) == 128 + signal.SIGTERM
        finally:
            first.kill()
            first.wait()
        paused = time.time()
        time.sleep(3.0)
        subprocess.run(command, stdout=log, stderr=log, timeout=300, check=True)
    config = load_resolved(run_dir / "resolved.yaml")
    ledger = read_ledger(run_dir, config, now=time.time(), live=False)
    sys.stdout.write(f"{ledger}, {time.time() - began:.1f} s from outside\n")
    ended = json.loads((run_dir / "incarnations.jsonl").read_text().splitlines()[-1])["ended_at"]
    wall = time.time() - began  # from the launcher's own start on; two stages are to come
    assert ledger.wall_seconds == pytest.approx(wall, rel=0.01)
    assert ledger.seconds["unknown"] < 0.02 * ledger.wall_seconds
    assert ledger.seconds["queue"] > 3.0
    assert 0.0 < ledger.seconds["replay"] < ledger.seconds["productive"]
    assert ledger.seconds["hang"] == 0.0
    assert paused < ended
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    known = {str(metric.record).partition("/")[0] for metric in METRICS.values()}
    known |= {"stage", "epoch", "time", "batch_digest"}
    assert {name.partition("/")[0] for name in metrics[-1]} <= known  # same words in both
    steps = sum(line["step_seconds"] - line["data_wait_seconds"] for line in metrics)
    assert ledger.seconds["productive"] == pytest.approx(steps, rel=0.02)
    assert list((run_dir / "sd").iterdir()) == []


def reached(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([json.loads(line)["step"] for line in lines if line.endswith("}")], default=0)


def incarnations(run_dir: Path) -> int:
    lines = (run_dir / "incarnations.jsonl").read_text().splitlines()
    return len({json.loads(line)["epoch"] for line in lines})


def ranks_of(run_dir: Path) -> list[int]:
    """Processes of ranks, oldest first."""
    found = []
    for pid in processes_about(run_dir):
        if b"cocoa_dist.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return sorted(found)
