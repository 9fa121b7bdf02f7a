"""A child process of test_group_health.py: a few steps, measured or not, weights after each."""

import sys

from engines_worker import of_kind, prepare
from rank_jobs import do_jobs
from worker import Job

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.train.session import build_engine


def run(fields: dict, world: distributed.World) -> dict[str, object]:
    job = Job(**fields)
    config = load_recipe(job.recipe, [f"stages.{job.stage}.init_from=model", *job.overrides])
    parts, batches = prepare(config, job, world)
    trained = [name for name, p in parts.model.named_parameters() if p.requires_grad]
    engine = build_engine(of_kind(config, job.engine), job.stage, parts)
    weights, stats = [engine.gathered_weights()], []
    for step, batch in enumerate(batches, start=1):
        stats.append(engine.train_step(batch.packs, step=step, extras=(1.0, 2.0)))
        weights.append(engine.gathered_weights())
    return {
        "losses": [s.loss for s in stats],
        "norms": [s.grad_norm for s in stats],
        "extras": [list(s.extras) for s in stats],
        "health": [dict(s.health) for s in stats],
        "weights": [{n: w[n] for n in trained} for w in weights if w is not None],
    }


if __name__ == "__main__":
    do_jobs(*sys.argv[1:], run)
