"""All that knows DeepSpeed, with zero_state.py: scales losses, steps, gathers weights.

One factor per term makes results independent of ranks, packing and accumulation:
weight x world size / global count, where the world size undoes ZeRO's mean over ranks.
"""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import EngineConfig, GradCacheConfig, OptimizerConfig
from cocoa_dist.distributed import (
    raise_together,
    rank,
    sum_over_ranks,
    training_device,
    world_size,
)
from cocoa_dist.model.embedder import EmbeddingModel, ModelOutput
from cocoa_dist.model.heads import HeadsConfig, SimilarityScale
from cocoa_dist.objectives.base import Objective, weighted_total
from cocoa_dist.runtime import random_state, restore_random_state
from cocoa_dist.train import shards, zero_state
from cocoa_dist.train.ds_config import build_ds_config
from cocoa_dist.train.grad_cache import cached_backward
from cocoa_dist.train.health import LastUpdate, group_health, local_sums
from cocoa_dist.train.residency import decide_residency

_MOST = "most"  # of a parameter group: no value above it


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did; sums and counts are global."""

    loss: float
    parts: Mapping[str, float]  # term -> mean over its global count
    grad_norm: float
    learning_rate: float
    health: Mapping[str, float]  # what the objective measured beside its loss
    extras: tuple[float, ...]  # the caller's numbers, summed over ranks
    skipped: str  # what was not finite, "loss" or "gradient": no weight moved; else ""
    finite_here: bool  # this rank's own part of the loss


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
        settings: EngineConfig | None = None,
        grad_cache: GradCacheConfig | None = None,
        measure_every: int = 0,
    ) -> None:
        """Partition `model` over the ranks. Collective: call on all ranks.

        Every `measure_every` steps (0: never) the norms of groups of parameters are measured.
        """
        self.objective = objective
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        self.measure_every = measure_every
        self.peer_wait_seconds = 0.0  # in the sums of steps, since this engine was made
        self.settings = settings or EngineConfig()
        self.grad_cache = grad_cache or GradCacheConfig()
        self.before_update: Callable[[], None] = lambda: None  # the last that reads the old weights
        self.device = training_device()
        self.residency = decide_residency(self.settings.resident_parameters, model)
        self._wrap(model, mechanics=ds_config, dtype=dtype)

    def _wrap(self, model: nn.Module, *, mechanics: Mapping[str, Any], dtype: str) -> None:
        deepspeed = import_deepspeed()
        resolved = build_ds_config(
            mechanics,
            max_grad_norm=self.optimizer_config.max_grad_norm,
            dtype=dtype,
            resident=self.residency.resident,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=adamw(model, self.optimizer_config), config=resolved
            )
        zero_state.refuse_swapped_state(self.deepspeed)
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
        for group in self._parameter_groups():
            group["lr"] = rate
        measures = self.objective.measures
        measures.take()  # what a trial before this step has left
        terms = self.accumulate(packs)
        measured = measures.take()
        groups = self._group_sums(step)
        local = [*(term.local_sum for term in terms.values()), *measured, *extras, *groups]
        summed = self._sum_together(torch.tensor(local, dtype=torch.float64)).tolist()
        parts = {n: s / t.count for (n, t), s in zip(terms.items(), summed, strict=False)}
        first_extra = len(parts) + len(measured)
        first_group = first_extra + len(extras)
        sums = dict(zip(measures.names, summed[len(parts) : first_extra], strict=True))
        loss = sum(self.objective.weights[name] * part for name, part in parts.items())
        self.before_update()
        skipped = self._apply() if math.isfinite(loss) else self._leave_out()
        return StepStats(
            loss=loss,
            parts=parts,
            grad_norm=math.nan if skipped else self._gradient_norm(),
            skipped=skipped,
            finite_here=all(math.isfinite(term.local_sum) for term in terms.values()),
            learning_rate=rate,
            health={**self.objective.health(sums), **group_health(summed[first_group:])},
            extras=tuple(summed[first_extra:first_group]),
        )

    def _group_sums(self, step: int) -> list[float]:
        """Return what `health` wants to know of this rank in steps that are measured, else []."""
        if not self.measure_every or (step % self.measure_every and step > 1):
            return []
        rate = learning_rate_at(step - 1, self.optimizer_config, total_steps=self.total_steps)
        return local_sums(
            self._gradients(),
            self._slices(),
            last=LastUpdate(learning_rate=rate, steps=self._optimizer_steps()),
            optimizer=self.optimizer_config,
        )

    def _gradients(self) -> Mapping[str, Tensor]:
        """Return this rank's elements of every gradient, flat; before clipping."""
        return zero_state.gradient_slices(self.deepspeed, self.module)

    def _slices(self) -> Sequence[zero_state.ParameterSlice]:
        """Return this rank's part of every trained parameter, as views of the live tensors."""
        return zero_state.parameter_slices(self.deepspeed, self.module)

    def _optimizer_steps(self) -> int:
        """Return how often the optimizer has moved the weights."""
        return zero_state.counters(self.deepspeed).optimizer_steps

    def _sum_together(self, local: Tensor) -> Tensor:
        """Sum over ranks, and count how long this one had to wait for the others. Collective."""
        begin = time.monotonic()
        total = sum_over_ranks(local)
        self.peer_wait_seconds += time.monotonic() - begin
        return total

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.deepspeed.optimizer.param_groups
        return groups

    def _forward(self, pack: PackedBatch) -> ModelOutput:
        output: ModelOutput = self.deepspeed(pack)
        return output

    def _apply(self) -> str:
        """Move the weights, unless the gradient is not finite: then nothing moves."""
        self.deepspeed.step()
        return "" if self.deepspeed.was_step_applied() else "gradient"

    def _leave_out(self) -> str:
        """Forget a step whose loss is not finite: its gradient may be finite and still wrong."""
        self.discard_gradients()
        return "loss"

    def _gradient_norm(self) -> float:
        norm = self.deepspeed.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @contextmanager
    def embedding(self) -> Iterator[Callable[[PackedBatch], Tensor]]:
        """Give a function that embeds packs: (E, D) float32 on the host, no dropout, no gradient.

        Training goes on as if it had not been called. Collective: call it on all ranks, equally
        often.
        """
        model, state = self._model(), random_state()
        heads, model.heads = model.heads, HeadsConfig(embeddings=True)
        self._outer().eval()

        def embed(pack: PackedBatch) -> Tensor:
            with torch.no_grad():
                found = self._forward(pack.to(self.device)).embeddings_ED
            assert found is not None
            return found.float().cpu()

        try:
            yield embed
        finally:
            model.heads = heads
            self._outer().train()
            restore_random_state(state)
            self._after_embedding()

    def _model(self) -> EmbeddingModel:
        model = self.module
        assert isinstance(model, EmbeddingModel)
        return model

    def _outer(self) -> nn.Module:
        """Return what `eval` and `train` are said to."""
        outer: nn.Module = self.deepspeed
        return outer

    def _after_embedding(self) -> None:
        """Put back what a forward without a backward leaves."""

    def discard_gradients(self) -> None:
        """Forget what `accumulate` left, as if it had not been called."""
        self.deepspeed.optimizer.zero_grad()  # the next backward overwrites the partitions

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
        totals = self._sum_together(local).clamp(min=1.0).tolist()  # nothing supervised: 0 / 1
        return dict(zip(names, totals, strict=True))

    def _backward(
        self, packs: Sequence[PackedBatch], factors: Mapping[str, float]
    ) -> dict[str, float]:
        """Forward and backward of a step; returns this rank's sum of each term."""
        if self.uses_grad_cache(len(packs)):
            with self._reduction(len(packs)):
                return cached_backward(
                    [pack.to(self.device) for pack in packs],
                    objective=self.objective,
                    factors=factors,
                    packs_per_chunk=self.grad_cache.packs,
                    forward=self._forward,
                    backward=self._backward_once,
                )
        groups = [packs] if self.objective.step_wide else [[pack] for pack in packs]
        totals = {name: torch.zeros((), dtype=torch.float64) for name in factors}
        with self._reduction(len(groups)):
            for index, on_host in enumerate(groups):
                group = [pack.to(self.device) for pack in on_host]
                outputs = [self._forward(pack) for pack in group]
                sums = self.objective.sums(outputs, group)
                loss = weighted_total(sums, factors)
                self._backward_once(loss, last=index == len(groups) - 1)
                for name, value in sums.items():
                    totals[name] = totals[name].to(value.device) + value.detach()
        return {name: total.item() for name, total in totals.items()}  # the host waits once

    def uses_grad_cache(self, num_packs: int) -> bool:
        """Say whether a step of so many packs a rank runs in chunks; the same on all ranks."""
        if not self.objective.step_wide or self.grad_cache.mode == "never":
            return False
        return self.grad_cache.mode == "always" or num_packs > self.grad_cache.packs

    def _backward_once(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(
            last or self.settings.reduction == "coalesce"
        )
        self.deepspeed.backward(loss)

    def _reduction(self, num_backwards: int) -> AbstractContextManager[Any]:
        """Return the context of a step's backward calls.

        `coalesce` keeps whole gradients on every rank and reduces them once, on leaving;
        `boundary` reduces after every call and keeps partitions alone.
        """
        if self.settings.reduction == "coalesce" and num_backwards > 1:
            coalesced: AbstractContextManager[Any] = self.deepspeed.coalesce_grad_reduction()
            return coalesced
        return nullcontext()

    def state_bytes(self) -> int:
        """Return how large this rank's part of a checkpoint is: weights and two moments each."""
        slices = self._slices()
        buffers = zero_state.persistent_buffers(self.module).values()
        trained = sum(part.values[zero_state.WEIGHT].nbytes for part in slices)
        return 3 * trained + sum(buffer.nbytes for buffer in buffers)

    def weights_bytes(self) -> int:
        """Return how large the whole model's weights are at a stage's end: float32, on rank 0."""
        return 4 * zero_state.num_weights(self.module)

    def live_state(self) -> shards.LiveState:
        """Return this rank's part of the state of training, good until the next optimizer step."""
        buffers = zero_state.persistent_buffers(self.module) if rank() == 0 else {}
        return shards.live_state(
            self._slices(),
            buffers=buffers,
            counters=zero_state.counters(self.deepspeed),
            rank=rank(),
            world_size=world_size(),
        )

    def load(self, folder: Path, *, written_by: int) -> None:
        """Go on from the shards in `folder`, written by `written_by` ranks. Collective.

        Raises ValueError on all ranks for a shard that cannot be read or does not fit.
        """
        info = raise_together(lambda: shards.read_info(folder, rank=0))
        with zero_state.filling(
            self.deepspeed, self.module, to=info.counters, moments=info.moments
        ) as slices:
            raise_together(
                lambda: shards.fill(
                    slices,
                    folder,
                    written_by=written_by,
                    rank=rank(),
                    world_size=world_size(),
                )
            )
        buffers = zero_state.persistent_buffers(self.module)
        raise_together(lambda: shards.fill_buffers(buffers, folder))

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """Return the whole model's weights on rank 0 (host, float32), None on the others.

        Gathers one parameter at a time. Tied weights appear once, under their first name.
        Collective: call on all ranks.
        """
        deepspeed = import_deepspeed()
        keep = torch.distributed.get_rank() == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    weights[name] = parameter.detach().float().cpu().clone()
        return weights if keep else None


def learning_rate_at(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """Learning rate of optimizer step `step`: linear warm-up, then the schedule down to 0.

    Step 0 is what was before the first one: no step, no rate. A pure function of the step, so a
    resume has no scheduler state to restore.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / max(1, config.warmup_steps)
    if config.schedule == "constant":
        return config.learning_rate
    span = max(total_steps - config.warmup_steps, 1)
    left = (total_steps - step + 1) / span  # the last step still moves
    if config.schedule == "linear":
        return config.learning_rate * left
    return config.learning_rate * 0.5 * (1.0 - math.cos(math.pi * left))


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW without decay on vectors (biases, norms); a trained scale of similarities by itself."""
    scales = [
        (m.log_scale, m.max_log_scale) for m in model.modules() if isinstance(m, SimilarityScale)
    ]
    alone = {id(scale) for scale, _ in scales}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in alone]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        *({"params": [p], "weight_decay": 0.0, _MOST: most} for p, most in scales),
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )
    if scales:
        optimizer.register_step_pre_hook(_hold_below)
    return optimizer


@torch.no_grad()
def _hold_below(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Put values that the last update has carried over their limit back on it."""
    for group in optimizer.param_groups:
        if _MOST in group:
            for parameter in group["params"]:
                parameter.clamp_(max=group[_MOST])


def _is_about_us(record: logging.LogRecord) -> bool:
    """Drop the warning that a PackedBatch is no tensor: nothing in it requires a gradient."""
    return "unknown inputs or outputs type" not in record.getMessage()


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly; on CPU keep it from compiling its shared-memory collective."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime import compiler
        from deepspeed.utils import logger

        # ZeRO-3 imports its Muon, whose @torch.compile imports the whole of inductor: 1.2 s a rank
        # for an optimizer that nobody here uses, and that runs without being compiled as well.
        wanted, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
        try:
            import deepspeed.runtime.zero.muon.original_muon
        finally:
            compiler.compile = wanted
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_about_us)
    # It is built with a C++ compiler at start, about half a minute; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
