"""What status says about folders made by hand, and how fast."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_harness import hurry, make_launch, put_checkpoint

import launcher
from cocoa_dist.config import load_recipe
from cocoa_dist.manifest import Best
from launcher.__main__ import main
from launcher.claim import claimed
from launcher.history import Verdict, end_incarnation, start_incarnation
from launcher.runfolder import Holder, prepare
from launcher.status import read_status

FIELDS = """run recipe state stage step target_step epoch restarts replayed_steps goodput
seconds last_checkpoint eta_seconds stages quarantined loader_restarts job""".split()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hurry(monkeypatch)
    made = make_launch(tmp_path)
    made.run_dir.mkdir()
    prepare(made.run_dir, config=load_recipe(str(made.recipe)), recipe_file=made.recipe)
    return made.run_dir


def begin(run_dir: Path, *, stage: str = "a", from_step: int = 0, number: int = 1):
    epoch = f"local-{number}-abcd"
    return start_incarnation(run_dir, epoch=epoch, stage=stage, from_step=from_step, world_size=2)


def log(run_dir: Path, steps: range, *, stage: str = "a", number: int = 1, age: float = 0.0):
    """Append steps of 1 s each, the last of which ended `age` seconds ago."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            ended = time.time() - age - (steps[-1] - step)
            line = {"stage": stage, "step": step, "epoch": f"local-{number}-abcd"}
            line |= {"time": ended, "step_seconds": 0.5, "loss": 1.0}
            file.write(json.dumps(line) + "\n")


def age_start(run_dir: Path, seconds: float) -> None:
    """Move every time in the history into the past."""
    path = run_dir / "incarnations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["started_at"] -= seconds
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_was_never_started_is_pending(run_dir):
    status = read_status(run_dir)
    assert (status.state, status.stage, status.step, status.target_step) == ("pending", "a", 0, 10)
    assert (status.epoch, status.goodput, status.eta_seconds) == (None, None, None)
    assert [stage.state for stage in status.stages] == ["pending"] * 3


def test_a_running_stage_shows_step_and_time_left(run_dir):
    put_checkpoint(run_dir, stage="a", step=4)
    begin(run_dir, from_step=4)
    log(run_dir, range(5, 8))
    beat = {"kind": "beat", "time": time.time(), "stage": "a", "epoch": "local-1-abcd", "step": 7}
    beat |= {"steps": 3, "seconds": 1.5, "waited": 0.0, "longest": 0.5}
    (run_dir / "events.jsonl").write_text(json.dumps(beat) + "\n")  # without the submission
    age_start(run_dir, 10)
    with claimed(run_dir, Holder.of_this_process()):
        status = read_status(run_dir)
    assert (status.state, status.step) == ("running", 7)
    assert status.eta_seconds == pytest.approx(23, abs=0.1)  # 3 + 10 + 10 steps of 1 s
    assert status.goodput == pytest.approx(3 * 0.5 / 10, abs=0.02)
    assert sum(status.seconds.values()) == pytest.approx(10, abs=0.2)
    assert status.last_checkpoint is not None
    assert (status.last_checkpoint.stage, status.last_checkpoint.step) == ("a", 4)


def test_steps_of_an_earlier_incarnation_are_not_shown_as_reached(run_dir):
    put_checkpoint(run_dir, stage="a", step=4)
    log(run_dir, range(1, 8), number=1)
    begin(run_dir, from_step=4, number=2)
    with claimed(run_dir, Holder.of_this_process()):
        assert read_status(run_dir).step == 4
    assert read_status(run_dir).step == 4


@pytest.mark.parametrize(("age", "state"), [(50, "running"), (70, "stalled")])
def test_no_step_for_a_minute_is_a_stall(run_dir, age, state):
    begin(run_dir)
    log(run_dir, range(1, 4), age=age)
    age_start(run_dir, 200)
    with claimed(run_dir, Holder.of_this_process()):
        assert read_status(run_dir).state == state


def test_slow_steps_get_more_patience(run_dir):
    begin(run_dir)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, 5):
            when = time.time() - 150 - 10 * (4 - step)
            line = {"stage": "a", "step": step, "epoch": "local-1-abcd", "time": when}
            file.write(json.dumps(line) + "\n")
    age_start(run_dir, 1000)
    with claimed(run_dir, Holder.of_this_process()):
        assert read_status(run_dir).state == "running"  # 150 s < 20 steps of 10 s


def test_a_start_without_a_step_is_no_stall_for_a_minute(run_dir):
    log(run_dir, range(1, 4), age=5000)
    begin(run_dir, number=2)
    with claimed(run_dir, Holder.of_this_process()):
        assert read_status(run_dir).state == "running"
    age_start(run_dir, 61)
    with claimed(run_dir, Holder.of_this_process()):
        assert read_status(run_dir).state == "stalled"


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (Verdict.PREEMPTED, "preempted"),
        (Verdict.CRASH, "preempted"),
        (Verdict.FINISHED, "preempted"),
        (Verdict.STOPPED, "stopped"),
        (Verdict.GIVEN_UP, "given_up"),
        (Verdict.BAD_INPUT, "given_up"),
    ],
)
def test_the_last_verdict_decides_when_no_launcher_is_at_work(run_dir, verdict, state):
    begun = begin(run_dir)
    assert read_status(run_dir).state == "preempted"
    end_incarnation(run_dir, begun, verdict=verdict, reason="")
    assert read_status(run_dir).state == state
    (run_dir / "STOP").touch()
    assert read_status(run_dir).state == "stopped"


def test_a_done_run_is_done_whatever_else_lies_there(run_dir):
    for stage in "abc":
        put_checkpoint(run_dir, stage=stage, step=10)
    (run_dir / "STOP").touch()
    status = read_status(run_dir)
    assert (status.state, status.stage, status.step, status.eta_seconds) == ("done", "c", 10, 0.0)
    assert [stage.state for stage in status.stages] == ["done"] * 3


def test_replayed_steps_and_restarts_add_up(run_dir):
    first = begin(run_dir, number=1)
    log(run_dir, range(1, 8), number=1)
    end_incarnation(run_dir, first, verdict=Verdict.CRASH, reason="x")
    second = begin(run_dir, number=2, from_step=4)  # 5, 6 and 7 are replayed
    end_incarnation(run_dir, second, verdict=Verdict.PREEMPTED, reason="")
    begin(run_dir, number=3, from_step=4)  # the second one did not get to cut them
    status = read_status(run_dir)
    assert status.restarts == {"crash": 1, "preempted": 1}
    assert status.replayed_steps == 3


def test_json_has_exactly_the_promised_fields(run_dir, capsys):
    put_checkpoint(run_dir, stage="a", step=4)
    begin(run_dir)
    assert main(["status", str(run_dir), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert sorted(fields) == sorted(FIELDS)
    assert set(fields["last_checkpoint"]) == {"stage", "step", "age_seconds"}
    assert (fields["run"], fields["recipe"]) == ("run", "small")


def test_the_best_checkpoint_is_named(run_dir, capsys):
    best = Best(measure="held_out_recall/validation", step=4, value=0.4375)
    put_checkpoint(run_dir, stage="a", step=10, best=best)
    begin(run_dir)
    assert main(["status", str(run_dir)]) == 0
    assert "a, step 4: held_out_recall/validation 0.4375" in capsys.readouterr().out
    assert main(["status", str(run_dir), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["best"] for stage in stages] == [best.model_dump(), None, None]


def test_the_table_shows_stages_and_quarantined_records(run_dir, capsys):
    (run_dir / "quarantine").mkdir()
    lines = [
        '{"kind": "wrong checksum"}\n{"kind": "text is empty"}\n',
        '{"kind": "wrong checksum"}\n',
    ]
    (run_dir / "quarantine" / "a.rank0.jsonl").write_text(lines[0])
    (run_dir / "quarantine" / "a.rank1.jsonl").write_text(lines[1] + '{"kind": "te')  # torn
    assert main(["status", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "3 uses of records: 2 wrong checksum, 1 text is empty" in out
    counts = {"wrong checksum": 2, "text is empty": 1}
    assert read_status(run_dir).quarantined == counts
    assert "pending" in out


def test_loaders_that_were_started_again_are_counted_over_ranks_and_stages(run_dir, capsys):
    assert main(["status", str(run_dir)]) == 0
    assert "loaders" not in capsys.readouterr().out
    (run_dir / "loader_deaths").mkdir()
    (run_dir / "loader_deaths" / "a.rank0.jsonl").write_text('{"what": "x"}\n{"what": "y"}\n')
    (run_dir / "loader_deaths" / "b.rank1.jsonl").write_text('{"what": "z"}\n{"wh')  # torn
    assert read_status(run_dir).loader_restarts == 3
    assert main(["status", str(run_dir)]) == 0
    assert "3 started again (loader_deaths/)" in capsys.readouterr().out


def test_broken_lines_anywhere_are_skipped(run_dir):
    begin(run_dir)
    log(run_dir, range(1, 4))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('\n[]\n{"stage": 1}\nnull\n\x00\x00\n{"stage": "a", "st')
    with claimed(run_dir, Holder.of_this_process()):
        assert read_status(run_dir).step == 3


@pytest.mark.parametrize("command", ["status", "stop"])
def test_other_folders_are_refused(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main([command, str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_stop_says_what_happens_next_and_leaves_a_done_run_alone(run_dir, capsys):
    assert main(["stop", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "no launcher is at work" in out
    note = (run_dir / "STOP").read_text()
    assert main(["stop", str(run_dir)]) == 0
    assert "already" in capsys.readouterr().out
    assert (run_dir / "STOP").read_text() == note
    (run_dir / "STOP").unlink()
    for stage in "abc":
        put_checkpoint(run_dir, stage=stage, step=10)
    assert main(["stop", str(run_dir)]) == 0
    assert not (run_dir / "STOP").exists()


def cpu_seconds(command: list[str], *, root: str) -> float:
    """Run a program that ends well; return what it took, its own children included."""
    before = os.times()
    subprocess.run(
        command, check=True, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.DEVNULL
    )
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def test_status_of_a_long_run_is_fast_and_needs_no_torch(run_dir):
    begin(run_dir)
    for step in range(1, 1001):
        put_checkpoint(run_dir, stage="a", step=step, target_step=50_000)
    log(run_dir, range(1, 50_001))
    root = str(Path(launcher.__file__).parents[1])
    code = (
        "import sys; from launcher.__main__ import main; main(sys.argv[1:]); "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    status = [sys.executable, "-c", code, "status", str(run_dir), "--json"]
    start = [sys.executable, "-c", "import launcher.__main__"]
    # CPU seconds beside those of a start alone (1.3 to 1.5 times): both grow on a busy machine
    assert cpu_seconds(status, root=root) < 3 * cpu_seconds(start, root=root)
