"""What a card sends in a step: weights gathered, gradients scattered, embeddings exchanged.

Counted against DeepSpeed in benchmarks/scale_cpu.md, up to 1,024 ranks of a fake process group.
Letters: P parameters, E those of the embedding, N cards.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cocoa_dist.config import PACKAGE_DIR, ContrastiveConfig, RunConfig, StageConfig
from launcher.plan.parameters import extra_parameters, trainable_parameters
from launcher.plan.shapes import ModelShape

_REUSE_KEY = "stage3_max_reuse_distance"
_REUSE_DEFAULT = 1e9  # DeepSpeed's, in parameters


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of one step, of whole tensors: what all cards gather or reduce together."""

    gathered: float
    reduced: float
    exchanged: float  # embeddings of a contrastive batch: gathered, and their gradient all-reduced
    cards: int

    @property
    def sent(self) -> float:
        """Bytes that go out of each card, with ring algorithms."""
        return (self.gathered + self.reduced + self.exchanged) * (self.cards - 1) / self.cards


def step_traffic(
    config: RunConfig,
    stage_name: str,
    *,
    shape: ModelShape,
    packs: int,
    cards: int,
    resident: bool,
) -> StepTraffic:
    """Work out a step of `packs` packs a card. `resident`: every card keeps all weights."""
    stage = config.stages[stage_name]
    width = 2 if config.model.dtype == "bfloat16" else 4
    whole = shape.parameters + extra_parameters(stage, shape)
    times = 1.0 if resident else _gathers(config, stage, shape=shape, whole=whole, packs=packs)
    reductions = packs if config.engine.reduction == "boundary" else 1
    if isinstance(stage.objective, ContrastiveConfig) and not caches_gradients(stage, packs):
        reductions = 1  # one backward pass for all packs
    return StepTraffic(
        gathered=width * whole * times,
        reduced=float(width * trainable_parameters(stage, shape=shape) * reductions),
        exchanged=_exchanged(stage, shape),
        cards=cards,
    )


def caches_gradients(stage: StageConfig, packs: int) -> bool:
    """Say whether a step of so many packs a card runs in chunks."""
    objective = stage.objective
    return isinstance(objective, ContrastiveConfig) and (
        objective.grad_cache.mode == "always"
        or (objective.grad_cache.mode == "auto" and packs > objective.grad_cache.packs)
    )


def _gathers(
    config: RunConfig, stage: StageConfig, *, shape: ModelShape, whole: int, packs: int
) -> float:
    """Return how often all weights are gathered in a step, where none stay.

    DeepSpeed keeps what is used again within its reuse distance. With none, each pack gathers
    everything forward and backward, the embedding twice more where it is the text head too, and
    layers once more where they are recomputed; all but what one step leaves to the next. With a
    distance of P, each pack gathers everything once. In between taken as linear: up to 30 % too
    much, counted on a tiny model.
    """
    if caches_gradients(stage, packs):
        return 3.0 * packs - 1.0  # the last chunk keeps its activations: one forward less
    head = 0.0
    if not isinstance(stage.objective, ContrastiveConfig) and shape.text.tied:
        head = 2.0 * shape.text.embedding_parameters / whole
    again = 0.0
    if config.model.checkpoint_activations:
        layers = shape.text.layers * shape.text.layer_parameters
        again = (layers + shape.vision.layers * shape.vision.block_parameters) / whole
    kept = min(1.0, reuse_distance(config) / whole)
    return packs + (1.0 - kept) * (packs * (1.0 + head + again) - 1.0)


def reuse_distance(config: RunConfig) -> float:
    """Return over how many parameters DeepSpeed keeps a weight for its next use; FSDP2: none."""
    if config.engine.kind != "deepspeed":
        return 0.0
    named = PACKAGE_DIR.parent / "ds_configs" / f"{config.engine.ds_config}.json"
    path = named if named.is_file() else Path(config.engine.ds_config)
    try:
        section = json.loads(path.read_text()).get("zero_optimization", {})
    except (OSError, ValueError):
        return _REUSE_DEFAULT  # a run names what is wrong with the file
    return float(section.get(_REUSE_KEY, _REUSE_DEFAULT))


def _exchanged(stage: StageConfig, shape: ModelShape) -> float:
    """Bytes of candidates gathered once and their gradient all-reduced, float32."""
    objective = stage.objective
    if not isinstance(objective, ContrastiveConfig):
        return 0.0
    sides = 1 + stage.data.negatives + int(objective.symmetric)
    return 3.0 * 4.0 * stage.batch_size * sides * shape.text.width
