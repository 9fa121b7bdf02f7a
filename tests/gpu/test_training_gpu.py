"""Training on a GPU: the losses of the CPU, a resume bit for bit, saves beside training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("megatron.energon")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 6
STAGES = ("joint_reconstruction", "contrastive")
ENGINES = ("deepspeed", "fsdp2")


def train(run_dir: Path, stage: str, *overrides: str, device: str = "cuda") -> list[float]:
    """Train a stage of `debug` in a process of its own; returns the losses."""
    command = [sys.executable, "-m", "cocoa_dist.train", "debug", "--stage", stage]
    given = [f"stages.{stage}.steps={STEPS}", f"stages.{stage}.init_from=model", *overrides]
    done = subprocess.run(
        [*command, *given, "--run-dir", str(run_dir)],
        env={**os.environ, "DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_computes_the_losses_of_the_cpu(stage: str, engine: str, tmp_path: Path) -> None:
    kind = f"engine.kind={engine}"
    expected = train(tmp_path / "cpu", stage, kind, device="cpu")
    found = train(tmp_path / "gpu", stage, kind)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-3)  # float32, sums in another order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resume_on_a_gpu_is_bit_identical(dtype: str, tmp_path: Path) -> None:
    stage, settings = "contrastive", (f"model.dtype={dtype}", "checkpoint.every_steps=2")
    whole = train(tmp_path / "whole", stage, *settings)
    half = tmp_path / "half"
    train(half, stage, *settings)
    newest = sorted((half / "checkpoints" / stage).glob("step_*"))[-1]
    (newest / "manifest.json").unlink()  # as if it had been killed in its last save
    assert train(half, stage, *settings) == whole
