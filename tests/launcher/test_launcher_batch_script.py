"""The batch script's own decisions: its launcher only returns a code, and scontrol is a fake."""

import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cocoa_dist.config import PACKAGE_DIR

CHECKOUT = PACKAGE_DIR.parent
SCRIPT = CHECKOUT / "slurm/cocoa_pipeline.sh"


@dataclass
class Batch:
    """A place where the batch script finds our python and our scontrol."""

    folder: Path

    def launcher(self, body: str) -> None:
        path = self.folder / "venv/bin/python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "$@" >> {self.folder}/launched\n{body}\n')
        path.chmod(0o755)

    def scontrol(self, *, state: str = "RUNNING", refuse: bool = False) -> None:
        """Write calls down; a requeue is followed by SLURM's SIGTERM to the batch script."""
        path = self.folder / "bin/scontrol"
        path.parent.mkdir(exist_ok=True)
        requeue = "exit 1" if refuse else "(sleep 0.3; kill -TERM $PPID) >/dev/null 2>&1 &"
        path.write_text(
            f'#!/bin/bash\n[[ $1 == show ]] || echo "$@" >> {self.folder}/scontrol.calls\n'
            f'case $1 in show) echo "JobId=7 JobState={state} x=y Command={SCRIPT} '
            f'WorkDir=/tmp" ;; requeue) {requeue} ;; esac\n'
        )
        path.chmod(0o755)

    def calls(self) -> list[str]:
        path = self.folder / "scontrol.calls"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "COCOA_VENV": str(self.folder / "venv"),
            "COCOA_ROOT": str(CHECKOUT),
            **variables,
        }
        words = ["recipe=debug", f"run_dir={self.folder / 'run'}"]
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, process: "subprocess.Popen[str]") -> str:
        """Wait for the end of a batch script; return what it wrote."""
        try:
            return process.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(process.communicate()[0]) from None

    def finish(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        out = self.end(process)
        return process.returncode, out

    def wait_for_launcher(self) -> None:
        deadline = time.monotonic() + 10
        while not (self.folder / "launched").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    made = Batch(tmp_path)
    made.scontrol()
    return made


@pytest.mark.parametrize("code", [0, 2, 93])
def test_a_verdict_is_passed_on_and_nothing_is_queued_again(batch, code):
    batch.launcher(f"exit {code}")
    assert batch.finish()[0] == code
    assert batch.calls() == []


def test_an_interruption_is_queued_again_and_waited_out(batch):
    batch.launcher("exit 75")
    code, out = batch.finish()
    assert (code, batch.calls()) == (0, ["requeue 7"])
    assert "queued again" in out


def test_of_an_array_only_this_task_is_queued_again(batch):
    batch.launcher("exit 75")
    batch.finish(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert batch.calls() == ["requeue 5_3"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT"])
def test_a_job_that_slurm_ends_is_never_brought_back(batch, state):
    batch.launcher("exit 75")
    batch.scontrol(state=state)
    code, out = batch.finish()
    assert (code, batch.calls()) == (143, [])
    assert "not queued again" in out


def test_sigterm_means_that_slurm_decides(batch):
    batch.launcher("trap 'exit 75' TERM; while :; do sleep 0.05; done")
    process = batch.start()
    batch.wait_for_launcher()
    process.send_signal(signal.SIGTERM)
    batch.end(process)
    assert (process.returncode, batch.calls()) == (143, [])


def test_the_warning_reaches_the_launcher_and_the_job_is_queued_again(batch):
    batch.launcher("trap 'exit 75' USR2; while :; do sleep 0.05; done")
    process = batch.start()
    batch.wait_for_launcher()
    process.send_signal(signal.SIGUSR2)
    out = batch.end(process)
    assert (process.returncode, batch.calls()) == (0, ["requeue 7"])
    assert "the time limit is near" in out


def test_a_warning_that_kills_the_launcher_at_its_start_is_an_interruption_too(batch):
    batch.launcher("exec sleep 20")
    process = batch.start()
    batch.wait_for_launcher()
    process.send_signal(signal.SIGUSR2)
    batch.end(process)
    assert batch.calls() == ["requeue 7"]


def test_a_launcher_that_breaks_is_started_three_times(batch):
    batch.launcher("exit 1")
    code, _ = batch.finish()
    assert code == 1
    assert len((batch.folder / "launched").read_text().splitlines()) == 3


def test_nodes_that_were_complained_about_are_excluded(batch):
    batch.launcher(
        f"mkdir -p {batch.folder}/run/submit; echo -n n2,n5 > "
        f"{batch.folder}/run/submit/7.exclude; exit 75"
    )
    batch.finish()
    assert batch.calls() == ["requeue 7", "update JobId=7 ExcNodeList=n2,n5"]


def test_a_requeue_that_slurm_refuses_ends_with_75(batch):
    batch.launcher("exit 75")
    batch.scontrol(refuse=True)
    assert batch.finish()[0] == 75


def test_a_requeue_whose_sigterm_is_faster_than_its_answer_is_none_that_was_refused(batch):
    batch.launcher("exit 75")
    path = batch.folder / "bin/scontrol"
    slow = "kill -TERM $PPID; kill -TERM $$; sleep 0.2; exit 0"
    path.write_text(
        path.read_text().replace("(sleep 0.3; kill -TERM $PPID) >/dev/null 2>&1 &", slow)
    )
    code, out = batch.finish()
    assert (code, batch.calls()) == (0, ["requeue 7"])
    assert "refused" not in out


def test_without_scontrol_the_job_leaves_with_75(batch):
    batch.launcher("exit 75")
    (batch.folder / "bin/scontrol").unlink()
    path = batch.folder / "bin"
    for name in ("bash", "sed", "dirname", "sleep", "mkdir"):
        (path / name).symlink_to(f"/usr/bin/{name}")
    code, out = batch.finish(PATH=str(path))
    assert code == 75
    assert "no scontrol here" in out


def test_a_run_that_was_taken_over_leaves_quietly(batch):
    batch.launcher("exit 76")
    assert batch.finish()[0] == 0
    assert batch.calls() == []


def test_a_requeue_runs_the_code_the_recipe_and_the_cluster_file_that_were_kept(batch):
    batch.launcher(f"echo $PYTHONPATH > {batch.folder}/path")
    kept = batch.folder / "run/submit"
    kept.mkdir(parents=True)
    (kept / "7.code").write_text("/kept/code\n")
    (kept / "7.cluster.yaml").write_text("nodes: 2\n")
    (batch.folder / "run/resolved.yaml").write_text("name: kept\n")
    batch.finish(SLURM_RESTART_COUNT="1")
    words = (batch.folder / "launched").read_text().split()
    assert words[3] == str(batch.folder / "run/resolved.yaml")
    assert words[-1] == str(kept / "7.cluster.yaml")
    assert (batch.folder / "path").read_text() == "/kept/code\n"
