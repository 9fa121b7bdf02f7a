"""A child process of test_contrastive_gradients.py: one contrastive step under many options."""

import sys

import torch
from rank_jobs import do_jobs

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.objectives.candidates import TARGET
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.session import build_engine

STAGE = "contrastive"


def run(job: dict, world: distributed.World) -> dict[str, object]:
    from deepspeed.utils import safe_get_full_grad

    config = load_recipe("debug", [f"stages.{STAGE}.init_from=model", *job["overrides"]])
    seed_everything(config.seed)
    parts = build_parts(config, STAGE, run_dir=None)
    batches = first_steps(
        config, STAGE, parts, count=job["steps"], rank=world.rank, world_size=world.size
    )
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
    do_jobs(*sys.argv[1:], run)
