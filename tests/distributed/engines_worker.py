"""A child process of test_engines.py: the same stages under both engines and in plain torch."""

import sys
from pathlib import Path

from rank_jobs import do_jobs
from worker import Job, plain

from cocoa_dist import distributed
from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train import shards
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.session import build_engine


def main(jobs_file: str, out: str) -> None:
    folder = Path(out).parent
    do_jobs(jobs_file, out, lambda fields, world: run(Job(**fields), world, folder))


def run(job: Job, world: distributed.World, folder: Path) -> dict[str, object]:
    config = load_recipe(job.recipe, [f"stages.{job.stage}.init_from=model", *job.overrides])
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
