"""Looking at a stage before it runs: a dry run, and one batch driven to near zero.

One process, no run folder, nothing written.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from cocoa_dist import distributed
from cocoa_dist.batch import StepBatch
from cocoa_dist.config import FROM_MODEL, RunConfig
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train.build import StageParts, build_parts, first_steps
from cocoa_dist.train.session import build_engine, quiet_known_warnings
from cocoa_dist.train.visibility import picture_leak

log = logging.getLogger("cocoa_dist.train")

_STATE_BYTES = {"float32": 16, "bfloat16": 16}  # weight, gradient and AdamW state, a parameter
_OVERFIT_RATE = 2.0e-3
_OVERFIT_LOSS = 0.05  # near zero, of every term


@dataclass(frozen=True)
class _First:
    parts: StageParts
    batch: StepBatch


def dry_run(config: RunConfig, stage_name: str, *, run_dir: Path | None) -> int:
    """Build every part of a stage and its first batch, print the budgets; 0 if all is well."""
    first = _first_batch(config, stage_name, run_dir=run_dir)
    parameters = list(first.parts.model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    stage, batch = config.stages[stage_name], first.batch
    state_gib = trained * _STATE_BYTES[config.model.dtype] / 2**30
    log.info("recipe %s, stage %s: every part is there", config.name, stage_name)
    log.info("parameters: %.2f M, of them trained %.2f M", total / 1e6, trained / 1e6)
    log.info("model, gradient and optimizer state: %.3f GiB over all ranks", state_gib)
    log.info(
        "step 1: %d records of '%s' in %d pack(s), %d tokens, %d patches, fill %.0f %%",
        stage.batch_size,
        batch.dataset,
        len(batch.packs),
        batch.num_tokens,
        sum(len(pack.pixel_values) for pack in batch.packs),
        100 * batch.fill_ratio,
    )
    log.info(
        "the stage: %d steps, %d samples, about %.1f M tokens",
        stage.steps,
        stage.steps * stage.batch_size,
        stage.steps * batch.num_tokens / 1e6,
    )
    return 0


def check_attention(config: RunConfig, stage_name: str, *, run_dir: Path | None) -> int:
    """Look whether targets of the first pack see pictures past the bridge; 0 if none does."""
    first = _first_batch(config, stage_name, run_dir=run_dir)
    found = picture_leak(first.parts.model.eval(), first.batch.packs[0])
    if found is None:
        rule = config.stages[stage_name].attention.rule
        log.info("rule %s: every row of a sample with a picture may see it", rule)
        return 0
    log.info(
        "other pictures change %d rows of targets by up to %.3g through the bridge, and by %.3g "
        "where it is held",
        found.num_rows,
        found.through_the_bridge,
        found.past_the_bridge,
    )
    return int(found.past_the_bridge != 0.0)


def overfit_one_batch(
    config: RunConfig, stage_name: str, *, run_dir: Path | None, steps: int
) -> int:
    """Repeat the first batch; 0 if every term of the loss comes near zero, else 1.

    An objective that cannot do this is wired wrongly: labels, masks or gradients do not meet.
    """
    optimizer = config.stages[stage_name].optimizer.model_copy(
        update={"learning_rate": _OVERFIT_RATE, "schedule": "constant", "weight_decay": 0.0}
    )
    stage = config.stages[stage_name].model_copy(
        update={"optimizer": optimizer, "steps": max(steps, optimizer.warmup_steps)}
    )
    config = config.model_copy(update={"stages": {**config.stages, stage_name: stage}})
    quiet_known_warnings()
    distributed.start(timeout_seconds=config.engine.timeout_seconds)
    seed_everything(config.seed)
    first = _first_batch(config, stage_name, run_dir=run_dir)
    engine = build_engine(config, stage_name, first.parts, run_dir=run_dir)
    stats = engine.train_step(first.batch.packs, step=1)
    log.info("step 1: %s", _terms(stats.parts))
    for step in range(2, steps + 1):
        stats = engine.train_step(first.batch.packs, step=step)
        if step % max(steps // 10, 1) == 0:
            log.info("step %d: %s", step, _terms(stats.parts))
    distributed.stop()
    worst = max(stats.parts.values())
    if worst > _OVERFIT_LOSS:
        log.error("after %d steps a term stands at %.3f, above %.2f", steps, worst, _OVERFIT_LOSS)
        return 1
    log.info("one batch is learnt: every term is below %.2f", _OVERFIT_LOSS)
    return 0


def _terms(parts: object) -> str:
    assert isinstance(parts, dict)
    return ", ".join(f"{name} {value:.4f}" for name, value in parts.items())


def _first_batch(config: RunConfig, stage_name: str, *, run_dir: Path | None) -> _First:
    torch.set_num_threads(config.runtime.threads)
    stage = config.stages[stage_name]
    if run_dir is None and stage.init_from != FROM_MODEL:
        log.info("no --run-dir: the base model stands in for the end of stage %s", stage.init_from)
        stage = stage.model_copy(update={"init_from": FROM_MODEL})
        config = config.model_copy(update={"stages": {**config.stages, stage_name: stage}})
    parts = build_parts(config, stage_name, run_dir=run_dir)
    return _First(parts, first_steps(config, stage_name, parts)[0])
