"""Starts the ranks of a distributed test as child processes and reads what rank 0 wrote."""

import json
import os
import socket
from pathlib import Path

import torch
from warm import Rank

WORKER = Path(__file__).with_name("worker.py")


def launch(
    jobs: list[dict[str, object]],
    *,
    world_size: int,
    folder: Path,
    worker: Path = WORKER,
    compare_collectives: bool = False,
) -> dict[str, dict]:
    """Run the jobs on `world_size` processes; returns rank 0's results by job name.

    `compare_collectives`: torch has the ranks agree before each collective on what it is, so that
    those that do not match are named. Elsewhere they end in a time-out, or in other numbers: a job
    of a few steps on four ranks takes 6 s with it and 0.2 s without (two cores).
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs_file, out = folder / "jobs.json", folder / "out.pt"
    jobs_file.write_text(json.dumps(jobs))
    port = free_port()
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TORCH_DISTRIBUTED_DEBUG": "DETAIL" if compare_collectives else "OFF",
        }
        arguments, log = [str(jobs_file), str(out)], folder / f"rank{rank}.log"
        ranks.append(Rank(worker, arguments, environment=environment, log=log))
    try:
        codes = [process.wait(timeout=600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        logs = "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob("rank*.log")))
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return torch.load(out, weights_only=True)


def free_port() -> int:
    """Return a port nobody listens on right now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
