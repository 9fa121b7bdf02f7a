"""Records that cannot be used: masked, named, counted, and bounded; and who may train where."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cocoa_dist.config import resolve_path
from cocoa_dist.data.shards import ShardReader, write_shards
from cocoa_dist.manifest import newest
from cocoa_dist.metrics import read_json_lines

STAGE = "joint_reconstruction"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """64 records, of which number 5 has pictures that no decoder takes."""
    reader = ShardReader(resolve_path("asset:emoji/train"))
    records = [reader.record(i) for i in range(64)]
    reader.close()
    broken = tuple(image[: len(image) // 3] for image in records[5].images)
    records[5] = replace(records[5], images=broken)
    folder = tmp_path_factory.mktemp("data") / "emoji"
    write_shards(records, folder, info={})
    return folder


def train(data: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    run_dir.mkdir(exist_ok=True)
    source = f"stages.{STAGE}.data.sources.emoji.path={data}"
    return subprocess.run(
        [
            *(sys.executable, "-m", "cocoa_dist.train", "debug", source, *overrides),
            *("--stage", STAGE, "--run-dir", str(run_dir)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_bad_record_is_left_out_named_and_counted(data, tmp_path) -> None:
    done = train(data, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = newest(tmp_path / "run", stage=STAGE)
    assert found is not None
    assert found[1].complete
    assert found[1].bad_records == 3  # once a pass
    lines = list(read_json_lines(tmp_path / "run" / "quarantine" / f"{STAGE}.rank0.jsonl"))
    assert len(lines) == 3
    for line in lines:  # data set, row, key, and why
        assert (line["dataset"], line["number"], line["row"]) == ("emoji", 5, 5)
        assert line["shard"] == "shard-00000.arrow"
        assert line["kind"] == "picture is truncated"
        assert "truncated or damaged" in line["reason"]


@pytest.mark.slow
def test_too_many_bad_records_stop_the_run_by_name(data, tmp_path) -> None:
    done = train(data, tmp_path / "run", "data.bad_record_limit=1")
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert "records could not be used 2 times" in message
    assert "data.bad_record_limit=1" in message


@pytest.mark.slow
def test_changed_data_is_noticed_at_a_resume(data, tmp_path) -> None:
    run_dir, own = tmp_path / "run", tmp_path / "own"
    shutil.copytree(data, own)
    assert train(own, run_dir).returncode == 0
    end = newest(run_dir, stage=STAGE)
    assert end is not None
    for path in end[0].rglob("*"):  # the run as it stood before its last checkpoint
        path.unlink() if path.is_file() else None
    reader = ShardReader(data)
    shutil.rmtree(own)
    write_shards((reader.record(i) for i in range(63)), own, info={})
    done = train(own, run_dir)
    assert done.returncode == 2
    assert "data, seed, batch size or sources have changed" in done.stderr


@pytest.mark.slow
def test_trainer_by_hand_keeps_out_of_a_launchers_folder(data, tmp_path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "epoch").write_text("local-1-abcd")
    done = train(data, run_dir)
    assert done.returncode == 2
    assert "belongs to a launcher" in done.stderr
    assert not (run_dir / "checkpoints").exists()
