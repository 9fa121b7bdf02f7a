"""What is left when the launcher is told to stop, is killed, or is started twice."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_harness import (
    Launch,
    hurry,
    is_alive,
    make_launch,
    processes_about,
    wait_until,
)

from launcher.__main__ import main
from launcher.status import read_status

STEPS = 1000  # long enough to be interrupted


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    hurry(monkeypatch)
    made = make_launch(tmp_path, stages=["a"])
    made.plan(step_seconds=0.01)
    yield made
    made.end()


def start(launch: Launch):
    process = launch.spawn(f"stages.a.steps={STEPS}")
    metrics = launch.run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 500)
    return process


def test_stop_command_ends_the_run_after_saving(launch, capsys):
    process = start(launch)
    assert main(["stop", str(launch.run_dir)]) == 0
    said = capsys.readouterr().out
    assert f"process {process.pid}" in said
    assert "rm " in said
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "to go on: rm " in out
    assert launch.ends() == ["stopped"]
    status = read_status(launch.run_dir)
    assert status.state == "stopped"
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.step == launch.metrics()[-1][1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_tells_the_shell_which(launch, number):
    process = start(launch)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "goes on" in out
    assert launch.ends() == ["preempted"]
    status = read_status(launch.run_dir)
    assert status.state == "preempted"
    assert status.step == launch.metrics()[-1][1]


def test_a_second_signal_kills_ranks_that_do_not_leave(launch):
    launch.plan({"kind": "hang", "step": 20}, step_seconds=0.01)
    process = start(launch)
    wait_until(lambda: launch.metrics()[-1] == ("a", 19))
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert processes_about(launch.folder) == []


def test_a_killed_launcher_leaves_no_process_behind(launch):
    launch.plan(
        {"kind": "worker", "step": 2, "rank": 0},
        {"kind": "worker", "step": 2, "rank": 1},
        step_seconds=0.01,
    )
    process = start(launch)
    marks = [launch.folder / f"worker{rank}" for rank in (0, 1)]
    wait_until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    workers = [int(mark.read_text()) for mark in marks]
    ranks = [pid for pid in processes_about(launch.folder) if pid != process.pid]
    assert len(ranks) == 2
    assert all(map(is_alive, workers))
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(is_alive, [*ranks, *workers])), seconds=5)


def test_a_killed_run_goes_on_and_counts_what_it_lost(launch, capsys):
    process = start(launch)
    wait_until(lambda: launch.metrics()[-1][1] % 4 == 2)
    process.kill()
    process.communicate()
    wait_until(lambda: processes_about(launch.folder) == [])
    lost = launch.metrics()[-1][1] % 4
    status = read_status(launch.run_dir)
    assert status.state == "preempted"
    launch.plan(step_seconds=0.0005)
    assert launch.run(f"stages.a.steps={STEPS}") == 0
    assert launch.metrics() == [("a", step) for step in range(1, STEPS + 1)]
    assert launch.ends() == ["lost", "finished"]
    status = read_status(launch.run_dir)
    assert status.restarts == {"lost": 1}
    assert status.replayed_steps == lost


def test_workers_of_a_rank_that_died_are_killed(launch):
    launch.plan({"kind": "worker", "step": 2}, {"kind": "crash", "step": 3})
    assert launch.run() == 0
    assert not is_alive(int((launch.folder / "worker0").read_text()))


def test_a_second_launcher_is_refused_with_process_host_and_time(launch, capsys):
    process = start(launch)
    assert read_status(launch.run_dir).state == "running"
    assert launch.run(f"stages.a.steps={STEPS}") == 2
    error = capsys.readouterr().err
    assert f"process {process.pid}" in error
    assert os.uname().nodename in error
    assert " since 2" in error
    process.terminate()
    process.communicate(timeout=60)
    assert launch.ends() == ["preempted"]


def test_asking_for_the_status_never_gets_in_the_way(launch):
    process = start(launch)
    for _ in range(20):
        assert read_status(launch.run_dir).state == "running"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
