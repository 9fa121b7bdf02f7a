"""Bad input through the real command: a clear message, exit code 2, nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cocoa_dist.config import resolve_path


def run(*arguments: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", "run", *arguments, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def copy_of_the_data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_path("asset:emoji/unseen_concept"), tmp_path / "data"))


def with_data(path: Path) -> list[str]:
    return [f"stages.joint_reconstruction.data.sources.emoji.path={path}"]


def truncate(data: Path) -> None:
    shard = data / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: (data / "shard-00000.arrow").unlink(), "shard-00000.arrow"),
        (truncate, "bytes"),
        (lambda data: (data / "manifest.json").unlink(), "manifest.json"),
    ],
    ids=["missing", "truncated", "no_manifest"],
)
def test_unusable_shards_are_named_and_nothing_is_written(tmp_path, spoil, message) -> None:
    data = copy_of_the_data(tmp_path)
    spoil(data)
    done = run("debug", *with_data(data), run_dir=tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_model_folder_that_is_not_there_says_how_to_get_it(tmp_path) -> None:
    done = run("cocoa_qwen2_vl_2b", run_dir=tmp_path / "run")
    assert done.returncode == 2
    assert "hf download Qwen/Qwen2-VL-2B-Instruct" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debugg"], "did you mean 'debug'"),
        (["debug", "stages.contrastive.stepz=3"], "did you mean 'steps'"),
        (["debug", "stages.contrastive.steps=many"], "stages.contrastive.steps: found 'many'"),
        (["debug", "stages.contrastive.init_from=nowhere"], "not an earlier stage"),
        (["debug", "--nproc", "5"], "does not divide every batch size"),
    ],
)
def test_wrong_command_line_is_explained(tmp_path, arguments, message) -> None:
    done = run(*arguments, run_dir=tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
