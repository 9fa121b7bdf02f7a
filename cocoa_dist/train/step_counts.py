"""Counts what one optimizer step does on this rank: a guard of its cost that is not a timer.

The same on every machine for the same versions of the libraries. A measuring instrument, for
benchmarks and tests: everything in the step runs many times slower.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cocoa_dist.batch import PackedBatch
from cocoa_dist.train.engine import TrainEngine
from cocoa_dist.train.resources import StepFlops
from cocoa_dist.train.traffic import counted_traffic

_SCORES = "scaled_dot_product"  # of the operators that are attention
_BACKWARD = "_backward"
_VIEWS = ("detach", "view", "alias", "t", "transpose", "permute", "expand", "slice", "select")


@dataclass
class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, their FLOPs, and the bytes of memory they take anew."""

    calls: int = 0  # without those that only look at memory in another way
    products: int = 0  # FLOPs of matrix products and convolutions
    scores: int = 0  # FLOPs of attention
    taken: int = 0  # bytes of new storages
    kinds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if func.namespace == "aten" and name not in _VIEWS:
            self.calls += 1
            self.kinds[name] = self.kinds.get(name, 0) + 1
            self.taken += _new_bytes(out, args)
            if _SCORES in name:
                self.scores += _score_flops(args, backward=name.endswith(_BACKWARD))
            elif packet in flop_registry:
                self.products += int(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        return out


def count_step(
    engine: TrainEngine, packs: Sequence[PackedBatch], *, step: int, flops: StepFlops
) -> dict[str, int]:
    """Do optimizer step `step` and return what it took, by name. Collective: call on all ranks.

    `flops` are those of the model. `kept_bytes` are what autograd keeps for the backward passes,
    a tensor that is kept twice counted twice.
    """
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with ExitStack() as stack:
        traffic = stack.enter_context(counted_traffic())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        found = stack.enter_context(_Operators())
        engine.train_step(packs, step=step)
    return {
        "packs": len(packs),
        "tokens": sum(pack.num_tokens for pack in packs),
        "patches": sum(len(pack.pixel_values) for pack in packs),
        "model_flops": round(flops.of_packs(packs)),
        "product_flops": found.products,
        "attention_flops": found.scores,
        "operators": found.calls,
        "taken_bytes": found.taken,
        "kept_bytes": kept,
        **{f"{kind}_calls": calls for kind, calls in sorted(traffic.calls.items())},
        **{f"{kind}_bytes": size for kind, size in sorted(traffic.bytes.items())},
    }


def _score_flops(args: tuple[Any, ...], *, backward: bool) -> int:
    """FLOPs of attention over whole rectangles of (query, key) pairs; 4 a pair, 8 backward."""
    q, k = args[1:3] if backward else args[:2]
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return (8 if backward else 4) * int(pairs) * int(q.shape[3])


def _new_bytes(out: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes of storages among the outputs that are none of the inputs'."""
    known = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return sum(t.nbytes for t in _tensors(out) if t.untyped_storage()._cdata not in known)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
