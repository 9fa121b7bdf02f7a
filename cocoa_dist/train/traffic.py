"""Counts what the ranks send each other, DeepSpeed's collectives and our own, while it is entered.

A measuring instrument: it replaces functions of torch.distributed and methods of DeepSpeed's
backend for a while, so it is for benchmarks and tests, not for runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

_GATHERS = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")
_REDUCTIONS = ("reduce_scatter_tensor", "reduce_scatter", "all_reduce", "broadcast")


@dataclass
class Traffic:
    """Calls and bytes of each kind of collective, on this rank.

    The bytes are of the whole tensor: what all ranks together gather or reduce in a call.
    """

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def sent(self, world_size: int) -> int:
        """Return the bytes this rank sends with ring algorithms.

        (N - 1) / N of a tensor that is gathered or scattered, twice that for an all-reduce.
        """
        passes = {"all_reduce": 2}
        whole = sum(passes.get(kind, 1) * size for kind, size in self.bytes.items())
        return whole * (world_size - 1) // world_size

    def count(self, kind: str, size: int) -> None:
        """Add one call."""
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.bytes[kind] = self.bytes.get(kind, 0) + size


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count the collectives that this process calls in the block."""
    from deepspeed.comm.torch import TorchBackend

    traffic, inside = Traffic(), [False]

    def counted(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:  # DeepSpeed's method calls torch's function
                return function(*args, **kwargs)
            inside[0] = True
            try:
                traffic.count(kind, _largest([*args, *kwargs.values()]))
                return function(*args, **kwargs)
            finally:
                inside[0] = False

        return call

    owners = [(owner, kind) for owner in (dist, TorchBackend) for kind in _GATHERS + _REDUCTIONS]
    kept = [(owner, kind, getattr(owner, kind)) for owner, kind in owners if hasattr(owner, kind)]
    for owner, kind, function in kept:
        setattr(owner, kind, counted(function, kind))
    try:
        yield traffic
    finally:
        for owner, kind, function in kept:
            setattr(owner, kind, function)


def _largest(arguments: list[Any]) -> int:
    """Return the bytes of the largest tensor, or list of tensors, among the arguments."""
    sizes = [0]
    for argument in arguments:
        tensors = argument if isinstance(argument, list | tuple) else [argument]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))
    return max(sizes)
