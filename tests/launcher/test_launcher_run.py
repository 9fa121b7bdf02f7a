"""Whole runs with the fake trainer: what is written, what is repeated, which code comes back."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from launcher_harness import Launch, hurry, make_launch, put_checkpoint

from cocoa_dist.config import load_resolved
from launcher.history import new_epoch, read_incarnations
from launcher.status import read_status


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    hurry(monkeypatch)
    made = make_launch(tmp_path)
    yield made
    made.end()


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """A run of one stage, for what does not depend on the number of stages."""
    hurry(monkeypatch)
    made = make_launch(tmp_path, stages=["a"])
    yield made
    made.end()


ONE_STAGE = [("a", step) for step in range(1, 11)]
ALL_STEPS = [(stage, step) for stage in "abc" for step in range(1, 11)]


def test_three_stages_run_in_order_and_the_folder_explains_itself(launch, capsys):
    assert launch.run("seed=3") == 0
    assert launch.metrics() == ALL_STEPS
    assert launch.ends() == ["finished"] * 3
    assert load_resolved(launch.run_dir / "resolved.yaml").seed == 3
    assert (launch.run_dir / "recipe.yaml").read_bytes() == launch.recipe.read_bytes()
    assert (launch.run_dir / "code.txt").stat().st_size > 0
    epochs = [item.epoch for item in read_incarnations(launch.run_dir)]
    assert len(set(epochs)) == 3
    assert (launch.run_dir / "epoch").read_text() == epochs[-1]
    for rank in (0, 1):
        log = launch.run_dir / "logs" / epochs[0] / f"a.rank{rank}.log"
        assert log.read_text() == f"rank {rank} starts a after step 0\n"
    out = capsys.readouterr().out
    assert "a: step 10/10" in out
    assert "run 'small' is finished" in out


def test_ranks_get_what_the_process_group_needs(launch):
    assert launch.run("--nproc", "4", "runtime.threads=3") == 0
    starts = launch.starts()
    assert {s["WORLD_SIZE"] for s in starts} == {"4"}
    assert {s["OMP_NUM_THREADS"] for s in starts} == {"3"}
    assert {s["MASTER_ADDR"] for s in starts} == {"127.0.0.1"}
    assert len({s["MASTER_PORT"] for s in starts}) == 3


def test_a_finished_run_says_so_and_starts_nothing(launch, capsys):
    assert launch.run() == 0
    before = launch.incarnations()
    assert launch.run() == 0
    assert launch.incarnations() == before
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["crash", "kill"])
def test_a_crash_is_repaired_from_the_last_checkpoint(launch, capsys, kind):
    launch.plan({"kind": kind, "stage": "b", "step": 7})
    assert launch.run() == 0
    assert launch.metrics() == ALL_STEPS
    assert launch.ends() == ["finished", "crash", "finished", "finished"]
    status = read_status(launch.run_dir)
    assert status.restarts == {"crash": 1}
    assert status.replayed_steps == 2  # 5 and 6, after the checkpoint of step 4
    out = capsys.readouterr().out
    expected = {"crash": "exit code 1: RuntimeError: boom", "kill": "killed by SIGKILL"}
    assert expected[kind] in out
    assert "b: after step 4 of 10" in out


def test_the_other_ranks_are_ended_when_one_dies(short):
    short.plan(
        {"kind": "hang", "stage": "a", "step": 3, "rank": 0},
        {"kind": "crash", "stage": "a", "step": 3, "rank": 1},
    )
    assert short.run() == 0
    first = next(line for line in short.incarnations() if line["verdict"])
    assert first["reason"] == "rank 1 left with exit code 1: RuntimeError: boom"


def test_a_crash_loop_is_given_up_and_the_next_run_tries_again(short, capsys):
    short.plan({"kind": "crash", "stage": "a", "step": 2, "times": 3})
    assert short.run() == 93
    assert short.ends() == ["crash", "crash", "given_up"]
    assert read_status(short.run_dir).state == "given_up"
    assert "giving up" in capsys.readouterr().out
    assert short.run() == 0
    assert read_status(short.run_dir).restarts == {"crash": 3}


def test_crashes_that_make_progress_are_not_counted_as_a_loop(launch):
    events = [{"kind": "crash", "stage": s, "step": n} for s in "ab" for n in (5, 9)]
    launch.plan(*events)
    assert launch.run() == 0
    assert launch.ends().count("crash") == 4


def test_steps_that_nobody_cut_are_counted_as_replayed_once(short):
    short.plan(
        {"kind": "crash", "stage": "a", "step": 7},
        {"kind": "early", "stage": "a", "step": 0, "times": 1},
    )
    assert short.run() == 0
    assert short.ends() == ["crash", "crash", "finished"]
    assert [item.replayed_steps for item in read_incarnations(short.run_dir)] == [0, 2, 0]


@pytest.mark.parametrize("kind", ["silent", "lie"])
def test_leaving_with_0_without_a_result_is_a_crash(short, kind):
    short.plan({"kind": kind, "stage": "a", "step": 2}, {"kind": "silent", "step": 2, "rank": 1})
    assert short.run() == 0
    assert short.ends() == ["crash", "finished"]


def test_bad_input_of_a_rank_is_passed_on_and_not_repeated(launch, capsys):
    launch.plan({"kind": "refuse", "stage": "b", "step": 1, "rank": 1, "times": 9})
    assert launch.run() == 2
    error = capsys.readouterr().err
    assert error == "recipe x:\n  stages.a.data: folder /nowhere is missing\n"
    assert launch.ends() == ["finished", "bad_input"]


def test_a_broken_manifest_is_named_and_the_older_one_used(short, capsys):
    short.plan({"kind": "refuse", "stage": "a", "step": 9})
    assert short.run() == 2
    newest = short.run_dir / "checkpoints" / "a" / "step_00000008" / "manifest.json"
    newest.write_text('{"schema_version": 1, "step"')
    newest.parent.rename(newest.parent.with_name("step_00000007"))  # 8 is written again
    capsys.readouterr()
    assert short.run() == 0
    out = capsys.readouterr().out
    assert "skipped: " in out
    assert "step_00000007" in out
    assert "a: after step 4 of 10" in out
    assert short.metrics() == ONE_STAGE


def test_a_torn_last_line_of_the_metrics_does_no_harm(short):
    short.plan({"kind": "tear", "stage": "a", "step": 7})
    assert short.run() == 0
    assert short.metrics() == ONE_STAGE
    assert read_status(short.run_dir).replayed_steps == 2


def test_a_stop_file_keeps_the_run_from_starting(launch, capsys):
    assert launch.run() == 0
    shutil.rmtree(launch.run_dir / "checkpoints" / "c")
    (launch.run_dir / "STOP").write_text("maintenance\n")
    before = launch.incarnations()
    capsys.readouterr()
    assert launch.run() == 0
    out = capsys.readouterr().out
    assert "maintenance" in out
    assert f"rm {launch.run_dir / 'STOP'}" in out
    assert launch.incarnations() == before
    assert read_status(launch.run_dir).state == "stopped"
    (launch.run_dir / "STOP").unlink()
    assert launch.run() == 0
    assert read_status(launch.run_dir).state == "done"


def test_a_changed_recipe_is_refused_with_old_and_new_value(short, capsys):
    assert short.run() == 0
    stored = (short.run_dir / "resolved.yaml").read_bytes()
    assert short.run("seed=7", "stages.a.optimizer.learning_rate=0.5") == 2
    error = capsys.readouterr().err
    assert "seed: 0 -> 7" in error
    assert "stages.a.optimizer.learning_rate: 0.001 -> 0.5" in error
    assert "use another --run-dir, or the old values" in error
    assert (short.run_dir / "resolved.yaml").read_bytes() == stored


def test_a_free_difference_is_adopted_and_named(short, capsys):
    assert short.run() == 0
    capsys.readouterr()
    assert short.run("checkpoint.every_steps=2") == 0
    assert "checkpoint.every_steps: 4 -> 2" in capsys.readouterr().out
    assert load_resolved(short.run_dir / "resolved.yaml").checkpoint.every_steps == 2
    # without the override it goes back, and says so
    assert short.run() == 0
    assert "checkpoint.every_steps: 2 -> 4" in capsys.readouterr().out


def test_nproc_that_does_not_divide_is_refused_with_numbers_that_work(launch, capsys):
    assert launch.run("--nproc", "3", "stages.b.batch_size=12") == 2
    error = capsys.readouterr().err
    assert "stage 'a': batch_size 8" in error
    assert "stage 'b'" not in error
    assert "use --nproc 2 or 4" in error
    assert not launch.run_dir.exists()


@pytest.mark.parametrize("nproc", ["0", "-2"])
def test_nproc_below_one_is_refused(launch, capsys, nproc):
    assert launch.run(f"--nproc={nproc}") == 2
    assert "expected at least 1" in capsys.readouterr().err
    assert not launch.run_dir.exists()


def test_a_faulty_recipe_writes_nothing(launch, capsys):
    assert launch.run("stages.a.stepz=5") == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert not launch.run_dir.exists()


def test_a_foreign_folder_is_left_alone(launch, capsys):
    launch.run_dir.mkdir()
    (launch.run_dir / "thesis.tex").write_text("x")
    assert launch.run() == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in launch.run_dir.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(launch, capsys):
    launch.run_dir.write_text("x")
    assert launch.run() == 2
    assert "is a file" in capsys.readouterr().err


def test_what_a_killed_first_start_left_is_no_foreign_folder(short):
    short.run_dir.mkdir()
    (short.run_dir / ".lock").touch()
    (short.run_dir / "recipe.yaml").write_text("half")
    (short.run_dir / ".resolved.yaml.1.tmp").write_text("half")
    assert short.run() == 0


def test_a_full_disk_is_named_before_anything_starts(launch, capsys, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9, free=12 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert launch.run() == 2
    error = capsys.readouterr().err
    assert "12 MB free" in error
    assert str(launch.run_dir) in error
    assert not launch.run_dir.exists()


def test_a_preempted_rank_goes_on_without_being_asked(launch):
    launch.plan({"kind": "worker", "stage": "a", "step": 2}, step_seconds=0.02)
    process = launch.spawn()
    while not (launch.folder / "worker0").exists():
        assert process.poll() is None
    for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        command = Path(f"/proc/{line}/cmdline").read_bytes()
        if b"fake_trainer" in command:
            os.kill(int(line), signal.SIGUSR2)
    assert process.wait(20) == 0, process.communicate()
    process.communicate()
    assert launch.ends() == ["preempted", "finished", "finished", "finished"]
    assert read_status(launch.run_dir).restarts == {"preempted": 1}


def test_epochs_never_repeat_even_if_the_history_is_lost(launch):
    launch.run_dir.mkdir()
    first = new_epoch(launch.run_dir)
    second = new_epoch(launch.run_dir)
    assert (first.split("-")[1], second.split("-")[1]) == ("1", "2")


def test_incarnation_lines_have_the_agreed_fields(short):
    assert short.run() == 0
    agreed = {"epoch", "stage", "from_step", "world_size", "started_at", "ended_at"}
    agreed |= {"verdict", "reason", "step"}
    for line in short.incarnations():
        assert agreed <= set(line)
    start, end = short.incarnations()[:2]
    assert (start["verdict"], start["ended_at"]) == (None, None)
    assert (end["verdict"], end["step"], end["world_size"]) == ("finished", 10, 2)


def test_a_torn_history_loses_one_line_only(launch):
    launch.plan({"kind": "refuse", "stage": "b", "step": 1})
    assert launch.run() == 2
    path = launch.run_dir / "incarnations.jsonl"
    path.write_text(path.read_text() + '{"epoch": "local-9')
    assert launch.run() == 0
    assert len(read_incarnations(launch.run_dir)) == 4
    json.loads(path.read_text().splitlines()[-1])


def test_checkpoints_of_later_stages_do_not_skip_an_earlier_one(launch):
    assert launch.run() == 0
    shutil.rmtree(launch.run_dir / "checkpoints" / "a")
    put_checkpoint(launch.run_dir, stage="a", step=4)
    assert launch.run() == 0
    assert launch.ends()[-1] == "finished"
    assert launch.incarnations()[-1]["stage"] == "a"
