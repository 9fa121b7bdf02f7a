"""A child process of test_grad_cache.py: a contrastive step in several modes, and its cost."""

import sys

import torch
from rank_jobs import do_jobs

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train import grad_cache
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.session import build_engine
from cocoa_dist.train.traffic import counted_traffic

STAGE = "contrastive"


def run(job: dict, world: distributed.World) -> dict[str, object]:
    from deepspeed.utils import safe_get_full_grad

    config = load_recipe("debug", [f"stages.{STAGE}.init_from=model", *job["overrides"]])
    seed_everything(config.seed)
    parts = build_parts(config, STAGE, run_dir=None)
    waken(parts.model)
    batches = first_steps(config, STAGE, parts, count=2, rank=world.rank, world_size=world.size)
    engine = build_engine(config, STAGE, parts)
    torch.manual_seed(5)
    kept = grad_cache.GeneratorState.restore
    if not job.get("replay", True):
        grad_cache.GeneratorState.restore = lambda self: None
    terms = engine.accumulate(batches[0].packs)
    grad_cache.GeneratorState.restore = kept
    drawn_next = torch.rand(4)
    gradients = {
        name: safe_get_full_grad(parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    engine.discard_gradients()
    engine.train_step(batches[0].packs, step=1)
    with counted_traffic() as traffic:
        stats = engine.train_step(batches[1].packs, step=2)
    found = {
        "packs": len(batches[0].packs),
        "sum": terms["contrastive"].local_sum,
        "second_loss": stats.loss,
        "drawn_next": drawn_next,
        "gradients": {name: value for name, value in gradients.items() if value is not None},
        "bytes": dict(traffic.bytes),
        "calls": dict(traffic.calls),
    }
    engine.deepspeed.destroy()
    return found


def waken(model: torch.nn.Module) -> None:
    """Give adapters' second matrices values: at zero they would hide what dropout does."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


if __name__ == "__main__":
    do_jobs(*sys.argv[1:], run)
