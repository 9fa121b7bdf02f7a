"""The only file that knows DeepSpeed: scales losses, steps, gathers weights.

One factor per term makes results independent of ranks, packing and accumulation:
weight x world size / global count, where the world size undoes ZeRO's mean over ranks.
"""

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import OptimizerConfig
from cocoa_dist.distributed import sum_over_ranks, world_size
from cocoa_dist.objectives.base import Objective
from cocoa_dist.train.ds_config import build_ds_config


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did; sums and counts are global."""

    loss: float
    parts: Mapping[str, float]  # term -> mean over its global count
    grad_norm: float
    learning_rate: float
    extras: tuple[float, ...]  # the caller's numbers, summed over ranks
    skipped: bool  # the engine did not apply the step (non-finite gradient)


@dataclass(frozen=True)
class Term:
    """One term of a step's loss: this rank's sum, and the count of all ranks."""

    local_sum: float
    count: float


class TrainEngine:
    """ZeRO-3 around one model and one objective."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        optimizer: OptimizerConfig,
        total_steps: int,
        ds_config: Mapping[str, Any],
        dtype: str = "float32",
    ) -> None:
        """Partition `model` over the ranks. Collective: call on all ranks."""
        deepspeed = _import_deepspeed()
        self.objective = objective
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        resolved = build_ds_config(ds_config, max_grad_norm=optimizer.max_grad_norm, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=_adamw(model, optimizer), config=resolved
            )
        # It copies scripts of its own beside the shards, and raises on one rank if it cannot.
        self.deepspeed._copy_recovery_script = lambda save_path: None
        self.deepspeed.train()

    @property
    def module(self) -> nn.Module:
        """The wrapped model; its parameters are partitioned."""
        module: nn.Module = self.deepspeed.module
        return module

    def train_step(
        self, packs: Sequence[PackedBatch], *, step: int, extras: Sequence[float] = ()
    ) -> StepStats:
        """Do optimizer step `step` (1 is the first). Collective: call on all ranks.

        Every rank passes the same number of packs. `extras` ride on the step's reduction.
        """
        rate = learning_rate_at(step, self.optimizer_config, total_steps=self.total_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        terms = self.accumulate(packs)
        self.deepspeed.step()
        local = [*(term.local_sum for term in terms.values()), *extras]
        summed = sum_over_ranks(torch.tensor(local, dtype=torch.float64)).tolist()
        parts = {n: s / t.count for (n, t), s in zip(terms.items(), summed, strict=False)}
        norm = self.deepspeed.get_global_grad_norm()
        return StepStats(
            loss=sum(self.objective.weights[name] * part for name, part in parts.items()),
            parts=parts,
            grad_norm=math.nan if norm is None else float(norm),
            learning_rate=rate,
            extras=tuple(summed[len(parts) :]),
            skipped=not self.deepspeed.was_step_applied(),
        )

    def accumulate(self, packs: Sequence[PackedBatch]) -> dict[str, Term]:
        """Forward and backward of one step's packs, without the optimizer. Collective."""
        names = list(self.objective.weights)
        counts = self._global_counts(packs, names)
        factors = {
            name: self.objective.weights[name] * world_size() / counts[name] for name in names
        }
        sums = self._backward(packs, factors)
        return {name: Term(sums[name], counts[name]) for name in names}

    def _global_counts(
        self, packs: Sequence[PackedBatch], names: Sequence[str]
    ) -> dict[str, float]:
        counts = self.objective.counts(packs)
        local = torch.tensor([counts[name] for name in names], dtype=torch.float64)
        totals = sum_over_ranks(local).clamp(min=1.0).tolist()  # nothing supervised: 0 / 1
        return dict(zip(names, totals, strict=True))

    def _backward(
        self, packs: Sequence[PackedBatch], factors: Mapping[str, float]
    ) -> dict[str, float]:
        """Forward and backward of a step; returns this rank's sum of each term."""
        groups = [packs] if self.objective.step_wide else [[pack] for pack in packs]
        totals = dict.fromkeys(factors, 0.0)
        for index, group in enumerate(groups):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(groups) - 1)
            outputs = [self.deepspeed(pack) for pack in group]
            sums = self.objective.sums(outputs, group)
            loss = sum((factors[name] * sums[name] for name in factors), start=torch.zeros(()))
            self.deepspeed.backward(loss)
            for name, value in sums.items():
                totals[name] += value.detach().item()
        return totals

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """Return the whole model's weights on rank 0 (host, float32), None on the others.

        Gathers one parameter at a time. Tied weights appear once, under their first name.
        Collective: call on all ranks.
        """
        deepspeed = _import_deepspeed()
        keep = torch.distributed.get_rank() == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    weights[name] = parameter.detach().float().cpu().clone()
        return weights if keep else None


def learning_rate_at(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """Learning rate of optimizer step `step`: linear warm-up, then the schedule down to 0.

    A pure function of the step, so a resume has no scheduler state to restore.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = max(total_steps - config.warmup_steps, 1)
    left = (total_steps - step + 1) / span  # the last step still moves
    if config.schedule == "linear":
        return config.learning_rate * left
    return config.learning_rate * 0.5 * (1.0 - math.cos(math.pi * left))


def _adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW without decay on vectors (biases, norms)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )


def _is_about_us(record: logging.LogRecord) -> bool:
    """Drop the warning that a PackedBatch is no tensor: nothing in it requires a gradient."""
    return "unknown inputs or outputs type" not in record.getMessage()


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly; on CPU keep it from compiling its shared-memory collective."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_about_us)
    # It is built with a C++ compiler at start, about half a minute; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
