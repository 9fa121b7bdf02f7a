"""tools/chaos.py finds what differs, goes on where it was, and says what it could not do."""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
STAGE = "joint_reconstruction"


@pytest.fixture
def tools(monkeypatch):
    """Return the tool and its runs as modules."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import chaos
    import chaos_run

    return argparse.Namespace(chaos=chaos, run=chaos_run)


def make_run(tools, folder: Path, *command: str):
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", *(command or ("pass",))]
    return tools.run.Run(folder, words, folder.parent / f"{folder.name}.log")


def finished(tools, folder: Path, *, loss=1.0, norm=2.0, records=((1, 2), (3, 4)), weights=b"w"):
    """Write what a run of two steps leaves."""
    run = make_run(tools, folder)
    lines = [
        {"stage": STAGE, "step": step, "loss": loss, "grad_norm": norm, "batch_digest": "d"}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    samples = [{"step": n, "records": list(used)} for n, used in enumerate(records, start=1)]
    text = "".join(json.dumps(line) + "\n" for line in samples)
    (folder / "samples" / f"{STAGE}.jsonl").write_text(text)
    newest = folder / "checkpoints" / STAGE / "step_00000002"
    newest.mkdir(parents=True)
    (newest / "weights.safetensors").write_bytes(weights)
    return run


def verdict(tools, tmp_path, **changes):
    quiet, harmed = (
        finished(tools, tmp_path / name, **values)
        for name, values in (("quiet", {}), ("harmed", changes))
    )
    return tools.run.judge(quiet, harmed, stages=[STAGE])


def test_runs_that_are_equal_have_nothing_to_be_said_about(tools, tmp_path) -> None:
    found = verdict(tools, tmp_path)
    assert (found.steps, found.describe()) == (2, [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": 1.0 + 2**-52}, f"{STAGE} step 1: loss 1.0 and 1.0000000000000002"),
        ({"norm": 2.5}, f"{STAGE} step 1: grad_norm 2.0 and 2.5"),
        ({"weights": b"v"}, f"{STAGE}: other final weights"),
        ({"records": ((3, 4), (1, 2))}, f"{STAGE}: other records, or in another order"),
    ],
)
def test_the_first_difference_is_named(tools, tmp_path, change, said) -> None:
    assert verdict(tools, tmp_path, **change).describe() == [said]


def test_records_that_are_lost_and_repeated_are_counted(tools, tmp_path) -> None:
    found = verdict(tools, tmp_path, records=((1, 2), (1, 2), (3,)))
    assert (found.lost, found.repeated) == (1, 2)
    assert "1 records lost, 2 repeated" in found.describe()


def ended(tools, tmp_path, code: int, **changes):
    run = make_run(tools, tmp_path / "run", f"raise SystemExit({code})")
    run.start()
    for name, value in changes.items():
        setattr(run, name, value)
    run.process.wait()
    return run


@pytest.mark.parametrize("code", [1, 2])
def test_a_launcher_that_leaves_without_a_reason_is_a_fault(tools, tmp_path, code) -> None:
    run = ended(tools, tmp_path, code)
    with pytest.raises(tools.run.ChaosError, match=f"the launcher left with {code}"):
        tools.run.settle(run)


def test_a_full_disk_explains_that_a_launcher_asks_for_room(tools, tmp_path) -> None:
    run = ended(tools, tmp_path, 2, was_full=True)
    assert not tools.run.settle(run)
    assert (run.starts, run.manual_steps) == (2, 0)
    run.process.wait()


def test_a_launcher_that_gives_up_costs_a_manual_step(tools, tmp_path) -> None:
    run = ended(tools, tmp_path, 93)
    assert not tools.run.settle(run)
    assert (run.starts, run.manual_steps) == (2, 1)
    run.process.wait()


def test_processes_of_a_run_are_found_and_ended(tools, tmp_path) -> None:
    run = make_run(tools, tmp_path / "run")
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "cocoa_dist.train"]
    processes = [subprocess.Popen([*sleeper, str(run.folder)]) for _ in range(2)]
    other = subprocess.Popen([*sleeper, f"{run.folder}-another"])
    deadline = time.monotonic() + 30
    while len(run.ranks()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill_all()
    assert [process.wait() for process in processes] == [-9, -9]
    assert other.poll() is None
    other.kill()
    other.wait()


def test_one_bit_of_the_newest_checkpoint_is_flipped(tools, tmp_path) -> None:
    run = finished(tools, tmp_path / "run")
    tools.run._flip_a_byte(run, random.Random(0))
    newest = run.checkpoints()[0] / "weights.safetensors"
    assert newest.read_bytes() == b"w"  # the only one of its stage stays as it is
    newest.parent.with_name("step_00000001").mkdir()
    os.utime(newest.parent, (2**32, 2**32))
    tools.run._flip_a_byte(run, random.Random(0))
    assert (newest.read_bytes()[0] ^ ord("w")).bit_count() == 1


def test_a_save_that_was_killed_does_not_count_as_one_that_runs(tools, tmp_path) -> None:
    run = make_run(tools, tmp_path / "run")
    (run.folder / "checkpoints" / STAGE / ".staging-step_00000002-a").mkdir(parents=True)
    assert run.saving()
    run.old_stagings = run.stagings()
    assert not run.saving()
    (run.folder / "checkpoints" / STAGE / ".staging-step_00000002-b").mkdir()
    assert run.saving()


def some_deaths(tools, count: int, *, round_number: int = 1):
    place = tools.run.Place(STAGE, 4, saving=True)
    return [
        tools.chaos.Death("kill all", "while saving", place, round_number) for _ in range(count)
    ]


SETTINGS = {"recipe": "debug", "overrides": [], "seed": 7, "nproc": 2, "kind": None}


def test_the_state_is_what_was_written(tools, tmp_path) -> None:
    state = tools.chaos.State(SETTINGS, deaths=some_deaths(tools, 2), rounds=1, seconds=3.5)
    state.write(tmp_path)
    assert tools.chaos.State.read(tmp_path, settings=SETTINGS) == state


def test_the_state_of_another_call_is_refused(tools, tmp_path) -> None:
    tools.chaos.State(SETTINGS).write(tmp_path)
    with pytest.raises(SystemExit, match=r"remove .*, or give another --keep"):
        tools.chaos.State.read(tmp_path, settings={**SETTINGS, "seed": 8})


def test_a_second_call_with_the_same_folder_is_refused(tools, tmp_path) -> None:
    with tools.chaos._held(tmp_path), pytest.raises(SystemExit, match="held by another call"):
        with tools.chaos._held(tmp_path):
            pass


def test_deaths_of_a_run_that_was_lost_are_not_counted(tools, tmp_path, monkeypatch) -> None:
    """Its disk went with the call before: nobody has compared it."""
    deaths = [*some_deaths(tools, 2), *some_deaths(tools, 3, round_number=2)]
    tools.chaos.State(SETTINGS, deaths=deaths, rounds=1).write(tmp_path)
    options = argparse.Namespace(**SETTINGS, deaths=5, keep=None)
    chaos = tools.chaos.Chaos(tmp_path, options, stages=[STAGE])
    monkeypatch.setattr(chaos, "_mount", lambda folder: False)
    monkeypatch.setattr(chaos, "_disturb", lambda run: None)
    monkeypatch.setattr(tools.chaos, "judge", lambda *runs, stages: tools.run.Verdict())
    chaos._round(make_run(tools, tmp_path / "undisturbed"))
    assert chaos.state.deaths == deaths[:2]
    assert chaos.state.rounds == 2


def test_a_disk_that_cannot_be_mounted_is_said_where_nothing_else_was_asked_for(
    tools, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tools.chaos, "_run_quietly", lambda *command: "permission denied")
    settings = {**SETTINGS, "kind": ["fill the disk"]}
    chaos = tools.chaos.Chaos(
        tmp_path, argparse.Namespace(**settings, deaths=1, keep=None), stages=[STAGE]
    )
    monkeypatch.setattr(chaos, "_undisturbed", lambda run: None)
    chaos.go()
    assert chaos.state.faults == ["round 1: no small file system here: permission denied"]


def test_the_table_counts_by_kind_and_moment_and_names_faults(tools) -> None:
    state = tools.chaos.State(SETTINGS, deaths=some_deaths(tools, 3), rounds=2, starts=5, steps=48)
    state.no_disk = "mount: permission denied"
    text = tools.chaos.report(state)
    assert "| kill all | 0 | 0 | 3 | 0 | 3 | 3 |" in text
    assert "| **in all** | 0 | 0 | 3 | 0 | 3 | 3 |" in text
    assert "3 deaths in 2 runs, 5 starts" in text
    assert "fill the disk: skipped, no small file system here (mount: permission denied)" in text
    assert "every run ended bit-identical to the undisturbed one" in text
    state.faults.append("round 2: joint_reconstruction: other final weights")
    text = tools.chaos.report(state)
    assert "**FAULT** round 2: joint_reconstruction: other final weights" in text
    assert "bit-identical" not in text
