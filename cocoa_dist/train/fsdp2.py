"""The engine over torch's fully_shard (FSDP2): an oracle for the one over DeepSpeed.

Same steps, same checkpoints, other machinery: what both compute is right, or wrong twice in the
same way. Every layer of the text model and the vision tower is gathered for itself.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.distributed import raise_together, rank, world_size
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.train import shards
from cocoa_dist.train.engine import TrainEngine, adamw
from cocoa_dist.train.zero_state import WEIGHT, Counters, ParameterSlice, persistent_buffers

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fsdp2Engine(TrainEngine):
    """FSDP2 around one model and one objective."""

    def _wrap(self, model: nn.Module, *, mechanics: Mapping[str, Any], dtype: str) -> None:
        """Shard the model; `mechanics` are DeepSpeed's and not read."""
        keep = self.residency.resident
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (world_size(),)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if dtype == "bfloat16" else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
        }
        core: Any = model.core
        for part in [*core.language_model.layers, *core.visual.blocks, model]:
            _receive(part)
            part.float()  # the sharded copy is the one the optimizer moves
            fully_shard(part, reshard_after_forward=not keep, **options)
        self.model: Any = model.train()
        self.optimizer = adamw(model, self.optimizer_config)
        self.steps_taken = self.steps_skipped = 0
        self._norm = math.nan

    @property
    def module(self) -> nn.Module:
        """The wrapped model; its parameters are DTensors."""
        module: nn.Module = self.model
        return module

    def _outer(self) -> nn.Module:
        return self.module

    def _after_embedding(self) -> None:
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # the whole of it would stay gathered until a backward

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _forward(self, pack: PackedBatch) -> ModelOutput:
        output: ModelOutput = self.model(pack)
        return output

    def _backward_once(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_requires_gradient_sync(last or self.settings.reduction == "boundary")
        loss.backward()  # type: ignore[no-untyped-call]

    def _reduction(self, num_backwards: int) -> AbstractContextManager[Any]:
        return nullcontext()  # gradients that are not reduced wait whole until the last backward

    def _apply(self) -> str:
        norm: Any = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.optimizer_config.max_grad_norm
        )
        self._norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(self._norm):
            self.discard_gradients()
            self.steps_skipped += 1
            return "gradient"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_taken += 1
        return ""

    def _gradient_norm(self) -> float:
        return self._norm

    def discard_gradients(self) -> None:
        """Forget what `accumulate` left, as if it had not been called."""
        self.optimizer.zero_grad(set_to_none=True)

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """Return the whole model's weights on rank 0 (host, float32), None on the others.

        Collective: call on all ranks.
        """
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            whole = parameter.detach().full_tensor()
            if rank() == 0:
                weights[name] = whole.float().cpu().clone()
        return weights if rank() == 0 else None

    def state_bytes(self) -> int:
        """Return how large this rank's part of a checkpoint is: weights and two moments each."""
        trained = sum(part.values[WEIGHT].nbytes for part in self._slices())
        return 3 * trained + sum(b.nbytes for b in persistent_buffers(self.module).values())

    def live_state(self) -> shards.LiveState:
        """Return this rank's part of the state of training, good until the next optimizer step."""
        buffers = persistent_buffers(self.module) if rank() == 0 else {}
        steps = Counters(
            optimizer_steps=self._optimizer_steps(),
            global_steps=self.steps_taken + self.steps_skipped,
            global_samples=0,
            skipped_steps=self.steps_skipped,
        )
        return shards.live_state(
            self._slices(),
            buffers=buffers,
            counters=steps,
            rank=rank(),
            world_size=world_size(),
        )

    def load(self, folder: Path, *, written_by: int) -> None:
        """Go on from the shards in `folder`, written by `written_by` ranks. Collective.

        They may be the other engine's. Raises ValueError on all ranks for a shard that cannot be
        read or does not fit.
        """
        info = raise_together(lambda: shards.read_info(folder, rank=0))
        counters = info.counters
        if counters.optimizer_steps:
            for parameter in self._trained().values():
                self._begin_state(parameter, step=counters.optimizer_steps)
        raise_together(
            lambda: shards.fill(
                self._slices(),
                folder,
                written_by=written_by,
                rank=rank(),
                world_size=world_size(),
            )
        )
        raise_together(lambda: shards.fill_buffers(persistent_buffers(self.module), folder))
        self.steps_skipped = counters.skipped_steps
        self.steps_taken = counters.global_steps - counters.skipped_steps

    def _trained(self) -> dict[str, Any]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _gradients(self) -> Mapping[str, Tensor]:
        """Return this rank's elements of every gradient, flat; before clipping."""
        trained = self._trained().items()
        return {name: _flat(p.grad) for name, p in trained if p.grad is not None}

    def _optimizer_steps(self) -> int:
        states = [self.optimizer.state.get(p, {}) for p in self._trained().values()]
        return max((int(state["step"]) for state in states if state), default=0)

    def _begin_state(self, parameter: Any, *, step: int) -> None:
        self.optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{kind: torch.zeros_like(parameter) for kind in MOMENTS},
        }

    def _slices(self) -> Sequence[ParameterSlice]:
        """Return this rank's rows of every trained parameter, as views of the live tensors."""
        steps = self._optimizer_steps()
        found = []
        for name, parameter in self._trained().items():
            if steps and not self.optimizer.state.get(parameter):  # no gradient has come so far
                self._begin_state(parameter, step=steps)
            state = self.optimizer.state.get(parameter, {})
            tensors = {WEIGHT: parameter, **{k: state[k] for k in MOMENTS if k in state}}
            start, stop = _range(parameter)
            values = {kind: _flat(tensor) for kind, tensor in tensors.items()}
            found.append(ParameterSlice(name, tuple(parameter.shape), start, stop, values))
        return found


def _receive(module: nn.Module) -> None:
    """Fill what is not sharded yet from rank 0: the others may have built no weights."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            torch.distributed.broadcast(parameter.detach(), 0)


def _range(parameter: DTensor) -> tuple[int, int]:
    """Return which elements of the flattened parameter are here: rows are dealt in even chunks."""
    rows = parameter.shape[0]
    chunk = -(-rows // world_size())
    row = parameter.numel() // rows
    begin = min(rank() * chunk, rows)
    end = min(begin + chunk, rows)
    return begin * row, end * row


def _flat(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local()
    return local.detach().view(-1)
