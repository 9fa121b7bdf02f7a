"""How gradient and update divide over the parts of a model: vision, text, embeddings, new.

A rank adds up squares over what it owns; the sums of all ranks ride on the step's reduction. Read
from the optimizer's own state before it moves, so a run that was interrupted says the same.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cocoa_dist.config import OptimizerConfig
from cocoa_dist.registry.words import PARAMETER_GROUPS
from cocoa_dist.train.zero_state import WEIGHT, ParameterSlice

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"
_CHUNK = 2**24  # elements that are looked at at once: 64 MiB of float32 for each of a few tensors
_EMBEDDINGS = ("embed_tokens.", "lm_head.")
_VISION, _TEXT = ".visual.", ".language_model."
_ADAPTERS = (".lora_", "new_tokens.")

NUM_SUMS = 3 * len(PARAMETER_GROUPS)


@dataclass(frozen=True)
class LastUpdate:
    """The optimizer step before this one."""

    learning_rate: float
    steps: int  # AdamW's own count, this one included; 0: nothing has moved


def group_of(name: str) -> str:
    """Return which of PARAMETER_GROUPS a parameter belongs to.

    `new` is what the method adds to the backbone: adapters, new tokens, decoders, temperatures.
    """
    if any(part in name for part in _ADAPTERS):
        return "new"
    if any(part in name for part in _EMBEDDINGS):
        return "embeddings"
    if _VISION in name:
        return "vision"
    return "text" if _TEXT in name else "new"


def local_sums(
    gradients: Mapping[str, Tensor],
    slices: Sequence[ParameterSlice],
    *,
    last: LastUpdate,
    optimizer: OptimizerConfig,
) -> list[float]:
    """Return NUM_SUMS numbers of this rank: squares of gradients, weights, updates, by group.

    `gradients`: this rank's elements by name, before clipping. Weights and updates are those of
    the step before; both 0 where none was done. Waits for the device once.
    """
    by_group: dict[str, list[Tensor]] = {group: [] for group in PARAMETER_GROUPS}
    for name, gradient in gradients.items():
        by_group[group_of(name)].append(gradient)
    squares = [_square_sum(found) for found in by_group.values()]
    moved = _moved(slices, last=last, optimizer=optimizer)
    on = next((s.device for s in squares if s is not None), torch.device("cpu"))
    sums = [*squares, *(moved[group][0] for group in moved), *(moved[g][1] for g in moved)]
    zero = torch.zeros((), dtype=torch.float64, device=on)
    found = [zero if one is None else one.to(on) for one in sums]
    values: list[float] = torch.stack(found).tolist()
    return values


def group_health(sums: Sequence[float]) -> dict[str, float]:
    """Return fields of the record from the sums of all ranks; nothing of groups that have none."""
    if not sums:
        return {}
    count = len(PARAMETER_GROUPS)
    health = {}
    for index, group in enumerate(PARAMETER_GROUPS):
        gradient, weight, update = sums[index], sums[count + index], sums[2 * count + index]
        if gradient:  # a group that is frozen, or not there, has none
            health[f"grad_norm/{group}"] = math.sqrt(gradient) if gradient >= 0 else math.nan
        if weight:
            health[f"update_ratio/{group}"] = math.sqrt(update / weight)
    return health


def _square_sum(tensors: Iterable[Tensor]) -> Tensor | None:
    """Return the sum of squares, float64; None of nothing."""
    held = [tensor for tensor in tensors if tensor.numel()]
    if not held:
        return None
    return torch.stack(list(torch._foreach_norm(held))).double().square().sum()


def _moved(
    slices: Sequence[ParameterSlice], *, last: LastUpdate, optimizer: OptimizerConfig
) -> dict[str, list[Tensor | None]]:
    """Return by group the squares of the weights before the last update, and of the update."""
    found: dict[str, list[Tensor | None]] = {group: [None, None] for group in PARAMETER_GROUPS}
    if not last.steps:
        return found
    parts: dict[tuple[str, bool], list[ParameterSlice]] = {}
    for part in slices:
        if part.stop > part.start and _SECOND in part.values:
            parts.setdefault((group_of(part.name), len(part.shape) > 1), []).append(part)
    for (group, decays), members in parts.items():
        decay = optimizer.weight_decay if decays else 0.0
        for chunk in _chunks(members):
            squares = _update_squares(chunk, last=last, optimizer=optimizer, decay=decay)
            for index, square in enumerate(squares):
                known = found[group][index]
                found[group][index] = square if known is None else known + square
    return found


def _chunks(parts: Sequence[ParameterSlice]) -> Iterable[dict[str, Tensor]]:
    """Yield weights and moments of neighbours together, flat; a large parameter in pieces."""
    waiting: list[ParameterSlice] = []
    size = 0
    for part in parts:
        length = part.stop - part.start
        if waiting and size + length > _CHUNK:
            yield _joined(waiting)
            waiting, size = [], 0
        if length > _CHUNK:
            for begin in range(0, length, _CHUNK):
                yield {kind: value[begin : begin + _CHUNK] for kind, value in part.values.items()}
            continue
        waiting.append(part)
        size += length
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[ParameterSlice]) -> dict[str, Tensor]:
    return {kind: torch.cat([p.values[kind] for p in parts]) for kind in (WEIGHT, _FIRST, _SECOND)}


def _update_squares(
    chunk: Mapping[str, Tensor], *, last: LastUpdate, optimizer: OptimizerConfig, decay: float
) -> tuple[Tensor, Tensor]:
    """Undo AdamW's last step (arXiv 1711.05101, algorithm 2) on paper: |w before|^2, |change|^2."""
    first, second = (1.0 - beta**last.steps for beta in optimizer.betas)
    width = chunk[_SECOND].sqrt().div_(math.sqrt(second)).add_(optimizer.eps)
    by_moments = chunk[_FIRST].div(width).mul_(last.learning_rate / first)
    before = chunk[WEIGHT].add(by_moments).div_(1.0 - last.learning_rate * decay)
    change = by_moments.add_(before, alpha=last.learning_rate * decay)
    return _norm_square(before), _norm_square(change)


def _norm_square(values: Tensor) -> Tensor:
    square: Tensor = torch.linalg.vector_norm(values).double().square()
    return square
