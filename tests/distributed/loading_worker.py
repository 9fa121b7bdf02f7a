"""A child process of the loading tests: builds a model and reports the memory it took."""

import hashlib
import json
import sys
from pathlib import Path

import torch

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.train.build import first_steps
from cocoa_dist.train.checkpoint import Found
from cocoa_dist.train.engine import import_deepspeed
from cocoa_dist.train.session import _build, build_engine, quiet_known_warnings


def main(jobs_file: str, out: str) -> None:
    torch.set_num_threads(1)
    quiet_known_warnings()
    world = distributed.start(timeout_seconds=60)
    (job,) = json.loads(Path(jobs_file).read_text())
    seen = run(job, world)
    gathered = distributed.gather_objects({k: v for k, v in seen.items() if k != "weights"})
    if world.rank == 0:
        torch.save({"ranks": gathered, "weights": seen.get("weights")}, out)
    distributed.stop()


def run(job: dict, world: distributed.World) -> dict[str, object]:
    config = load_recipe("debug", job["overrides"])
    before = resident("VmRSS")
    found = Found(None, None, ())
    try:
        parts = _build(config, job["stage"], run_dir=Path(job["run_dir"]), found=found)
    except ValueError as error:
        return {"error": str(error)}
    built = resident("VmRSS")
    batches = first_steps(config, job["stage"], parts, rank=world.rank, world_size=world.size)
    seen = watch_partitioning()
    engine = build_engine(config, job["stage"], parts)
    weights = engine.gathered_weights()
    loss = engine.train_step(batches[0].packs, step=1).loss
    return {
        "built": built - before,
        "given": seen.get("end", 0) - seen.get("begin", 0),
        "loss": loss,
        "buffers": digest(engine.module),
        "weights": weights,
    }


def watch_partitioning() -> dict[str, int]:
    """Note the memory before ZeRO-3 gives out the weights, and the most it took until it had."""
    import_deepspeed()
    from deepspeed.runtime.zero import partition_parameters, stage3

    seen: dict[str, int] = {}
    optimizer, give = (
        stage3.DeepSpeedZeroOptimizer_Stage3,
        partition_parameters.Init._zero_init_param,
    )
    flatten = optimizer._create_fp16_partitions_with_defragmentation

    def giving(*args: object) -> None:
        seen.setdefault("begin", resident("VmRSS"))
        give(*args)

    def flattening(*args: object) -> None:
        seen["end"] = resident("VmHWM")
        flatten(*args)

    partition_parameters.Init._zero_init_param = giving
    optimizer._create_fp16_partitions_with_defragmentation = flattening
    return seen


def resident(field: str) -> int:
    """Memory of this process in bytes: VmRSS now, VmHWM at its most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def digest(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, buffer in module.named_buffers():
        found.update(name.encode() + buffer.numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
