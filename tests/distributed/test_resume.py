"""Kill a run at any moment, start it again with the same command: the run that would have been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cocoa_dist.manifest import newest, step_folders
from cocoa_dist.metrics import read_json_lines

STAGES = ("joint_reconstruction", "eos_bridged_reconstruction", "contrastive")
LIMIT = 300  # seconds a run of `debug` may take on a busy machine


def command(run_dir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "launcher", "run", "debug", "data.log_sample_ids=true"),
        *("--run-dir", str(run_dir), "--nproc", "2"),
    ]


def start(run_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(run_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run_dir: Path, *more: str) -> str:
    done = subprocess.run(
        [*command(run_dir), *more],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def history(run_dir: Path) -> list[tuple[object, ...]]:
    """What must not change: order of steps, records, losses to the last bit."""
    return [
        (r["stage"], r["step"], r["batch_digest"], r["loss"], r["grad_norm"])
        for r in read_json_lines(run_dir / "metrics.jsonl")
    ]


def records(run_dir: Path, stage: str) -> list[list[int]]:
    return [r["records"] for r in read_json_lines(run_dir / "samples" / f"{stage}.jsonl")]


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The trainer processes a launcher has started (it has helpers of its own, too)."""
    task = Path(f"/proc/{launcher.pid}/task/{launcher.pid}")
    found = []
    for child in (task / "children").read_text().split():
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"cocoa_dist.train" in words:
            found.append(int(child))
    return found


def wait_for_step(run_dir: Path, *, stage: str, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        seen = [(r["stage"], r["step"]) for r in read_json_lines(run_dir / "metrics.jsonl")]
        if (stage, step) in seen:
            return
        time.sleep(0.05)
    raise AssertionError(f"{stage} never reached step {step}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run_dir)
    return run_dir


def finish_stage(run_dir: Path) -> tuple[str, ...]:
    """Go on to the end of the stage that a run is in; return the stages up to there.

    Equal weights at that end make equal stages after it.
    """
    stage = str(history(run_dir)[-1][0])
    finish(run_dir, "--until", stage)
    return STAGES[: STAGES.index(stage) + 1]


def assert_same_run(run_dir: Path, reference: Path, *, stages: tuple[str, ...] = STAGES) -> None:
    assert history(run_dir) == [line for line in history(reference) if line[0] in stages]
    for stage in stages:
        assert records(run_dir, stage) == records(reference, stage)
        left, right = newest(run_dir, stage=stage), newest(reference, stage=stage)
        weights = [folder / "weights.safetensors" for folder, _ in (left, right)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    left_over = [p.name for p in (run_dir / "checkpoints").rglob(".staging-*")]
    assert left_over == []


@pytest.mark.slow
def test_undisturbed_run_uses_every_record_equally_often(undisturbed) -> None:
    assert [(stage, step) for stage, step, *_ in history(undisturbed)] == [
        (stage, step) for stage in STAGES for step in range(1, 9)
    ]
    for stage in STAGES:
        steps = records(undisturbed, stage)
        used = [record for step in steps for record in step]
        assert len(used) == 8 * 24 == 3 * 64
        assert all(used.count(record) == 3 for record in range(64))


@pytest.mark.slow
def test_kill_9_of_one_rank_in_each_stage(undisturbed, tmp_path) -> None:
    run_dir, draw = tmp_path / "run", random.Random(1)
    launcher = start(run_dir)
    for stage in STAGES:
        wait_for_step(run_dir, stage=stage, step=draw.randint(1, 6))
        ranks = ranks_of(launcher)
        if ranks:  # none for a moment between two stages
            os.kill(draw.choice(ranks), signal.SIGKILL)
    out, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, out
    assert_same_run(run_dir, undisturbed)
    status = json.loads(
        subprocess.run(
            [sys.executable, "-m", "launcher", "status", str(run_dir), "--json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert status["state"] == "done"
    assert sum(status["restarts"].values()) >= 1


@pytest.mark.slow
def test_kill_9_of_launcher_and_ranks_in_each_stage(undisturbed, tmp_path) -> None:
    run_dir, draw = tmp_path / "run", random.Random(2)
    for stage in STAGES:
        launcher = start(run_dir)
        wait_for_step(run_dir, stage=stage, step=draw.randint(1, 6))
        time.sleep(draw.random() * 0.3)
        family = [launcher.pid, *ranks_of(launcher)]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        launcher.communicate(timeout=30)
    finish(run_dir)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_sigterm_saves_leaves_and_goes_on_as_if_nothing_had_been(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    launcher = start(run_dir)
    wait_for_step(run_dir, stage="joint_reconstruction", step=3)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 128 + signal.SIGTERM, out
    saved = newest(run_dir, stage="joint_reconstruction")
    assert saved is not None
    assert saved[1].step == history(run_dir)[-1][1]  # not one step was lost
    assert_same_run(run_dir, undisturbed, stages=finish_stage(run_dir))


@pytest.mark.slow
def test_stop_ends_the_run_until_the_file_is_taken_away(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    launcher = start(run_dir)
    wait_for_step(run_dir, stage="joint_reconstruction", step=3)
    stop = [sys.executable, "-m", "launcher", "stop", str(run_dir)]
    subprocess.run(stop, check=True, capture_output=True)
    out, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, out
    steps = len(history(run_dir))
    assert steps < 24
    assert "STOP" in finish(run_dir)
    assert len(history(run_dir)) == steps
    (run_dir / "STOP").unlink()
    assert_same_run(run_dir, undisturbed, stages=finish_stage(run_dir))


def cut_to_middle(reference: Path, run_dir: Path) -> list[Path]:
    """Copy a run as it stood in the middle of its last stage; return its checkpoints."""
    shutil.copytree(reference, run_dir)
    end, *earlier = step_folders(run_dir, stage="contrastive")
    shutil.rmtree(end)
    assert len(earlier) == 2
    return earlier


@pytest.mark.slow
def test_damaged_end_of_a_stage_is_kept_and_made_again(undisturbed, tmp_path) -> None:
    """The next stage cannot begin on it; nobody has to be called for that."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "contrastive")
    end = step_folders(run_dir, stage="eos_bridged_reconstruction")[0]
    weights = end / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    out = finish(run_dir) + logs(run_dir)
    assert f"kept as damaged-{end.name}, and the launcher goes back to that stage" in out
    kept = end.with_name(f"damaged-{end.name}") / "weights.safetensors"
    assert kept.read_bytes() == bytes(content)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_checkpoint_without_manifest_is_passed_over_by_name(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    broken, _ = cut_to_middle(undisturbed, run_dir)
    (broken / "manifest.json").unlink()
    out = finish(run_dir) + logs(run_dir)
    assert f"checkpoint {broken.name} of contrastive is not used" in out
    assert "has no manifest.json" in out
    assert_same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_checkpoint_with_a_flipped_byte_is_passed_over_by_name(undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    broken, _ = cut_to_middle(undisturbed, run_dir)
    shard = max((broken / "shards").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    out = finish(run_dir) + logs(run_dir)
    assert f"checkpoint {broken.name} of contrastive is not used: shards/{shard.name}" in out
    assert_same_run(run_dir, undisturbed)


def logs(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "logs").rglob("*.log")))


@pytest.mark.slow
def test_finished_run_says_so_and_changes_nothing(undisturbed) -> None:
    before = history(undisturbed)
    assert "is finished" in finish(undisturbed)
    assert history(undisturbed) == before


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_ends_with_exit_2_and_the_last_checkpoint_untouched(
    undisturbed, tmp_path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    run_dir = disk / "run"
    try:
        launcher = start(run_dir)
        wait_for_step(run_dir, stage="joint_reconstruction", step=2)
        filler = disk / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(b"0" * 2**16)
                    file.flush()
            except OSError:
                pass
        out, _ = launcher.communicate(timeout=LIMIT)
        assert launcher.returncode == 2, out
        assert "No space left on device" in out
        filler.unlink()
        assert_same_run(run_dir, undisturbed, stages=finish_stage(run_dir))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
