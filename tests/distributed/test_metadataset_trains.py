"""The blend of the documentation, energon's own format, trains through the launcher and resumes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_resume import LIMIT, history, wait_for_step

from cocoa_dist.metrics import read_json_lines

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "blend.yaml"
STAGE = "joint_reconstruction"
STEPS = 6


def start(run_dir: Path, blend: Path, *more: str) -> subprocess.Popen[str]:
    data = f"stages.{STAGE}.data"
    command = [
        *(sys.executable, "-m", "launcher", "run", "debug", "data.log_sample_ids=true"),
        *(f"{data}.sources=null", f"{data}.metadataset={blend}", f"stages.{STAGE}.steps={STEPS}"),
        *more,
        *("--run-dir", str(run_dir), "--nproc", "2", "--until", STAGE),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run_dir: Path, blend: Path, *more: str) -> str:
    launcher = start(run_dir, blend, *more)
    said, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, said
    return said


def copied(folder: Path, *, weight: int = 3) -> Path:
    """The example beside absolute paths, to be edited."""
    tree = yaml.safe_load(EXAMPLE.read_text())
    blend = tree["splits"]["train"]["blend"]
    for part in blend:
        part["path"] = str((EXAMPLE.parent / part["path"]).resolve())
    blend[0]["weight"] = weight
    path = folder / "blend.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run_dir, EXAMPLE)
    return run_dir


def test_both_parts_are_trained_on(undisturbed) -> None:
    lines = list(read_json_lines(undisturbed / "samples" / f"{STAGE}.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["dataset"] for line in lines} == {"drawings", "validation"}


def test_a_run_is_resumed_on_the_same_file_and_on_an_edited_one(undisturbed, tmp_path) -> None:
    """The same content at another path is the same run; another weight has to be asked for."""
    run_dir, blend = tmp_path / "run", copied(tmp_path)
    launcher = start(run_dir, blend)
    wait_for_step(run_dir, stage=STAGE, step=2)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=LIMIT)
    before = len(history(run_dir))
    assert 2 <= before < STEPS
    copied(tmp_path, weight=1)
    refused = start(run_dir, blend)
    said, _ = refused.communicate(timeout=LIMIT)
    assert refused.returncode == 2, said
    assert f"stages.{STAGE}.data.metadataset.parts.drawings.weight: 0.75 -> 0.5" in said
    copied(tmp_path)
    finish(run_dir, blend)
    assert history(run_dir) == history(undisturbed)


def test_an_edited_blend_goes_on_if_it_is_asked_for(tmp_path) -> None:
    run_dir, blend = tmp_path / "run", copied(tmp_path)
    launcher = start(run_dir, blend)
    wait_for_step(run_dir, stage=STAGE, step=2)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=LIMIT)
    copied(tmp_path, weight=1)
    said = finish(run_dir, blend, "data.on_change=continue")
    assert f"stages.{STAGE}.data.metadataset.parts.drawings.weight: 0.75 -> 0.5" in said
    assert [step for _, step, *_ in history(run_dir)] == list(range(1, STEPS + 1))
