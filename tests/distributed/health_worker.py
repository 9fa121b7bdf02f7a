"""A child process of test_group_health.py: a few steps, measured or not, weights after each."""

import json
import sys
from pathlib import Path

import torch
from engines_worker import of_kind, prepare
from worker import Job

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.train.session import build_engine, quiet_known_warnings


def main(jobs_file: str, out: str) -> None:
    torch.set_num_threads(1)
    quiet_known_warnings()
    world = distributed.start(timeout_seconds=60)
    results = {}
    for fields in json.loads(Path(jobs_file).read_text()):
        job = Job(**fields)
        config = load_recipe(job.recipe, [f"stages.{job.stage}.init_from=model", *job.overrides])
        parts, batches = prepare(config, job, world)
        trained = [name for name, p in parts.model.named_parameters() if p.requires_grad]
        engine = build_engine(of_kind(config, job.engine), job.stage, parts)
        weights, stats = [engine.gathered_weights()], []
        for step, batch in enumerate(batches, start=1):
            stats.append(engine.train_step(batch.packs, step=step, extras=(1.0, 2.0)))
            weights.append(engine.gathered_weights())
        results[job.name] = {
            "losses": [s.loss for s in stats],
            "norms": [s.grad_norm for s in stats],
            "extras": [list(s.extras) for s in stats],
            "health": [dict(s.health) for s in stats],
            "weights": [{n: w[n] for n in trained} for w in weights if w is not None],
        }
    if world.rank == 0:
        torch.save(results, out)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
