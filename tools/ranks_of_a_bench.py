"""Runs a bench's own script as ranks of a group, `SCRIPT --worker JOB` in fresh processes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(
    job: Mapping[str, Any], *, ranks: int, script: str, checkout: Path = ROOT
) -> list[dict[str, Any]]:
    """Do a job in so many processes of a checkout; returns the JSON that each wrote to `output`.

    `job` is handed over as JSON with `output` added. Raises SystemExit with the ends of the logs
    if a process fails.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    is_cuda = job.get("device") == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        children = []
        for rank, output in enumerate(outputs):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "8" if is_cuda else "1",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(checkout),
                "BENCH_CHECKOUT": str(checkout),
                **({} if is_cuda else {"DS_ACCELERATOR": "cpu"}),
            }
            text = json.dumps({**job, "output": str(output)})
            command = [sys.executable, script, "--worker", text]
            with (Path(folder) / f"{rank}.log").open("w") as log:
                children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = _wait(children)
        if any(codes):
            logs = "\n".join((Path(folder) / f"{r}.log").read_text()[-2000:] for r in range(ranks))
            raise SystemExit(f"{dict(job)} ended with {codes}:\n{logs}")
        return [json.loads(output.read_text()) for output in outputs]


def _wait(children: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes; once one fails, the others, who would wait for it, are killed."""
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            time.sleep(0.2)
    finally:
        for child in children:
            child.kill()
    return [child.wait() for child in children]
