"""A rank that exports metrics and then waits in a collective that never ends.

waiting_rank.py FOLDER: rank 0 waits for rank 1 in an all-reduce; rank 1 never comes.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.monitor import Monitor


def main(folder: Path) -> None:
    world = distributed.start(timeout_seconds=300)
    monitor = Monitor.start(
        load_recipe("debug"),
        "contrastive",
        run_dir=folder,
        rank=world.rank,
        world_size=world.size,
        epoch=os.environ.get("COCOA_EPOCH", ""),
    )
    with monitor.phase("train"):
        monitor.step(1, seconds=0.1, waited=0.0)
        dist.barrier()
        if world.rank == 1:
            time.sleep(600)
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
