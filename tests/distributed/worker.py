"""A child process of the distributed tests: trains stages of recipes and writes what it saw.

Started by `launch` in `ranks.py`, one process a rank, because gloo aborts a process whose ranks
disagree.
"""

import sys
from dataclasses import dataclass

import torch
from rank_jobs import do_jobs

from cocoa_dist import distributed
from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train.build import StageParts, build_parts, first_steps
from cocoa_dist.train.engine import TrainEngine, learning_rate_at
from cocoa_dist.train.session import build_engine


@dataclass
class Job:
    """One stage to train: engine `zero3` or `plain` (one process, no DeepSpeed)."""

    name: str
    recipe: str
    stage: str
    overrides: list[str]
    steps: int
    engine: str = "zero3"


def run(fields: dict, world: distributed.World) -> dict[str, object]:
    job = Job(**fields)
    config = load_recipe(job.recipe, [f"stages.{job.stage}.init_from=model", *job.overrides])
    seed_everything(config.seed)
    parts = build_parts(config, job.stage, run_dir=None)
    batches = first_steps(
        config, job.stage, parts, count=job.steps, rank=world.rank, world_size=world.size
    )
    train = zero3 if job.engine == "zero3" else plain
    return {
        "packs": len(batches[0].packs),
        "digests": [batch.digest for batch in batches],
        **train(config, job, parts, batches),
    }


def zero3(config: RunConfig, job: Job, parts: StageParts, batches) -> dict[str, object]:
    from deepspeed.utils import safe_get_full_grad

    engine: TrainEngine = build_engine(config, job.stage, parts)
    engine.accumulate(batches[0].packs)
    gradients = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters()}
    engine.deepspeed.optimizer.zero_grad()
    engine.deepspeed.destroy()
    config = config.model_copy()
    seed_everything(config.seed)
    parts = build_parts(config, job.stage, run_dir=None)
    engine = build_engine(config, job.stage, parts)
    stats = [engine.train_step(b.packs, step=i + 1) for i, b in enumerate(batches)]
    return {
        "gradients": gradients,
        "losses": [s.loss for s in stats],
        "norms": [s.grad_norm for s in stats],
        "weights": engine.gathered_weights(),
    }


def plain(config: RunConfig, job: Job, parts: StageParts, batches) -> dict[str, object]:
    """The same training in plain torch: the slow obvious version."""
    stage, objective, model = config.stages[job.stage], parts.objective, parts.model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": stage.optimizer.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        betas=stage.optimizer.betas,
        eps=stage.optimizer.eps,
    )
    losses, norms, first = [], [], {}
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, stage.optimizer, total_steps=stage.steps)
        counts = objective.counts(batch.packs)
        sums = objective.sums([model(pack) for pack in batch.packs], batch.packs)
        loss = sum(objective.weights[n] * sums[n] / max(counts[n], 1.0) for n in sums)
        optimizer.zero_grad()
        loss.backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {"gradients": first, "losses": losses, "norms": norms, "weights": weights}


if __name__ == "__main__":
    do_jobs(*sys.argv[1:], run)
