"""A frozen model that says which candidates of a contrastive stage are no negatives.

Every rank has a whole copy of it, outside the engine: nothing of it is partitioned, trained or
saved, and its forward passes are no collectives. Rank 0 reads it and gives it to the others.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocoa_dist import manifest
from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import FROM_MODEL, RunConfig, StageConfig, resolve_path
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.vocabulary import Vocabulary, learnt_tokens, load_tokenizer
from cocoa_dist.distributed import raise_together, rank, training_device, world_size
from cocoa_dist.inputs import check_model_folder, tokenizer_folder
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel, ModelOutput
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.model.shell import reserve_memory, without_weights
from cocoa_dist.train.build import (
    StageParts,
    image_geometry,
    load_weights,
    settings_of,
    special_token_ids,
)
from cocoa_dist.train.checkpoint import WEIGHTS_NAME

log = logging.getLogger("cocoa_dist.train")


def load_guide(
    config: RunConfig, stage_name: str, parts: StageParts, *, run_dir: Path | None
) -> Callable[[PackedBatch], Tensor] | None:
    """Return what embeds a pack by the guide of a stage, None where it has none.

    Embeddings are (E, D) float32, or (E, K, D), without gradient. Raises ValueError on all ranks
    for a guide that is not there, or does not read batches as the model does. Collective.
    """
    stage, weights = config.stages[stage_name], rank() == 0
    if stage.guide is None:
        return None
    if stage.guide_folder is None:
        model = raise_together(
            lambda: _stage_start(config, stage_name, parts, run_dir=run_dir, weights=weights)
        )
    else:
        folder = resolve_path(stage.guide_folder)
        model = raise_together(lambda: _from_folder(folder, config, parts, weights=weights))
    return _shared(model)


def guide_digest(stage: StageConfig, *, hash_files: Callable[[Sequence[Path]], list[str]]) -> str:
    """Return what identifies a guide that lies in a folder of its own; nothing for others.

    Raises ValueError on all ranks for a folder that is not there, or not whole. Collective.
    """
    named = stage.guide_folder
    if named is None:
        return ""
    folder = raise_together(lambda: check_model_folder(named, named="objective.guide"))
    digest = hashlib.sha256(settings_of(folder / "config.json"))
    for text in hash_files(sorted(folder.glob("*.safetensors"))):
        digest.update(text.encode())
    return f"{manifest.GUIDE_MARK}{digest.hexdigest()}"


def _stage_start(
    config: RunConfig, stage_name: str, parts: StageParts, *, run_dir: Path | None, weights: bool
) -> EmbeddingModel:
    """Build the model as it stood when the stage began, whatever has been trained since."""
    words = parts.vocabulary
    torch.manual_seed(config.seed)  # as `build_parts`: weights may be random
    backbone = _backbone(config, words, weights=weights)
    with without_weights(wanted=not weights):
        model = EmbeddingModel(backbone, parts.objective.heads)
        if words.learnt:
            model.add_compression_tokens(ids=words.learnt, known=words.learnt_before)
    origin = config.stages[stage_name].init_from
    if origin != FROM_MODEL and weights:
        if run_dir is None:
            raise ValueError(
                f"objective.guide is the model at the end of stage '{origin}': give the --run-dir "
                "of a run that finished it"
            )
        end, _ = manifest.stage_end(run_dir, stage=origin, only=(WEIGHTS_NAME,))
        load_weights(model, end / WEIGHTS_NAME)
    return model


def _from_folder(
    folder: Path, config: RunConfig, parts: StageParts, *, weights: bool
) -> EmbeddingModel:
    """Load an exported or downloaded folder. Raises ValueError if it does not fit the recipe."""
    check_model_folder(str(folder), named="objective.guide")
    _check_tokens(folder, config, parts.vocabulary)
    named = {"path": str(folder), "random": None, "tokenizer": str(tokenizer_folder(config.model))}
    model = config.model.model_copy(update=named)
    backbone = _backbone(
        config.model_copy(update={"model": model}), parts.vocabulary, weights=weights
    )
    _check_geometry(folder, image_geometry(backbone), expected=parts.geometry)
    return EmbeddingModel(backbone, HeadsConfig(embeddings=True))


def _backbone(config: RunConfig, words: Vocabulary, *, weights: bool) -> Any:
    plain = {"compile_layers": False, "checkpoint_activations": False}
    return load_backbone(
        config.model.model_copy(update=plain),
        token_ids=special_token_ids(config.model),
        vocabulary_size=words.size,
        weights=weights,
    )


def _check_tokens(folder: Path, config: RunConfig, words: Vocabulary) -> None:
    """Raise ValueError unless the guide reads token ids as the model that is trained does."""
    ours = load_tokenizer(tokenizer_folder(config.model)).get_vocab(with_added_tokens=True)
    ours |= dict(zip(learnt_tokens(config.model), words.learnt, strict=True))
    theirs = load_tokenizer(folder).get_vocab(with_added_tokens=True)
    other = [token for token, number in ours.items() if theirs.get(token) != number]
    if other:
        token = other[-1]
        raise ValueError(
            f"objective.guide {folder}: {len(other)} tokens have other ids than in this recipe, or "
            f"none, as {token!r}: {theirs.get(token, 'none')} there, {ours[token]} here. A guide "
            "reads the batches of the model: give one with its tokens, as a folder that a run of "
            "this recipe has exported"
        )


def _check_geometry(folder: Path, found: ImageGeometry, *, expected: ImageGeometry) -> None:
    """Raise ValueError unless the guide takes pictures as the model that is trained does."""
    if found != expected:
        raise ValueError(
            f"objective.guide {folder} takes pictures as {found}, the model of this recipe as "
            f"{expected}: give a guide of the same family and patch size"
        )


def _shared(guide: EmbeddingModel) -> Callable[[PackedBatch], Tensor]:
    """Give rank 0's guide to all ranks, where they train. Collective: call on all ranks."""
    del guide.backbone.lm_head  # nobody asks it for words
    reserve_memory(guide)
    guide.heads = HeadsConfig(embeddings=True)
    guide.eval().requires_grad_(False)
    device, held = training_device(), 0
    for parameter in guide.parameters():
        parameter.data = parameter.data.to(device)
        held += parameter.numel() * parameter.element_size()
        if world_size() > 1:
            torch.distributed.broadcast(parameter.data, 0)
    guide.to(device)  # buffers
    if rank() == 0:
        log.info("every rank holds a guide of %.2f GiB", held / 2**30)

    def embed(pack: PackedBatch) -> Tensor:
        with torch.no_grad():
            output: ModelOutput = guide(pack)
        assert output.embeddings_ED is not None
        return output.embeddings_ED

    return embed
