"""What the ranks do that `launch` in `ranks.py` starts: all jobs, one after the other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cocoa_dist import distributed
from cocoa_dist.train.session import quiet_known_warnings


def do_jobs(
    jobs_file: str, out: str, run: Callable[[dict[str, Any], distributed.World], object]
) -> None:
    """Do the jobs of the file; rank 0 saves what `run` returned, by job name."""
    torch.set_num_threads(1)
    quiet_known_warnings()
    world = distributed.start(timeout_seconds=60)
    results = {}
    for job in json.loads(Path(jobs_file).read_text()):
        results[job["name"]] = run(job, world)
    if world.rank == 0:
        torch.save(results, out)
    distributed.stop()
