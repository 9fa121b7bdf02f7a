"""Builds the parts of one stage from its recipe: vocabulary, model with heads, objective.

Where a stage starts from is decided here: the base model, or the weights at the end of an earlier
stage. The optimizer always starts new.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
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
from cocoa_dist.model.shell import reserve_memory, without_weights
from cocoa_dist.objectives.base import Objective
from cocoa_dist.objectives.contrastive import Contrastive
from cocoa_dist.objectives.reconstruction import Reconstruction
from cocoa_dist.train.checkpoint import WEIGHTS_NAME

_SAYS_NOTHING = ("_name_or_path", "architectures", "transformers_version")  # of a config.json
_FRESH_PARTS = (
    "patch_decoder.",
    "hidden_patch.",
    "similarity.",
)  # a stage may begin or leave these; everything else must match

_TOKENS = "compression_tokens."
_MORE_TOKENS = (
    "all stages of a run have one number of compression tokens: set model.compression_tokens (or "
    "model.num_bridge_tokens) to that of the earlier stage"
)


@dataclass(frozen=True)
class StageParts:
    """What a stage trains, ready for the engine."""

    vocabulary: Vocabulary
    geometry: ImageGeometry
    model: EmbeddingModel
    objective: Objective
    parent: str | None  # checkpoint the weights come from, relative to the run folder


def build_parts(
    config: RunConfig, stage_name: str, *, run_dir: Path | None, weights: bool = True
) -> StageParts:
    """Build a stage's parts on the host, equal on every rank.

    `weights=False`: the model's parameters are memory that was never touched, for an engine that
    fills them from rank 0. Raises ValueError, naming the part, if the base model or the earlier
    stage is not there.
    """
    stage = config.stages[stage_name]
    torch.manual_seed(config.seed)
    vocabulary = load_vocabulary(config.model)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=vocabulary.size,
        weights=weights,
    )
    geometry = image_geometry(backbone)
    objective = build_objective(stage, geometry=geometry)
    _check_dimensions(stage, width=backbone.config.get_text_config().hidden_size)
    with without_weights(wanted=not weights):
        model = EmbeddingModel(backbone, objective.heads)
        if vocabulary.learnt:
            model.add_compression_tokens(ids=vocabulary.learnt, known=vocabulary.learnt_before)
    parent = None
    if stage.init_from != FROM_MODEL:
        run_dir = _required(run_dir, init_from=stage.init_from)
        read = (WEIGHTS_NAME,) if weights else ()  # what is not read is not checked either
        end, _ = manifest.stage_end(run_dir, stage=stage.init_from, only=read)
        parent = str(end.relative_to(run_dir))
        if weights:
            load_weights(model, end / WEIGHTS_NAME)
    if stage.adapter is not None:  # after the weights: an adapter begins on what was merged
        with without_weights(wanted=not weights):
            model.backbone = add_adapter(backbone, stage.adapter)
        if vocabulary.new:
            model.add_new_tokens(first=vocabulary.new.start, count=len(vocabulary.new))
    if stage.freeze_vision:
        model.core.visual.requires_grad_(False)
    reserve_memory(model)
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
        return Contrastive(config, negatives=stage.data.negatives)
    if not isinstance(config, ReconstructionConfig):
        return Reconstruction()
    pixels = 3 * (geometry.merge * geometry.patch_size) ** 2  # of one visual token, one frame
    return Reconstruction(
        image_weight=config.image_loss_weight,
        patch_values=pixels if config.image_mask_ratio > 0 else 0,
        learnt_mask=config.mask_replacement == "learned",
    )


def _check_dimensions(stage: StageConfig, *, width: int) -> None:
    """Raise ValueError for Matryoshka dimensions that the embedding does not have."""
    config = stage.objective
    if isinstance(config, ContrastiveConfig) and max(config.matryoshka, default=0) > width:
        raise ValueError(
            f"objective.matryoshka is {list(config.matryoshka)}, but the embeddings of this model "
            f"have {width} dimensions: expected none above that"
        )


def load_weights(model: EmbeddingModel, path: Path) -> None:
    """Put the weights of a stage's end into `model`, one parameter at a time.

    Raises ValueError naming the parameters that do not fit.
    """
    wanted = dict(model.named_parameters())
    with safe_open(path, framework="pt") as weights, torch.no_grad():
        found = set(weights.keys())
        for fault, names in (
            ("lacks", wanted.keys() - found),
            ("has, unknown here,", found - wanted.keys()),
        ):
            unfit = sorted(name for name in names if not name.startswith(_FRESH_PARTS))
            if unfit:
                more = f"; {_MORE_TOKENS}" if unfit[0].startswith(_TOKENS) else ""
                raise ValueError(f"{path} {fault} {len(unfit)} parameters, first {unfit[0]}{more}")
        # The tokens first: where their number differs, the rows of the vocabulary differ too.
        shared = sorted(found & wanted.keys(), key=lambda name: not name.startswith(_TOKENS))
        for name in shared:
            value = weights.get_tensor(name)
            if value.shape != wanted[name].shape:
                more = f"; {_MORE_TOKENS}" if name.startswith(_TOKENS) else ""
                raise ValueError(
                    f"{path}: {name} is {tuple(value.shape)}, expected "
                    f"{tuple(wanted[name].shape)}{more}"
                )
            wanted[name].copy_(value)


def base_model_digest(
    config: RunConfig, *, hash_files: Callable[[Sequence[Path]], list[str]] | None = None
) -> str:
    """Return what identifies the model a run starts from: sha256 (hex) over settings and weights.

    `hash_files` returns the sha256 (hex) of each file; by default this process reads them all.
    """
    digest = hashlib.sha256()
    if config.model.random is not None:
        digest.update(f"{config.seed} {config.model.random.model_dump_json()}".encode())
        return f"random-{digest.hexdigest()}"
    folder = resolve_path(str(config.model.path))
    paths = sorted(folder.glob("*.safetensors"))
    digest.update(settings_of(folder / "config.json"))
    for text in hash_files(paths) if hash_files else map(manifest.sha256_file, paths):
        digest.update(text.encode())
    return digest.hexdigest()


def settings_of(path: Path) -> bytes:
    """Return what a model's config.json decides, however it is written down."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    decides = {key: value for key, value in settings.items() if key not in _SAYS_NOTHING}
    return json.dumps(decides, sort_keys=True).encode()


def library_versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    versions = {"cocoa_dist": __version__, "python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers", "megatron-energon", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _required(run_dir: Path | None, *, init_from: str) -> Path:
    if run_dir is None:
        raise ValueError(
            f"the stage starts from stage '{init_from}': give the --run-dir of a run that "
            "finished it"
        )
    return run_dir
