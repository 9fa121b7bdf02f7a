"""A child process of test_engines.py: the same stages under both engines and in plain torch."""

import json
import sys
from pathlib import Path

import torch
from worker import Job, plain

from cocoa_dist import distributed
from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train import shards
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.session import build_engine, quiet_known_warnings


def main(jobs_file: str, out: str) -> None:
    torch.set_num_threads(1)
    quiet_known_warnings()
    world = distributed.start(timeout_seconds=60)
    results = {}
    for fields in json.loads(Path(jobs_file).read_text()):
        job = Job(**fields)
        config = load_recipe(job.recipe, [f"stages.{job.stage}.init_from=model", *job.overrides])
        folder = Path(out).parent
        results[job.name] = run(config, job, world, folder)
    if world.rank == 0:
        torch.save(results, out)
    distributed.stop()


def run(config: RunConfig, job: Job, world: distributed.World, folder: Path) -> dict[str, object]:
    parts, batches = prepare(config, job, world)
    if job.engine == "plain":
        found = plain(config, job, parts, batches)
        return {"losses": found["losses"], "norms": found["norms"], "weights": found["weights"]}
    first, _, second = job.engine.partition(" then ")
    engine = build_engine(of_kind(config, first), job.stage, parts)
    half = job.steps // 2 if second else job.steps
    stats = [engine.train_step(b.packs, step=i + 1) for i, b in enumerate(batches[:half])]
    if second:
        save(engine, folder / job.name, world)
        parts, _ = prepare(config, job, world)
        engine = build_engine(of_kind(config, second), job.stage, parts)
        engine.load(folder / job.name, written_by=world.size)
        rest = enumerate(batches[half:], start=half + 1)
        stats += [engine.train_step(b.packs, step=i) for i, b in rest]
    return {
        "packs": len(batches[0].packs),
        "losses": [s.loss for s in stats],
        "norms": [s.grad_norm for s in stats],
        "weights": engine.gathered_weights(),
    }


def prepare(config: RunConfig, job: Job, world: distributed.World):
    seed_everything(config.seed)
    parts = build_parts(config, job.stage, run_dir=None)
    batches = first_steps(
        config, job.stage, parts, count=job.steps, rank=world.rank, world_size=world.size
    )
    return parts, batches


def of_kind(config: RunConfig, kind: str) -> RunConfig:
    engine = config.engine.model_copy(update={"kind": kind})
    return config.model_copy(update={"engine": engine})


def save(engine, folder: Path, world: distributed.World) -> None:
    taken = shards.HostCopy().take(engine.live_state())
    chunks = shards.safetensors_chunks(taken.tensors, taken.metadata)
    shards.write_file(folder, shards.shard_name(world.rank), chunks)
    distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
