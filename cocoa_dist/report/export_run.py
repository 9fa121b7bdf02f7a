"""Exports the model of a run folder, finished or not, without a report.

The weights at a stage's end are read and written one layer at a time; what a checkpoint in the
middle of a stage holds is put together in memory, and the model card says how far it had come.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from cocoa_dist.config import FROM_MODEL, RunConfig, load_resolved
from cocoa_dist.data.vocabulary import bridge_tokens
from cocoa_dist.export import export_folder
from cocoa_dist.export.layers import LayerWeights, ModelWeights, layers_of, weights_on_demand
from cocoa_dist.export.stored import FileWeights, stored_tensors
from cocoa_dist.manifest import Manifest, find_fault, newest
from cocoa_dist.model.adapter import merge_adapter
from cocoa_dist.report.arms import (
    HeldOut,
    card_info,
    export_tokenizer,
    image_settings,
    is_two_way,
    read_held_out,
    self_test_vectors,
)
from cocoa_dist.report.facts import RESOLVED_NAME, RunFacts, StageFacts
from cocoa_dist.train import shards
from cocoa_dist.train.build import build_parts
from cocoa_dist.train.checkpoint import WEIGHTS_NAME
from cocoa_dist.train.evaluate import Embedder, load_embedder
from cocoa_dist.train.zero_state import WEIGHT, ParameterSlice

log = logging.getLogger("cocoa_dist.report")


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run, and those at the ends of the stages before it."""

    run: RunFacts  # its stages end with this one
    folder: Path

    @property
    def manifest(self) -> Manifest:
        """The checkpoint's manifest."""
        return self.run.stages[-1].manifest


def export_run(run_dir: Path, destination: Path, *, stage: str | None = None) -> Point:
    """Export the newest checkpoint of a stage (default: the last that has one).

    The folder is checked with its self-test before it gets its name. Raises ValueError if there is
    no checkpoint, it is damaged, or the folder does not give the trainer's vectors.
    """
    point = find_point(run_dir, stage=stage)
    config = point.run.config
    streamed = point.manifest.complete
    embedder = load_embedder(config, run_dir=None, after_stage=FROM_MODEL, weights=not streamed)
    model = embedder.model.backbone
    weights: LayerWeights = ModelWeights()
    if streamed:
        weights = stage_end_weights(point.folder / WEIGHTS_NAME, embedder, config)
    else:
        fill_from_shards(point, embedder)
    sets = _few_held_out(config, embedder)
    with weights_on_demand(model, weights) if streamed else nullcontext():
        vectors = self_test_vectors(embedder, sets)
    export_folder(
        model=model,
        weights=weights,
        tokenizer=export_tokenizer(config.model),
        destination=destination,
        image_settings=image_settings(config, embedder),
        bidirectional=is_two_way(embedder),
        pooling=embedder.stage.pooling,
        prompts=config.export.prompts,
        card=card_info(point.run, scores=()),
        self_test=vectors,
        max_text_tokens=config.data.max_text_tokens,
        bridge=bridge_tokens(config.model),
    )
    return point


def find_point(run_dir: Path, *, stage: str | None) -> Point:
    """Return the newest checkpoint of a stage (default: the last that has one).

    Raises ValueError if there is none, or one of its files is damaged.
    """
    if not (run_dir / RESOLVED_NAME).is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {RESOLVED_NAME}")
    config = load_resolved(run_dir / RESOLVED_NAME)
    if stage is not None and stage not in config.stages:
        raise ValueError(f"the run has no stage '{stage}' (have: {', '.join(config.stages)})")
    found = [(name, newest(run_dir, stage=name)) for name in config.stages]
    names = [name for name, at in found if at is not None]
    wanted = stage or (names[-1] if names else None)
    if wanted not in names:
        raise ValueError(f"{run_dir} has no checkpoint of {stage or 'any stage'} yet")
    kept = [(name, at) for name, at in found[: 1 + list(config.stages).index(wanted)] if at]
    folder, manifest = kept[-1][1]
    fault = find_fault(folder, manifest)
    if fault is not None:
        raise ValueError(f"{folder} is damaged: {fault}; choose another --stage")
    stages = tuple(StageFacts(name, str(at[0].relative_to(run_dir)), at[1]) for name, at in kept)
    run = RunFacts(run_dir=run_dir, config=config, stages=stages, restarts={}, steps=())
    return Point(run, folder)


def stage_end_weights(path: Path, embedder: Embedder, config: RunConfig) -> FileWeights:
    """Return the weights at a stage's end, learnt tokens in their rows, for an empty model.

    Raises ValueError naming the first parameter that is missing or has another shape.
    """
    model = embedder.model.backbone
    names = {name: f"backbone.{name}" for name, _ in model.named_parameters()}
    rows: dict[str, tuple[int, str]] = {}
    if embedder.vocabulary.learnt:
        embedding = model.get_input_embeddings().weight
        name = next(name for name, p in model.named_parameters() if p is embedding)
        rows[name] = (embedder.vocabulary.learnt.start, "compression_tokens.rows")
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    weights = FileWeights(stored_tensors([path]), names=names, dtype=dtype, rows=rows)
    weights.check(layers_of(model))
    return weights


@torch.no_grad()
def fill_from_shards(point: Point, embedder: Embedder) -> None:
    """Put the weights of a checkpoint in the middle of a stage into the embedder's model.

    Adapters are merged, learnt tokens written into their rows. Raises ValueError naming the
    parameter that does not fit.
    """
    config, manifest = point.run.config, point.manifest
    parts = build_parts(config, manifest.stage, run_dir=point.run.run_dir)
    slices = [
        ParameterSlice(name, tuple(p.shape), 0, p.numel(), {WEIGHT: p.detach().view(-1)})
        for name, p in parts.model.named_parameters()
        if p.requires_grad
    ]
    shards.fill(slices, point.folder, written_by=manifest.world_size, rank=0, world_size=1)
    weights = {name: p.detach() for name, p in parts.model.named_parameters()}
    adapter = config.stages[manifest.stage].adapter
    if adapter is not None:
        weights = merge_adapter(weights, adapter)
    for name, parameter in embedder.model.named_parameters():
        parameter.copy_(weights[name])
    embedder.model.write_compression_tokens()


def _few_held_out(config: RunConfig, embedder: Embedder) -> Sequence[HeldOut]:
    """Return the first held-out pairs of each set, for the self-test."""
    few = {
        name: source.model_copy(update={"limit": min(source.limit or 2, 2)})
        for name, source in config.evaluation.sets.items()
    }
    evaluation = config.evaluation.model_copy(update={"sets": few})
    return read_held_out(config.model_copy(update={"evaluation": evaluation}), embedder)
