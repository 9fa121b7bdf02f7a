"""A small recipe, manifests made by hand, and the launcher with the fake trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import launcher
from cocoa_dist.manifest import Best, Manifest, step_folder, write_manifest
from launcher.__main__ import main

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")
DRIVER = """\
import json, sys
from launcher.__main__ import main
sys.exit(main(sys.argv[2:], trainer=tuple(json.loads(sys.argv[1]))))
"""
RECIPE = """\
name: small
method: cocoa
model: {path: /nowhere/model}
checkpoint: {every_steps: 4}
stages:
"""
STAGE = """\
  %s:
    init_from: %s
    objective: {kind: reconstruction}
    data: {view: caption, sources: {none: {path: /nowhere/data}}}
    batch_size: 8
    steps: 10
    optimizer: {learning_rate: 1.0e-3}
"""


@dataclass(frozen=True)
class Launch:
    """Everything one test needs, below one temporary folder."""

    folder: Path
    spawned: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        return self.folder / "small.yaml"

    def plan(self, *events: dict[str, Any], step_seconds: float = 0.002) -> None:
        """Say what the fake trainer does; takes back what an earlier plan has counted."""
        for mark in self.folder.glob("fired-*"):
            mark.unlink()
        plan = {"step_seconds": step_seconds, "events": events}
        (self.folder / "script.json").write_text(json.dumps(plan))

    def trainer(self) -> tuple[str, ...]:
        return (sys.executable, "-I", "-S", str(FAKE_TRAINER), str(self.folder / "script.json"))

    def arguments(self, *more: str) -> list[str]:
        return ["run", str(self.recipe), *more, "--run-dir", str(self.run_dir)]

    def run(self, *more: str) -> int:
        """Run the launcher in this process; return its exit code."""
        return main(self.arguments(*more), trainer=self.trainer())

    def spawn(self, *more: str) -> "subprocess.Popen[str]":
        """Start the launcher as a process of its own; `end` ends it."""
        root = str(Path(launcher.__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(self.trainer()), *self.arguments(*more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
            preexec_fn=_heed_hangup,
        )
        self.spawned.append(process)
        return process

    def end(self) -> None:
        """End whatever a failed test has left behind."""
        for process in self.spawned:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for pid in processes_about(self.folder):
            kill_quietly(pid)

    def metrics(self) -> list[tuple[str, int]]:
        """(stage, step) of every line of metrics.jsonl."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [(fields["stage"], fields["step"]) for fields in map(json.loads, lines)]

    def incarnations(self) -> list[dict[str, Any]]:
        """Lines of incarnations.jsonl."""
        lines = (self.run_dir / "incarnations.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def ends(self) -> list[str]:
        """Verdicts in the order of the ends."""
        return [line["verdict"] for line in self.incarnations() if line["verdict"]]

    def starts(self) -> list[dict[str, str]]:
        """Environment of rank 0 at each start."""
        return [json.loads(s) for s in (self.folder / "starts.jsonl").read_text().splitlines()]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the launcher's waits in this process, and leave git alone."""
    monkeypatch.setattr("launcher.runfolder.describe_code", lambda: "commit abc\n")
    monkeypatch.setattr("launcher.backend_local._PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("launcher.backend_local._SETTLE_SECONDS", 0.2)
    monkeypatch.setattr("launcher.backend_local._POLL_SECONDS", 0.02)
    monkeypatch.setattr("launcher.backend_local._TERM_SECONDS", 1.0)


def make_launch(folder: Path, *, stages: Sequence[str] = ("a", "b", "c")) -> Launch:
    text = RECIPE
    for before, stage in zip(("model", *stages), stages, strict=False):
        text += STAGE % (stage, before)
    launch = Launch(folder)
    launch.recipe.write_text(text)
    launch.plan()
    return launch


def put_checkpoint(
    run_dir: Path,
    *,
    stage: str,
    step: int,
    target_step: int = 10,
    complete: bool | None = None,
    best: Best | None = None,
) -> Path:
    """Write a checkpoint folder with a manifest and nothing else."""
    folder = step_folder(run_dir, stage=stage, step=step)
    folder.mkdir(parents=True)
    manifest = Manifest(
        run="run",
        recipe_fingerprint="0" * 64,
        stage=stage,
        step=step,
        target_step=target_step,
        complete=step == target_step if complete is None else complete,
        epoch="local-1-abcd",
        parent=None,
        world_size=2,
        engine="fake",
        versions={},
        base_model="",
        data_state={},
        samples=0,
        tokens=0,
        skipped_steps=0,
        wall_seconds=2.0 * step,
        productive_seconds=1.0 * step,
        train_cpu_seconds=1.0 * step,
        loss={"total": 0.5},
        best=best,
        files=(),
    )
    write_manifest(folder, manifest)
    return folder


def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait until something holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def processes_about(folder: Path) -> list[int]:
    """Processes with `folder` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command:
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _heed_hangup() -> None:
    """Undo what a test run under nohup hands down: a launcher survives what its parent ignores."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
