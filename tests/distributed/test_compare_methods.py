"""tools/compare_methods.py with the real launcher: killed in the middle, it goes on and ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

TOOL = Path(__file__).parents[2] / "tools" / "compare_methods.py"
SMALL = {"path": "asset:emoji/unseen_concept", "limit": 20}
PRESET = {
    "control": "alone",
    "reference": "joint",
    "held_out": {"unseen": SMALL},
    "validation": {"validation": {"path": "asset:emoji/validation", "limit": 20}},
    "curve_every_steps": 4,
    "pilot_steps": 6,
    "pilot_rounds": 1,
    "arms": {
        "alone": {
            "about": "contrastive alone",
            "recipe": {
                "extends": "debug",
                "method": "contrastive",
                "stages": {
                    "joint_reconstruction": None,
                    "eos_bridged_reconstruction": None,
                    "contrastive": {"init_from": "model"},
                },
            },
        },
        "joint": {
            "about": "joint reconstruction before it",
            "recipe": {
                "extends": "debug",
                "stages": {
                    "eos_bridged_reconstruction": None,
                    "contrastive": {"init_from": "joint_reconstruction"},
                },
            },
        },
    },
}


def wait_until(happened, process, *, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has(path: Path, text: str) -> bool:
    return path.is_file() and text in path.read_text()


def launchers_of(folder: Path) -> list[int]:
    """Process ids of launchers and ranks at work below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder / "runs") in words or str(folder / "pilots") in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tmp_path) -> None:
    preset, out = tmp_path / "two.yaml", tmp_path / "out"
    preset.write_text(yaml.safe_dump(PRESET, sort_keys=False))
    command = [sys.executable, str(TOOL), "--preset", str(preset), "--seeds", "2"]
    command += ["--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    first = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        second_run = out / "runs" / "joint" / "seed0"
        wait_until(lambda: has(second_run / "metrics.jsonl", '"step": 3'), first)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    deadline = time.monotonic() + 30
    while launchers_of(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert launchers_of(out) == []  # nothing trains on without the tool
    partial = json.loads((out / "methods.json").read_text())
    assert [(m["row"], m["seed"]) for m in partial["missing"]] == [
        ("alone", 1),
        ("joint", 0),
        ("joint", 1),
    ]
    finished = (out / "runs" / "alone" / "seed0" / "incarnations.jsonl").read_text()
    plan = (out / "plan.json").read_text()

    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 4 runs are done already" in done.stdout
    assert (out / "runs" / "alone" / "seed0" / "incarnations.jsonl").read_text() == finished
    assert (out / "plan.json").read_text() == plan  # nothing was measured again
    content = json.loads((out / "methods.json").read_text())
    assert content["missing"] == []
    (group,) = content["groups"]
    alone, joint = group["rows"]
    assert joint["steps"] == {"joint_reconstruction": 8, "contrastive": 8}
    assert alone["steps"]["contrastive"] > 8
    assert joint["runs"]["0"]["restarts"] == 1
    for row in (alone, joint):
        assert sorted(row["runs"]) == ["0", "1"]
        assert row["scores"]["unseen/t2i/r10"]["n"] == 2
        for run in row["runs"].values():
            assert run["steps"] == sum(row["steps"].values())
            assert run["splits"]["unseen"]["n"] == 20
            assert run["curve"]["validation"]
    assert alone["runs"]["0"]["splits"] != alone["runs"]["1"]["splits"]  # the seed matters

    again = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert again.returncode == 0
    assert "4 of 4 runs are done already" in again.stdout
