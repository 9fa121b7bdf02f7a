"""A child process of test_contrastive_gradients.py: one contrastive step under many options."""

import json
import sys
from pathlib import Path

import torch

from cocoa_dist import distributed
from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.objectives.candidates import TARGET
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.session import build_engine, quiet_known_warnings

STAGE = "contrastive"


def main(jobs_file: str, out: str) -> None:
    torch.set_num_threads(1)
    quiet_known_warnings()
    world = distributed.start(timeout_seconds=60)
    results = {}
    for job in json.loads(Path(jobs_file).read_text()):
        overrides = [f"stages.{STAGE}.init_from=model", *job["overrides"]]
        results[job["name"]] = run(load_recipe("debug", overrides), world, steps=job["steps"])
    if world.rank == 0:
        torch.save(results, out)
    distributed.stop()


def run(config: RunConfig, world: distributed.World, *, steps: int) -> dict[str, object]:
    from deepspeed.utils import safe_get_full_grad

    seed_everything(config.seed)
    parts = build_parts(config, STAGE, run_dir=None)
    batches = first_steps(config, STAGE, parts, count=steps, rank=world.rank, world_size=world.size)
    engine = build_engine(config, STAGE, parts)
    first = batches[0].packs
    terms = engine.accumulate(first)
    gradients = {
        name: safe_get_full_grad(parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    engine.discard_gradients()
    stats = [engine.train_step(b.packs, step=i + 1) for i, b in enumerate(batches)]
    weights = engine.gathered_weights() or {}
    here = [i for pack in first for i in pack.identities[pack.sides == TARGET].tolist()]
    sums = torch.tensor([term.local_sum for term in terms.values()], dtype=torch.float64)
    engine.deepspeed.destroy()
    return {
        "packs": len(first),
        "sums": distributed.sum_over_ranks(sums).tolist(),
        "counts": [term.count for term in terms.values()],
        "gradients": {name: value for name, value in gradients.items() if value is not None},
        "losses": [s.loss for s in stats],
        "health": [dict(s.health) for s in stats],
        "similarity": {n: v for n, v in weights.items() if n.startswith("similarity.")},
        "identities": distributed.gather_objects(here),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
