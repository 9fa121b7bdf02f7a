"""A folder that may not be written: named, exit 2, and the last whole checkpoint untouched.

Root may write everywhere, so the processes of these tests lose that privilege where they have it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cocoa_dist.manifest import step_folders
from cocoa_dist.metrics import read_json_lines

pytestmark = pytest.mark.slow

STAGE = "joint_reconstruction"
BOUND = (  # by permissions, as everybody but root is
    ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
)
TRAIN = (*(sys.executable, "-m", "cocoa_dist.train", "debug", "--stage", STAGE), "--run-dir")
LAUNCH = (*(sys.executable, "-m", "launcher", "run", "debug", "--nproc", "1"), "--run-dir")


if BOUND and shutil.which(BOUND[0]) is None:
    pytest.skip("no setpriv (of util-linux) to take root's privilege away", allow_module_level=True)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BOUND, *command], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def run_dir(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)  # pytest clears its folders one day


@pytest.mark.parametrize(
    ("command", "words"),
    [(TRAIN, "Permission denied"), (LAUNCH, "is not a folder one can write to")],
    ids=["trainer", "launcher"],
)
def test_a_run_folder_without_write_permission_is_named(command, words, run_dir) -> None:
    run_dir.chmod(0o555)
    done = run(*command, str(run_dir))
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert str(run_dir) in done.stderr.splitlines()[-1]
    assert list(run_dir.iterdir()) == []


def test_checkpoints_that_may_no_longer_be_written_end_the_run_and_stay_whole(run_dir) -> None:
    """The folder is closed after four steps; opened again, the same command ends the stage."""
    stop_early = f"stages.{STAGE}.steps=8"
    command = (
        *TRAIN,
        str(run_dir),
        stop_early,
        "guards.preflight=false",
        "checkpoint.every_steps=2",
    )
    closing = (
        "import sys, runpy; from pathlib import Path; from cocoa_dist.train import loop\n"
        "step = loop.StageRun._one_step\n"
        "def closing(self, number):\n"
        "    if number == 6:\n"
        "        self.checkpointer._settle()\n"
        f"        Path({str(run_dir / 'checkpoints' / STAGE)!r}).chmod(0o555)\n"
        "    return step(self, number)\n"
        "loop.StageRun._one_step = closing\n"
        "from cocoa_dist.train.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = run(sys.executable, "-c", closing, *command[3:])
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert "a checkpoint could not be written: [Errno 13] Permission denied" in last
    assert "older checkpoints are untouched, make room or give permission" in last
    folder = run_dir / "checkpoints" / STAGE
    assert step_folders(run_dir, stage=STAGE)[0].name == "step_00000004"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folder.chmod(0o755)
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on from step_00000004" in done.stdout
    kept = step_folders(run_dir, stage=STAGE)[-1]
    assert all(path.read_bytes() == data for path, data in before.items() if kept in path.parents)
    assert [line["step"] for line in read_json_lines(run_dir / "metrics.jsonl")] == [*range(1, 9)]
