"""A real run whose monitoring cannot do its work: it goes on, and says so once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STAGE = "joint_reconstruction"


@pytest.mark.slow
def test_a_port_in_use_and_no_place_for_targets_cost_one_warning_each_and_no_step(
    tmp_path: Path,
) -> None:
    """Rank 0's port is taken; rank 1 and the launcher find a file where targets should go."""
    run_dir, targets = tmp_path / "run", tmp_path / "targets"
    targets.write_text("not a folder")
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "launcher", "run", "debug", "--until", STAGE),
                *("--run-dir", str(run_dir), f"metrics.targets={targets}", f"metrics.port={port}"),
                f"stages.{STAGE}.steps=4",
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 4
    logs = {path.stem: path.read_text() for path in (run_dir / "logs").rglob("*.log")}
    assert len(logs) == 2, sorted(logs)
    said = [text.count("; the run goes on") for text in logs.values()]
    assert said == [1, 1], logs
    assert sum(f"cannot listen on 127.0.0.1:{port}" in text for text in logs.values()) == 1
    assert sum("Prometheus will not find" in text for text in logs.values()) == 1
    assert (done.stdout + done.stderr).count("Prometheus will not find") == 1
