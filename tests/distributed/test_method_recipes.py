"""MoCa and CoMa run from their first stage to their last, killed in the middle, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import LIMIT, history, ranks_of, wait_for_step

from cocoa_dist.manifest import newest

METHODS = {
    "debug_coma": ("compression", "contrastive"),
    "debug_moca": ("joint_reconstruction", "contrastive"),
}


def start(recipe: str, run_dir: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launcher", "run", recipe, "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*command, "--nproc", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(launcher: "subprocess.Popen[str]") -> None:
    out, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", METHODS)
def test_a_method_killed_in_each_stage_is_the_run_that_would_have_been(recipe, tmp_path) -> None:
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(3)
    finish(start(recipe, whole))
    launcher = start(recipe, killed)
    for stage in METHODS[recipe]:
        wait_for_step(killed, stage=stage, step=draw.randint(3, 6))
        ranks = ranks_of(launcher)
        if ranks:  # none for a moment between two stages
            os.kill(draw.choice(ranks), signal.SIGKILL)
    finish(launcher)
    assert [line[:2] for line in history(whole)] == [
        (stage, step) for stage in METHODS[recipe] for step in range(1, 9)
    ]
    assert history(killed) == history(whole)
    for stage in METHODS[recipe]:
        ends = [newest(run_dir, stage=stage) for run_dir in (whole, killed)]
        weights = [end[0] / "weights.safetensors" for end in ends if end]
        assert weights[0].read_bytes() == weights[1].read_bytes()
