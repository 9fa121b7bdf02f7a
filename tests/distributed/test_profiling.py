"""Traces of steps: by the recipe, and asked for while a run goes on."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stage_run import start

from cocoa_dist.tracing import PROFILE_ANSWER, PROFILE_REQUEST
from cocoa_dist.train.profiling import Profiling

STAGE = "contrastive"
ROOT = Path(__file__).parents[2]


def trace(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize("text", ["", "[]", '{"steps": "x"}', '{"steps": 1e999}', "{}"])
def test_a_request_that_is_none_costs_nothing(text: str, tmp_path: Path) -> None:
    request = tmp_path / PROFILE_REQUEST
    request.parent.mkdir()
    request.write_text(text)
    cpu = torch.device("cpu")
    assert Profiling(tmp_path, stage="s", rank=0, world_size=1, device=cpu).asked() == 0


def test_a_request_goes_before_the_steps_that_the_recipe_plans(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    profiling = Profiling(tmp_path, stage="s", rank=0, world_size=1, device=cpu)
    profiling.plan(1000, 2)
    (tmp_path / PROFILE_REQUEST).parent.mkdir()
    (tmp_path / PROFILE_REQUEST).write_text('{"steps": 1}')
    assert profiling.asked() == 1
    profiling.plan(11, 1, is_request=True)
    assert profiling.asked() == 0  # it is taken up
    for step in (11, 999, 1000, 1001):
        profiling.begin(step)
        profiling.end(step)
    folders = sorted(path.name for path in (tmp_path / "profile" / "s").iterdir())
    assert folders == ["step_1000", "step_11"]
    assert not (tmp_path / PROFILE_REQUEST).exists()


@pytest.mark.slow
def test_traces_of_the_recipe_change_no_number_of_the_run(tmp_path: Path) -> None:
    plain = start(tmp_path / "plain", STAGE)
    wanted = "runtime.profile_steps={first: 3, count: 2}"
    traced = start(tmp_path / "traced", STAGE, wanted)
    plain.wait(), traced.wait()
    assert traced.numbers() == plain.numbers()
    left, right = plain.weights(), traced.weights()
    assert all(torch.equal(left[name], right[name]) for name in left)
    folder = traced.folder / "profile" / STAGE / "step_3"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["rank_0.json.gz", "rank_1.json.gz", "top.txt"]
    names = {event["name"] for event in trace(folder / "rank_1.json.gz")["traceEvents"]}
    assert "aten::mm" in names
    assert "contrastive, steps 3 to 4, rank 0 of 2" in (folder / "top.txt").read_text()
    assert not (plain.folder / "profile").exists()


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A launcher with two ranks and enough steps to be asked for some."""
    folder = tmp_path_factory.mktemp("live") / "run"
    command = [sys.executable, "-m", "launcher", "run", "debug", "--run-dir", str(folder)]
    command += ["stages.joint_reconstruction.steps=3000", "checkpoint.every_steps=500"]
    environment = {name: text for name, text in os.environ.items() if name != "SLURM_JOB_ID"}
    with (folder.parent / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, (folder.parent / "log").read_text()
        assert running.poll() is None, (folder.parent / "log").read_text()
        time.sleep(0.2)
    yield folder
    running.terminate()
    try:
        running.wait(timeout=60)
    finally:
        running.kill()
        running.wait()


def ask(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launcher", "profile", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT
    )


@pytest.mark.slow
def test_a_live_run_is_traced_on_all_ranks_in_the_same_steps(live) -> None:
    done = ask(str(live), "--steps", "3")
    assert done.returncode == 0, done.stderr
    answer = json.loads((live / PROFILE_ANSWER).read_text())
    assert (answer["steps"], answer["world_size"]) == (3, 2)
    first = answer["first"]
    assert f"steps {first} to {first + 2}, rank 0 of 2" in done.stdout
    assert "aten::mm" in done.stdout
    assert f"2 traces of 3 steps from step {first} on" in done.stdout
    for rank in (0, 1):
        path = live / "profile" / "joint_reconstruction" / f"step_{first}" / f"rank_{rank}.json.gz"
        assert "aten::mm" in {event["name"] for event in trace(path)["traceEvents"]}
    assert not (live / PROFILE_REQUEST).exists()
    again = ask(str(live), "--steps", "1")
    assert again.returncode == 0, again.stderr
    assert json.loads((live / PROFILE_ANSWER).read_text())["first"] > first + 2


@pytest.mark.slow
def test_a_request_while_one_is_under_way_is_refused(live) -> None:
    request = live / PROFILE_REQUEST
    request.write_text("")  # taken up only when it is whole
    try:
        done = ask(str(live), "--steps", "3")
    finally:
        request.unlink()
    assert done.returncode == 2
    assert "a request is under way" in done.stderr


def test_a_run_that_is_not_at_work_is_refused(tmp_path: Path) -> None:
    done = ask(str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    folder = tmp_path / "run"
    folder.mkdir()
    assert ask(str(folder)).returncode == 2
    assert not (folder / "profile").exists()


@pytest.mark.parametrize("steps", ["0", "-3", "101", "many"])
def test_a_number_of_steps_that_cannot_be_is_refused(tmp_path: Path, steps: str) -> None:
    done = ask(str(tmp_path), f"--steps={steps}")
    assert done.returncode == 2
    assert "expected a number of steps from 1 to 100" in done.stderr


def profiling(run_dir: Path) -> Profiling:
    return Profiling(run_dir, stage=STAGE, rank=0, world_size=1, device=torch.device("cpu"))


def walk(found: Profiling, steps: range) -> None:
    for step in steps:
        found.begin(step)
        torch.ones(2).add_(1)
        found.end(step)


def traced_steps(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in run_dir.glob("profile/*/*/top.txt"))


def test_a_resume_inside_or_behind_the_planned_steps_traces_what_is_left(tmp_path: Path) -> None:
    inside, behind = profiling(tmp_path / "inside"), profiling(tmp_path / "behind")
    for found in (inside, behind):
        found.plan(3, 3)
    walk(inside, range(5, 9))
    walk(behind, range(7, 9))
    assert traced_steps(tmp_path / "inside") == ["step_5"]
    assert "steps 5 to 5" in next((tmp_path / "inside").glob("**/top.txt")).read_text()
    assert not (tmp_path / "behind").exists()


def test_a_stage_that_ends_early_gives_what_it_has(tmp_path: Path) -> None:
    found = profiling(tmp_path)
    found.plan(2, 10)
    walk(found, range(1, 4))
    found.finish()
    assert "steps 2 to 3" in next(tmp_path.glob("**/top.txt")).read_text()


def test_a_request_that_no_step_was_traced_for_waits_for_the_next_stage(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / PROFILE_REQUEST).write_text('{"steps": 2}')
    found = profiling(tmp_path)
    assert found.asked() == 2
    found.plan(9, 2, is_request=True)
    assert found.asked() == 0  # it is planned
    found.finish()
    assert (tmp_path / PROFILE_REQUEST).exists()
    assert profiling(tmp_path).asked() == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": "all"}', "{}"])
def test_a_request_that_says_nothing_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / PROFILE_REQUEST).write_text(text)
    assert profiling(tmp_path).asked() == 0


def test_a_folder_that_cannot_be_written_costs_the_trace_alone(tmp_path: Path, caplog) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / PROFILE_REQUEST).write_text('{"steps": 1}')
    (tmp_path / "profile" / STAGE).write_text("a file where a folder should be")
    found = profiling(tmp_path)
    found.plan(1, 1, is_request=True)
    walk(found, range(1, 3))
    assert "no trace of step 1" in caplog.text
    assert not (tmp_path / PROFILE_REQUEST).exists()  # whoever asked is told
    assert not (tmp_path / PROFILE_ANSWER).exists()
