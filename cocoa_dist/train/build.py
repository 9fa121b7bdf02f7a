"""Builds the parts of one stage from its recipe: vocabulary, model with heads, objective.

Where a stage starts from is decided here: the base model, or the weights at the end of an earlier
stage. The optimizer always starts new.
"""

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cocoa_dist import __version__, manifest
from cocoa_dist.batch import StepBatch
from cocoa_dist.config import (
    FROM_MODEL,
    ContrastiveConfig,
    ModelConfig,
    ReconstructionConfig,
    RunConfig,
    StageConfig,
    resolve_path,
)
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.samples import Vocabulary
from cocoa_dist.inputs import tokenizer_folder
from cocoa_dist.model.adapter import add_adapter
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.families import SPECIAL_TOKENS, family_of
from cocoa_dist.objectives.base import Objective
from cocoa_dist.objectives.contrastive import Contrastive
from cocoa_dist.objectives.reconstruction import Reconstruction
from cocoa_dist.train.checkpoint import WEIGHTS_NAME

_FRESH_PARTS = ("patch_decoder.",)  # a stage may begin or leave these; everything else must match


@dataclass(frozen=True)
class StageParts:
    """What a stage trains, ready for the engine."""

    vocabulary: Vocabulary
    geometry: ImageGeometry
    model: EmbeddingModel
    objective: Objective
    parent: str | None  # checkpoint the weights come from, relative to the run folder


def build_parts(config: RunConfig, stage_name: str, *, run_dir: Path | None) -> StageParts:
    """Build a stage's parts on the host, equal on every rank.

    Raises ValueError, naming the part, if the base model or the earlier stage is not there.
    """
    stage = config.stages[stage_name]
    torch.manual_seed(config.seed)
    vocabulary = load_vocabulary(config.model)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=vocabulary.size,
    )
    geometry = image_geometry(backbone)
    objective = build_objective(stage, geometry=geometry)
    model = EmbeddingModel(backbone, objective.heads)
    parent = None
    if stage.init_from != FROM_MODEL:
        parent = _load_stage_end(model, stage.init_from, run_dir=run_dir)
    if stage.adapter is not None:  # after the weights: an adapter begins on what was merged
        model.backbone = add_adapter(backbone, stage.adapter)
    if stage.freeze_vision:
        model.core.visual.requires_grad_(False)
    return StageParts(vocabulary, geometry, model, objective, parent)


def first_steps(
    config: RunConfig,
    stage_name: str,
    parts: StageParts,
    *,
    count: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[StepBatch]:
    """Return a rank's batches of a stage's first steps, read by a loader of their own.

    For rehearsals, benchmarks and tests: nothing is written into a run folder.
    """
    with TemporaryDirectory() as folder:
        loader = StageLoader(
            config,
            stage_name,
            vocabulary=parts.vocabulary,
            geometry=parts.geometry,
            rank=rank,
            world_size=world_size,
            start_step=1,
            folder=Path(folder),
        )
        batches = [loader.next_step() for _ in range(count)]
        loader.close()
    return batches


def load_vocabulary(config: ModelConfig) -> Vocabulary:
    """Load the tokenizer of a recipe. Raises ValueError if its folder is not there."""
    return Vocabulary.load(tokenizer_folder(config), config)


def special_token_ids(config: ModelConfig) -> dict[str, int]:
    """Return the ids of the special tokens, for models made from random weights."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder(config) / "tokenizer.json"))
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS.values()}
    ids = {token: number for token, number in found.items() if number is not None}
    if len(ids) != len(found):
        missing = ", ".join(found.keys() - ids.keys())
        raise ValueError(f"the tokenizer of the recipe lacks {missing}")
    return ids


def image_geometry(backbone: PreTrainedModel) -> ImageGeometry:
    """Return how the backbone cuts pictures and what its vision tower needs to know of them."""
    family, vision = family_of(backbone.config), backbone.config.vision_config
    return ImageGeometry(
        patch_size=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        mean=family.mean,
        std=family.std,
        window=family.window_side(vision),
        position_side=family.position_side(vision),
    )


def build_objective(stage: StageConfig, *, geometry: ImageGeometry) -> Objective:
    """Turn a stage's objective config into the objective."""
    config = stage.objective
    if isinstance(config, ContrastiveConfig):
        return Contrastive(
            temperature=config.temperature,
            symmetric=config.symmetric,
            mask_false_negatives=config.mask_false_negatives,
        )
    if isinstance(config, ReconstructionConfig) and config.image_mask_ratio > 0:
        pixels = 3 * (geometry.merge * geometry.patch_size) ** 2  # of one visual token, one frame
        return Reconstruction(image_weight=config.image_loss_weight, patch_values=pixels)
    return Reconstruction()


def load_weights(model: EmbeddingModel, path: Path) -> None:
    """Put the weights of a stage's end into `model`.

    Raises ValueError naming the parameters that do not fit.
    """
    weights = load_file(path)
    wanted = dict(model.named_parameters())
    for fault, names in (
        ("lacks", wanted.keys() - weights.keys()),
        ("has, unknown here,", weights.keys() - wanted.keys()),
    ):
        unfit = sorted(name for name in names if not name.startswith(_FRESH_PARTS))
        if unfit:
            raise ValueError(f"{path} {fault} {len(unfit)} parameters, first {unfit[0]}")
    with torch.no_grad():
        for name, value in weights.items():
            if name in wanted:
                wanted[name].copy_(value)


def base_model_digest(
    config: RunConfig, *, hash_files: Callable[[Sequence[Path]], list[str]] | None = None
) -> str:
    """Return what identifies the weights a run starts from: sha256 (hex) over their files.

    `hash_files` returns the sha256 (hex) of each file; by default this process reads them all.
    """
    digest = hashlib.sha256()
    if config.model.random is not None:
        digest.update(f"{config.seed} {config.model.random.model_dump_json()}".encode())
        return f"random-{digest.hexdigest()}"
    paths = sorted(resolve_path(str(config.model.path)).glob("*.safetensors"))
    for text in hash_files(paths) if hash_files else map(manifest.sha256_file, paths):
        digest.update(text.encode())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    versions = {"cocoa_dist": __version__, "python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers", "megatron-energon", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _load_stage_end(model: EmbeddingModel, stage: str, *, run_dir: Path | None) -> str:
    """Load the end of an earlier stage; return its checkpoint relative to the run folder."""
    if run_dir is None:
        raise ValueError(
            f"the stage starts from stage '{stage}': give the --run-dir of a run that finished it"
        )
    folder, _ = manifest.stage_end(run_dir, stage=stage, only=(WEIGHTS_NAME,))
    load_weights(model, folder / WEIGHTS_NAME)
    return str(folder.relative_to(run_dir))
