"""The stages of a recipe in plain peft and torch, one process: the slow obvious version.

Adapters are added and merged by peft itself, weights are moved by torch.optim.AdamW. From the
package come the model's forward pass, the records of each step and where fresh weights begin.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from cocoa_dist.config import FROM_MODEL, RunConfig
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.train.build import StageParts, build_parts, first_steps, special_token_ids
from cocoa_dist.train.engine import learning_rate_at

FRESH = ("patch_decoder.", ".lora_A.")  # drawn at random where a stage begins


@dataclass(frozen=True)
class PlainStage:
    """What a stage did: the loss of every step, and the weights, adapters merged into them."""

    losses: list[float]
    weights: dict[str, Tensor]


def train(config: RunConfig, *, run_dir: Path, world_size: int) -> dict[str, PlainStage]:
    """Train every stage of `config`, each from the one it names.

    `run_dir`: a finished run of the same recipe; only where its fresh weights began is read.
    """
    done: dict[str, PlainStage] = {}
    for name in config.stages:
        parts = build_parts(config, name, run_dir=run_dir)
        parent = config.stages[name].init_from
        weights = None if parent == FROM_MODEL else done[parent].weights
        done[name] = train_stage(config, name, parts, weights=weights, world_size=world_size)
    return done


def train_stage(
    config: RunConfig,
    name: str,
    parts: StageParts,
    *,
    weights: dict[str, Tensor] | None,
    world_size: int,
) -> PlainStage:
    """Train one stage on the packs of all ranks at once."""
    stage = config.stages[name]
    model = plain_model(config, name, parts, weights=weights)
    new, rows = parts.vocabulary.new, None
    if stage.adapter is not None and len(new):
        rows = torch.nn.Parameter(torch.zeros(len(new), config.model.random.hidden_size))
        hook = model.core.language_model.embed_tokens.register_forward_hook(
            lambda _, given, out: sum(
                (torch.where(given[0][:, None] == new[i], rows[i], 0.0) for i in range(len(new))),
                start=out,
            )
        )
    per_rank = [
        first_steps(config, name, parts, count=stage.steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    trained += [] if rows is None else [rows]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ],
        betas=stage.optimizer.betas,
        eps=stage.optimizer.eps,
        weight_decay=stage.optimizer.weight_decay,
    )
    losses = []
    for step, batches in enumerate(zip(*per_rank, strict=True), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, stage.optimizer, total_steps=stage.steps)
        packs = [pack for batch in batches for pack in batch.packs]
        sums = parts.objective.sums([model(pack) for pack in packs], packs)
        counts = parts.objective.counts(packs)
        loss = sum(parts.objective.weights[term] * sums[term] / counts[term] for term in sums)
        optimizer.zero_grad()
        loss.backward()
        clip(trained, stage.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    if stage.adapter is not None:
        model.backbone = model.backbone.merge_and_unload()
    if rows is not None:
        hook.remove()
        with torch.no_grad():
            model.core.language_model.embed_tokens.weight[list(new)] += rows
    return PlainStage(losses, {n: p.detach().clone() for n, p in model.named_parameters()})


def clip(parameters: list[torch.nn.Parameter], limit: float) -> None:
    """Scale the gradient down to a norm of `limit`, as clip_grad_norm_ does, summed in float64.

    In float32 torch's own norm of an embedding's gradient is off by 2e-5 on a CPU.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = sum(gradient.double().square().sum() for gradient in gradients) ** 0.5
    if norm + 1e-6 > limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).item())


def plain_model(
    config: RunConfig, name: str, parts: StageParts, *, weights: dict[str, Tensor] | None
) -> EmbeddingModel:
    """Make the stage's model: the base or `weights`, and an adapter of peft's on it."""
    stage = config.stages[name]
    torch.manual_seed(config.seed)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=parts.vocabulary.size,
    )
    model = EmbeddingModel(backbone, parts.objective.heads)
    if weights is not None:
        copy(weights, model, only=lambda name: not name.startswith(FRESH[0]))
    if stage.adapter is not None:
        model.backbone = get_peft_model(
            backbone,
            LoraConfig(
                r=stage.adapter.rank,
                lora_alpha=stage.adapter.alpha,
                lora_dropout=stage.adapter.dropout,
                target_modules=list(stage.adapter.targets),
                use_dora=stage.adapter.kind == "dora",
            ),
        )
    if stage.freeze_vision:
        model.core.visual.requires_grad_(False)
    fresh = {n: p.detach() for n, p in parts.model.named_parameters()}
    copy(fresh, model, only=lambda name: any(part in name for part in FRESH))
    return model.train()


def copy(weights: dict[str, Tensor], model: torch.nn.Module, *, only) -> None:
    """Overwrite the parameters whose name `only` accepts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only(name):
                parameter.copy_(weights[name])
