"""What one stage costs: FLOPs, memory of a card, traffic, time. Pure arithmetic over shapes.

FLOPs count a multiplication and an addition as two, real tokens only. Letters: P parameters of the
model, Pt trainable ones, N cards.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cocoa_dist.config import (
    ContrastiveConfig,
    ReconstructionConfig,
    RunConfig,
    StageConfig,
    StageDataConfig,
)
from launcher.plan.hardware import GIB, Cluster
from launcher.plan.parameters import extra_parameters, trainable_parameters
from launcher.plan.shapes import ModelShape, TextShape, VisionShape
from launcher.plan.traffic import caches_gradients, step_traffic

_BACKWARD_FULL = 2.0  # FLOPs of a backward pass, in forward passes: inputs and weights
_BACKWARD_FROZEN = 1.0  # inputs alone; an adapter's own share is below one per cent
_RUNTIME_BYTES = 1.5 * GIB  # CUDA context, libraries, collectives' buffers; assumed
_FRAGMENTATION = 0.05  # of what is allocated; assumed


@dataclass(frozen=True)
class Workload:
    """What a record is made of; averages."""

    text_tokens: int  # of one text
    image_tokens: int  # visual tokens of one picture

    def spans(self, data: StageDataConfig) -> tuple[tuple[int, int], ...]:
        """Return the samples of a record as (tokens before the bridge, tokens behind it).

        Hard negatives are taken for texts, as targets are.
        """
        view = data.view
        picture = self.image_tokens + 2 if self.image_tokens else 0
        if view == "pair":
            targets = ((self.text_tokens, 0),) * (1 + data.negatives)
            return ((picture + self.text_tokens, 0), *targets)
        if view in ("bridged", "dialogue", "questions"):
            return ((picture + self.text_tokens, self.text_tokens),)
        if view == "language":
            return ((self.text_tokens, 0),)
        return ((picture + self.text_tokens, 0),)


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one record."""

    text: float
    vision: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.text + self.vision + self.head


@dataclass(frozen=True)
class StageCost:
    """One stage on one cluster."""

    name: str
    steps: int
    tokens_per_step: int
    packs_per_step: int  # of each card
    trainable: int
    model_flops: float  # of a step, all cards: forward and backward, nothing twice
    hardware_flops: float  # with recomputation and GradCache's first pass
    gathered_bytes: float  # through each card, a step
    memory: Mapping[str, float]  # bytes of a card, by part
    compute_seconds: float  # of a step
    network_seconds: float
    checkpoint_bytes: float

    @property
    def step_seconds(self) -> float:
        """Compute and traffic one after the other: nothing is assumed to overlap."""
        return self.compute_seconds + self.network_seconds

    @property
    def memory_bytes(self) -> float:
        """Memory a card needs."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """The whole stage."""
        return self.steps * self.step_seconds


def stage_cost(
    config: RunConfig,
    name: str,
    *,
    shape: ModelShape,
    cluster: Cluster,
    workload: Workload,
    resident: bool,
) -> StageCost:
    """Work out one stage. `resident`: every card keeps all weights gathered."""
    stage = config.stages[name]
    spans = workload.spans(stage.data)
    bridge = shape.bridge_tokens
    tokens = stage.batch_size * sum(before + bridge + behind for before, behind in spans)
    per_card = tokens / cluster.gpus
    packs = max(1, -(-int(per_card) // config.data.tokens_per_pack))
    forward = forward_flops(stage, shape=shape, workload=workload)
    passes, model_passes = _passes(config, stage, packs=packs)
    trainable = trainable_parameters(stage, shape=shape)
    traffic = step_traffic(
        config, name, shape=shape, packs=packs, cards=cluster.gpus, resident=resident
    )
    hardware = stage.batch_size * passes.applied(forward)
    return StageCost(
        name=name,
        steps=stage.steps,
        tokens_per_step=tokens,
        packs_per_step=packs,
        trainable=trainable,
        model_flops=stage.batch_size * model_passes.applied(forward),
        hardware_flops=hardware,
        gathered_bytes=traffic.sent,
        memory=memory_parts(
            config, stage, shape=shape, cluster=cluster, resident=resident, per_card=per_card
        ),
        compute_seconds=hardware / (cluster.gpus * cluster.card.peak_flops * cluster.compute_share),
        network_seconds=traffic.sent / cluster.bus_bytes,
        checkpoint_bytes=12.0 * trainable,  # frozen weights are not written again
    )


def forward_flops(stage: StageConfig, *, shape: ModelShape, workload: Workload) -> Flops:
    """Forward FLOPs of one record of a stage."""
    text, spans = shape.text, workload.spans(stage.data)
    bridge = shape.bridge_tokens
    tokens = sum(before + bridge + behind for before, behind in spans)
    area = sum(_visible_area(stage, before, behind, bridge=bridge) for before, behind in spans)
    language = _text_flops(text, tokens, area, layers=text.layers)
    head = 0.0
    objective = stage.objective
    if isinstance(objective, ReconstructionConfig):
        head += 2.0 * text.embedding_parameters * supervised_tokens(stage, workload)
        if objective.image_mask_ratio:
            hidden = workload.image_tokens * objective.image_mask_ratio
            pixels = 3 * (shape.vision.patch_size * shape.vision.merge) ** 2
            head += _text_flops(text, tokens, area, layers=1) + 2.0 * text.width * pixels * hidden
    elif not isinstance(objective, ContrastiveConfig):
        head += 2.0 * text.embedding_parameters * workload.text_tokens
    pictures = 0 if stage.data.view == "language" or not workload.image_tokens else 1
    return Flops(language, pictures * vision_flops(shape.vision, workload.image_tokens), head)


def supervised_tokens(stage: StageConfig, workload: Workload) -> float:
    """Tokens of one record whose logits are computed."""
    objective = stage.objective
    if isinstance(objective, ContrastiveConfig):
        return 0.0
    ratio = objective.text_mask_ratio if isinstance(objective, ReconstructionConfig) else 1.0
    return ratio * workload.text_tokens


def vision_flops(vision: VisionShape, image_tokens: int) -> float:
    """Forward FLOPs of one picture, its patches attending to each other in every layer.

    An upper bound for Qwen2.5-VL, most of whose layers look at windows only.
    """
    patches = image_tokens * vision.merge**2
    linear = 2.0 * vision.layers * vision.block_parameters * patches
    attention = 4.0 * vision.layers * vision.width * patches**2
    patch = 2.0 * 3 * vision.temporal * vision.patch_size**2 * vision.width * patches
    return linear + attention + patch + 2.0 * vision.merger_parameters * image_tokens


def memory_parts(
    config: RunConfig,
    stage: StageConfig,
    *,
    shape: ModelShape,
    cluster: Cluster,
    resident: bool,
    per_card: float,
) -> dict[str, float]:
    """Bytes of one card by part, at the moment of the largest pack's backward pass."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    total = shape.parameters + extra_parameters(stage, shape)
    trainable, cards = trainable_parameters(stage, shape=shape), cluster.gpus
    largest = max(shape.text.embedding_parameters, shape.text.layer_parameters)
    tokens = min(config.data.tokens_per_pack, per_card)
    patches = 0.0 if stage.data.view == "language" else config.data.patches_per_pack
    patches = min(patches, tokens * shape.vision.merge**2)
    parts = {
        "weights": width * (total if resident else total / cards),
        "gathered weights": 0.0 if resident else 2.0 * width * min(largest * 2, total),
        "gradients": width * trainable / cards,
        "optimizer": 12.0 * trainable / cards,
        "activations": activation_bytes(
            shape,
            tokens=tokens,
            patches=patches,
            width=width,
            recomputed=config.model.checkpoint_activations,
        ),
        "logits": _logit_bytes(stage, shape, tokens=tokens),
    }
    if any(other.guide is not None for other in config.stages.values()):  # parts are a table
        has_one = stage.guide is not None
        parts["guide"] = float(width * shape.parameters) if has_one else 0.0  # whole on every card
    if config.engine.reduction == "coalesce":
        parts["gradients"] += width * trainable
    if cluster.card.name != "cpu":
        parts["runtime"] = _RUNTIME_BYTES
        parts["fragmentation"] = _FRAGMENTATION * sum(parts.values())
    return parts


def activation_bytes(
    shape: ModelShape, *, tokens: float, patches: float, width: int, recomputed: bool
) -> float:
    """Bytes that a pack's forward pass keeps for its backward pass."""
    text, vision = shape.text, shape.vision
    return _kept(tokens, text.layers, text.width, layer_values(text), width, recomputed) + _kept(
        patches, vision.layers, vision.width, block_values(vision), width, recomputed
    )


def _kept(
    rows: float, layers: int, hidden: int, values: float, width: int, recomputed: bool
) -> float:
    """With recomputation each layer keeps its input, and one layer at a time all it needs."""
    if recomputed:
        return width * rows * (layers * hidden + values)
    return width * rows * layers * values


def layer_values(text: TextShape) -> float:
    """Values that a row of one layer keeps for the backward pass.

    Counted in transformers' layers by the tests: norms and residuals five times the width, queries
    and keys before and behind their rotation and gathered, five of the gated block.
    """
    q, kv = text.heads * text.head_width, text.kv_heads * text.head_width
    norms = 3 * (q + kv) if text.head_norms else 0
    return 5 * text.width + 3 * q + 5 * kv + 5 * text.inner_width + norms


def block_values(vision: VisionShape) -> float:
    """Values that a row of one vision block keeps, counted in the same way."""
    if vision.gated:
        return 12 * vision.width + 5 * vision.inner_width
    inner = 2 if vision.deepstack else 3  # of GELU, and of its quick form
    return 10 * vision.width + inner * vision.inner_width


def _logit_bytes(stage: StageConfig, shape: ModelShape, *, tokens: float) -> float:
    """Logits of a pack's supervised rows and their gradient, float32."""
    objective = stage.objective
    if isinstance(objective, ContrastiveConfig):
        return 0.0
    ratio = objective.text_mask_ratio if isinstance(objective, ReconstructionConfig) else 1.0
    return 8.0 * ratio * tokens * shape.text.vocabulary


def _text_flops(text: TextShape, tokens: int, area: float, *, layers: int) -> float:
    linear = 2.0 * sum(a * b for a, b in text.linears.values()) * tokens
    return layers * (linear + 4.0 * text.heads * text.head_width * area)


def _visible_area(stage: StageConfig, before: int, behind: int, *, bridge: int = 1) -> float:
    """Visible (row, key) pairs of one sample: context, bridge, target."""
    context, length = before + bridge, before + bridge + behind
    rule = stage.attention.rule
    if rule == "causal":
        return length * (length + 1) / 2
    if rule == "bidirectional" or not behind:
        return float(length) ** 2
    inside = behind * (behind + 1) / 2 if stage.attention.target_causal else float(behind) ** 2
    if rule == "compression":
        return context * (context + 1) / 2 + bridge * behind + behind * (behind + 1) / 2
    seen = length if stage.attention.bridge_sees_target else context
    return before * context + bridge * seen + bridge * behind + inside


@dataclass(frozen=True)
class _Passes:
    """How often a record goes through the text model and the vision tower, in forward passes."""

    text: float
    vision: float

    def applied(self, forward: Flops) -> float:
        return self.text * (forward.text + forward.head) + self.vision * forward.vision


def _passes(config: RunConfig, stage: StageConfig, *, packs: int) -> tuple[_Passes, _Passes]:
    """Return passes of the hardware, and those that a model's own FLOPs are counted by."""
    adapted = stage.adapter is not None
    text = 1.0 + (_BACKWARD_FROZEN if adapted else _BACKWARD_FULL)
    vision = 1.0 if stage.freeze_vision else text
    again = 1.0 if config.model.checkpoint_activations else 0.0
    again += 1.0 if caches_gradients(stage, packs) else 0.0
    guide = 1.0 if stage.guide is not None else 0.0
    seen = vision + (0.0 if stage.freeze_vision else again)
    redone = _Passes(text + again + guide, seen + guide)
    return redone, _Passes(text, vision)
