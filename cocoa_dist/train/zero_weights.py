"""Weights that ZeRO-3 or FSDP2 has cut up, without an engine: whole for a moment, or cut up anew.

Needs no optimizer and no gradients. Every function is collective where weights are cut up.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cocoa_dist.train.engine import import_deepspeed

_M_MMAP_THRESHOLD = -3  # malloc.h
_MAPPED_FROM = 2**20  # bytes


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter as the model has it, whatever of it is on this rank."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Give parameters whole, on the host; their memory is given back on leaving.

    Collective where they are cut up: call on all ranks, for the same ones.
    """
    if any(_is_elsewhere(parameter) for parameter in parameters):
        with import_deepspeed().zero.GatheredParameters(list(parameters)):
            yield [parameter.detach().cpu() for parameter in parameters]
        return
    yield [_whole(parameter).cpu() for parameter in parameters]


def _is_elsewhere(parameter: Any) -> bool:
    """Whether this rank's share is on a disk, which DeepSpeed alone reads."""
    return hasattr(parameter, "ds_id") and parameter.ds_tensor.status.name != "AVAILABLE"


@torch.no_grad()
def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE":
        return _joined(parameter)
    value: Tensor = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _joined(parameter: Any) -> Tensor:
    """Put the shares of all ranks together, in one copy: DeepSpeed's way has two on a CPU."""
    share: Tensor = parameter.ds_tensor.detach()
    group = parameter.ds_process_group
    ranks = dist.get_world_size(group)
    parts = share.new_empty((ranks, share.numel()))
    if share.is_cuda:
        dist.all_gather_into_tensor(parts, share, group=group)
    else:  # gloo gathers into a copy; what it broadcasts stays where it is
        parts[dist.get_rank(group)].copy_(share)
        for number, part in enumerate(parts):
            dist.broadcast(part, src=dist.get_global_rank(group, number), group=group)
    whole: Tensor = parts.view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
    return whole


def give_freed_memory_back() -> None:
    """Have large blocks of memory mapped by themselves from now on, so that freeing returns them.

    glibc takes blocks up to 32 MB from its heap once it has freed one of that size. Shares of a
    layer that stay between whole tensors that go then leave holes nothing fits in: 2B in bfloat16,
    cut in two, took 4 to 5 GB a rank in place of 2.1. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


def cut_up(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor] | None,
    *,
    dtype: torch.dtype,
) -> None:
    """Put weights of rank 0 in the place of some parameters of `model`, cut up as ZeRO-3 does.

    `weights`: whole tensors by the names in `parameters`, on rank 0 alone (None elsewhere). No
    more than these is in memory whole. Parameters shared by modules stay shared. Collective: call
    on all ranks.
    """
    new: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in parameters.items():
        empty = torch.empty(parameter.shape, dtype=dtype)
        value = empty if weights is None else weights[name].to(dtype)
        new[parameter] = nn.Parameter(value, requires_grad=False)
    holder = nn.ParameterList(new.values())
    for module in model.modules():
        for attribute, found in module._parameters.items():
            if found is not None and found in new:
                module._parameters[attribute] = new[found]
    import_deepspeed().zero.Init(module=holder, dtype=dtype)  # broadcasts from rank 0, and cuts
