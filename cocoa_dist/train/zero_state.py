"""What ZeRO-3 keeps on this rank, parameter by parameter; with engine.py all that knows DeepSpeed.

A rank owns one slice of every trained parameter: float32 weight and AdamW moments. They are given
as views of DeepSpeed's own memory, so that saving is a copy out of them and loading a copy into
them, on any number of ranks. Frozen parameters are not part of it: their base is read anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = "weight"  # the float32 one that the optimizer moves
_STEP = "step"


@dataclass(frozen=True)
class ParameterSlice:
    """A rank's part of one trained parameter: elements [start, stop) of it, flattened."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    stop: int
    values: Mapping[str, Tensor]  # kind -> live view (stop - start,): WEIGHT and the moments


@dataclass(frozen=True)
class Counters:
    """Where the engine stands; equal on all ranks."""

    optimizer_steps: int  # AdamW's own count, for its bias correction; 0: it has no moments yet
    global_steps: int
    global_samples: int
    skipped_steps: int

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)


def refuse_swapped_state(deepspeed: Any) -> None:
    """Raise ValueError if parts of the state lie on NVMe, where no view of them can be had."""
    if deepspeed.optimizer.swap_optimizer or deepspeed.zero_nvme_offload_optimizer():
        raise ValueError(
            "the DeepSpeed configuration offloads to NVMe, which checkpoints do not cover; use "
            'offload_optimizer.device "cpu" (see ds_configs/zero3_offload.json)'
        )


def parameter_slices(deepspeed: Any, module: nn.Module) -> tuple[ParameterSlice, ...]:
    """Return the slices of this rank, in the order of the model's parameters."""
    zero = deepspeed.optimizer
    found = []
    parameter: Any  # DeepSpeed has added attributes
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        # All parts have equal lengths, the last ones are padded: what lies behind is no weight.
        numel = int(parameter.ds_numel)
        start = min(zero._get_param_partition_rank(parameter) * length, numel)
        stop = min(start + length, numel)
        flat = zero.fp32_partitioned_groups_flat[group]
        kept = {WEIGHT: flat.detach(), **_moments(zero.optimizer.state.get(flat, {}))}
        values = {kind: value[offset : offset + stop - start] for kind, value in kept.items()}
        found.append(ParameterSlice(name, tuple(parameter.ds_shape), start, stop, values))
    return tuple(found)


def gradient_slices(deepspeed: Any, module: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each slice of this rank, flat, after the backward pass; live views.

    What pads the last rank's slices is zero.
    """
    zero = deepspeed.optimizer
    return {
        name: zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)[0]
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def counters(deepspeed: Any) -> Counters:
    """Return where the engine stands."""
    zero = deepspeed.optimizer
    steps = {int(zero.optimizer.state.get(f, {}).get(_STEP, 0)) for f in _flats(zero)}
    assert len(steps) == 1, f"parts of the optimizer stand at different steps: {sorted(steps)}"
    return Counters(
        optimizer_steps=steps.pop(),
        global_steps=int(deepspeed.global_steps),
        global_samples=int(deepspeed.global_samples),
        skipped_steps=int(deepspeed.skipped_steps),
    )


@contextmanager
def filling(
    deepspeed: Any, module: nn.Module, *, to: Counters, moments: Sequence[str]
) -> Iterator[tuple[ParameterSlice, ...]]:
    """Give the slices to be overwritten; afterwards the model computes with what they hold.

    Collective: call on all ranks; an error inside must be raised on all of them.
    """
    zero = deepspeed.optimizer
    zero.checkpoint_event_prologue()  # no parameter stays gathered
    defaults = zero.optimizer.defaults
    counts_there = defaults.get("fused") or defaults.get("capturable")  # else on the host
    for flat in _flats(zero):
        state: dict[str, Any] = {}
        if to.optimizer_steps:
            state = {kind: torch.zeros_like(flat, requires_grad=False) for kind in moments}
            device = flat.device if counts_there else None
            state[_STEP] = torch.tensor(float(to.optimizer_steps), device=device)
        zero.optimizer.state[flat] = state
    yield parameter_slices(deepspeed, module)
    pairs = zip(_flats(zero), zero.fp16_partitioned_groups_flat, strict=True)
    for index, (flat, computed) in enumerate(pairs):
        computed.data.copy_(flat.data)  # float32 to the dtype of the forward
        zero._unflatten_partitioned_parameters(index)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()  # and those that are always gathered are so again
    deepspeed.global_steps = to.global_steps
    deepspeed.global_samples = to.global_samples
    deepspeed.skipped_steps = to.skipped_steps


def num_weights(module: nn.Module) -> int:
    """Return how many weights the whole model has, wherever they are; tied ones count once."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the model's buffers that belong to its state (live)."""
    known = dict(module.named_buffers())
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return {name: value for name, value in known.items() if name not in passing}


def _flats(zero: Any) -> list[Tensor]:
    flats: list[Tensor] = zero.fp32_partitioned_groups_flat
    return flats


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the optimizer's tensors that have a value per weight (its step count has not)."""
    return {
        kind: v for kind, v in state.items() if isinstance(v, Tensor) and re.match("exp_", kind)
    }
