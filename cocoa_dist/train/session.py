"""One rank's life in one stage: join, build, resume, train, leave in agreement."""

import gc
import hashlib
import importlib
import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from cocoa_dist import distributed
from cocoa_dist.config import RunConfig, dump_yaml, fingerprint
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.manifest import DamagedEndError, Manifest, set_aside
from cocoa_dist.monitor import Monitor
from cocoa_dist.objectives.contrastive import Contrastive
from cocoa_dist.runtime import (
    Fence,
    StopRequest,
    allow_many_files,
    seed_everything,
    seed_rank,
    write_outcome,
)
from cocoa_dist.train.build import StageParts, base_model_digest, build_parts, library_versions
from cocoa_dist.train.checkpoint import Checkpointer, Found
from cocoa_dist.train.ds_config import read_ds_config
from cocoa_dist.train.engine import TrainEngine, import_deepspeed
from cocoa_dist.train.guide import guide_digest, load_guide
from cocoa_dist.train.held_out import HeldOut
from cocoa_dist.train.loop import Progress, StageEnd, StageRun
from cocoa_dist.train.resources import StepFlops
from cocoa_dist.train.resume import (
    hash_files_together,
    parent_sha256,
    refuse_other_base,
    refuse_other_recipe,
    resume,
)

log = logging.getLogger("cocoa_dist.train")


def run_stage(config: RunConfig, stage_name: str, *, run_dir: Path, stop: StopRequest) -> StageEnd:
    """Train a stage from its newest whole checkpoint, or from its beginning.

    Collective: call on all ranks. Raises ValueError for what a user or a file got wrong.
    """
    refuse_a_held_folder(run_dir)
    quiet_known_warnings()
    torch.set_num_threads(config.runtime.threads)
    world = distributed.start(timeout_seconds=config.engine.timeout_seconds)
    monitor = Monitor.start(
        config,
        stage_name,
        run_dir=run_dir,
        rank=world.rank,
        world_size=world.size,
        epoch=Fence(run_dir).epoch,
    )
    allow_many_files()
    seed_everything(config.seed)
    checkpointer = _checkpointer(config, stage_name, run_dir=run_dir)
    with monitor.phase("restore"):
        found = checkpointer.find()
    refuse_other_recipe(found, config)
    parts = _build(config, stage_name, run_dir=run_dir, found=found)
    loader = _loader(config, stage_name, parts, found.manifest, run_dir=run_dir, world=world)
    agree_on_plan(loader)
    template = _template(config, stage_name, parts, run_dir=run_dir, world_size=world.size)
    refuse_other_base(found, template)
    flops = StepFlops.of_model(
        parts.model,
        text_logits=parts.objective.heads.text_logits,
        patches_a_token=parts.geometry.merge**2,
    )
    engine = build_engine(config, stage_name, parts, run_dir=run_dir)
    held_out = None
    if config.evaluation.every_steps:
        held_out = HeldOut(config, vocabulary=parts.vocabulary, geometry=parts.geometry)
    seed_rank(config.seed, stage=stage_name, step=0, rank=world.rank)
    with monitor.phase("restore"):
        resume(checkpointer, engine, found, config=config, stage_name=stage_name, run_dir=run_dir)
    monitor.resumed(found.manifest)
    run = StageRun(
        config,
        stage_name,
        run_dir=run_dir,
        engine=engine,
        loader=loader,
        checkpointer=checkpointer,
        template=template,
        progress=Progress.after(found.manifest),
        stop=stop,
        monitor=monitor,
        held_out=held_out,
        flops=flops,
    )
    gc.freeze()  # what exists now stays; later collections look at the step's garbage alone
    end = run.train()
    loader.close()
    if world.rank == 0:
        write_outcome(
            run_dir,
            stage=stage_name,
            step=run.progress.step,
            verdict=end.value,
            reason="; ".join([f"{run.progress.step} of {run.stage.steps} steps", *found.notes]),
        )
    distributed.barrier()
    monitor.stop()
    distributed.stop()
    return end


def _checkpointer(config: RunConfig, stage_name: str, *, run_dir: Path) -> Checkpointer:
    return Checkpointer(
        run_dir,
        stage=stage_name,
        keep_last=config.checkpoint.keep_last,
        adapter=config.stages[stage_name].adapter,
        max_failed_saves=config.checkpoint.max_failed_saves,
        recipe=dump_yaml(config),
        keep_best=config.evaluation.keep_best,
    )


def _loader(
    config: RunConfig,
    stage_name: str,
    parts: StageParts,
    manifest: Manifest | None,
    *,
    run_dir: Path,
    world: distributed.World,
) -> StageLoader:
    """Open this rank's data at the step behind a checkpoint, or at the first."""
    return StageLoader(
        config,
        stage_name,
        vocabulary=parts.vocabulary,
        geometry=parts.geometry,
        rank=world.rank,
        world_size=world.size,
        start_step=manifest.step + 1 if manifest else 1,
        folder=run_dir / "data",
        num_nodes=distributed.num_nodes(),
        state=manifest.data_state if manifest else None,
    )


def _build(config: RunConfig, stage_name: str, *, run_dir: Path, found: Found) -> StageParts:
    """Build a stage's parts; rank 0 alone has the weights, and only if they are needed. Collective.

    The engine gives them to all ranks, one parameter at a time: no two hold the whole model.
    """
    stage = config.stages[stage_name]
    frozen = stage.adapter is not None or stage.freeze_vision
    needed = found.manifest is None or frozen  # else the checkpoint has all of them
    weights = needed and distributed.rank() == 0
    parts = distributed.raise_together(
        lambda: _build_here(config, stage_name, run_dir=run_dir, weights=weights)
    )
    named = parts.model.named_parameters()
    described = [(name, p.shape, str(p.dtype), p.requires_grad) for name, p in named]
    settings = parts.model.backbone.config.to_json_string()
    digest = hashlib.sha256(f"{described}{settings}".encode())
    different = _unlike_rank_zero(digest.hexdigest())
    if different:
        raise ValueError(
            f"ranks {different} built another model than rank 0: is the model folder, and every "
            "library, the same on all nodes?"
        )
    return parts


def _build_here(config: RunConfig, stage_name: str, *, run_dir: Path, weights: bool) -> StageParts:
    """Build on this rank; a damaged parent is set aside where a launcher can train it again."""
    try:
        return build_parts(config, stage_name, run_dir=run_dir, weights=weights)
    except DamagedEndError as error:
        fence = Fence(run_dir)
        if not fence.epoch:
            raise
        fence.check()
        away = set_aside(error.folder)
        raise DamagedParentError(
            f"{error.what}; it is kept as {away.name}, and the launcher goes back to that stage"
        ) from error


class DamagedParentError(RuntimeError):
    """A stage could not begin; the one before it has to be finished again, by the launcher."""


def _unlike_rank_zero(digest: str) -> list[int]:
    """Return the ranks whose digest differs from rank 0's. Collective."""
    digests = distributed.gather_objects(digest)
    return [rank for rank, other in enumerate(digests) if other != digests[0]]


def refuse_a_held_folder(run_dir: Path) -> None:
    """Raise ValueError for a trainer started by hand in a folder that a launcher looks after."""
    fence = Fence(run_dir)
    if fence.path.exists() and not fence.epoch:
        raise ValueError(
            f"{run_dir} belongs to a launcher (it has a file '{fence.path.name}'); train in it "
            "with `python -m launcher run`, or give another --run-dir"
        )


def import_engine(config: RunConfig) -> None:
    """Import the library behind a run's engine, which nothing else needs."""
    if config.engine.kind == "fsdp2":
        importlib.import_module("cocoa_dist.train.fsdp2")  # takes time that others save
    else:
        import_deepspeed()


def build_engine(
    config: RunConfig, stage_name: str, parts: StageParts, *, run_dir: Path | None = None
) -> TrainEngine:
    """Wrap a stage's model, and load its guide if it has one. Collective: call on all ranks."""
    stage = config.stages[stage_name]
    if isinstance(parts.objective, Contrastive):  # first: what it takes is not free for weights
        parts.objective.guide = load_guide(config, stage_name, parts, run_dir=run_dir)
    kind = TrainEngine
    if config.engine.kind == "fsdp2":
        from cocoa_dist.train.fsdp2 import Fsdp2Engine

        kind = Fsdp2Engine
    return kind(
        parts.model,
        parts.objective,
        optimizer=stage.optimizer,
        total_steps=stage.steps,
        ds_config=read_ds_config(config.engine.ds_config),
        dtype=config.model.dtype,
        settings=config.engine,
        grad_cache=getattr(stage.objective, "grad_cache", None),
        measure_every=config.metrics.measure_every_steps,
    )


def quiet_known_warnings() -> None:
    """Silence warnings of libraries about themselves, each for a reason."""
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed: one warning per call.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated")
    # peft 0.21 asks transformers 5.23 by a name that is being renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # energon asks for it without a GPU


def agree_on_plan(loader: StageLoader) -> None:
    """Compare the ranks' plans: each reads the data itself. Collective.

    Raises ValueError naming the ranks; different plans would end in unequal packs and a hang.
    """
    digest = hashlib.sha256(loader.fingerprint.encode())
    for source in loader.plan.sources:
        for bounds in (source.tokens, source.patches):  # of a large source mapped: not copied
            digest.update(np.ascontiguousarray(bounds).data)
    different = _unlike_rank_zero(digest.hexdigest())
    if different:
        raise ValueError(
            f"ranks {different} read other data than rank 0: is the data folder the same, and "
            "whole, on every node?"
        )


def _template(
    config: RunConfig, stage_name: str, parts: StageParts, *, run_dir: Path, world_size: int
) -> Manifest:
    """Return a manifest with the fields that stay the same over an incarnation. Collective."""
    return Manifest(
        run=config.name,
        recipe_fingerprint=fingerprint(config),
        stage=stage_name,
        step=0,
        target_step=config.stages[stage_name].steps,
        complete=False,
        epoch=Fence(run_dir).epoch,
        parent=parts.parent,
        parent_sha256=parent_sha256(run_dir, parts.parent),
        world_size=world_size,
        engine="deepspeed_zero3" if config.engine.kind == "deepspeed" else config.engine.kind,
        versions=library_versions(),
        base_model=base_model_digest(config, hash_files=hash_files_together)
        + guide_digest(config.stages[stage_name], hash_files=hash_files_together),
        data_state={},
        samples=0,
        tokens=0,
        skipped_steps=0,
        wall_seconds=0.0,
        productive_seconds=0.0,
        train_cpu_seconds=0.0,
        loss={},
        files=(),
    )
