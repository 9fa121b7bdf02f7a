"""Process group start and stop, rank helpers, and the few collectives the project needs.

Everything here works with one process and no group as well. Each function that contains a
collective says so; every rank must reach it on every path.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cocoa_dist.runtime import adopt_ranks

T = TypeVar("T")

_patience: timedelta | None = None  # of the process group; None: torch's


@dataclass(frozen=True)
class World:
    """One process among the others, as the launcher described it in the environment."""

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def from_environment() -> "World":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; one process if they are unset.

        Ranks that srun started get them from SLURM's variables, and set them for libraries.
        """
        adopt_ranks()
        return World(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


def training_device() -> torch.device:
    """Return where this process trains: a GPU of its own if there is one, else the CPU.

    A process that sees several takes that of its local rank. DS_ACCELERATOR=cpu leaves them unused.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def start(*, timeout_seconds: int) -> World:
    """Join the process group of the launcher; a lone process gets a group of its own.

    Numbers on the host travel by gloo, tensors on a GPU by NCCL. Collective: call on all ranks.
    """
    world = World.from_environment()
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        for name in ("RANK", "LOCAL_RANK"):
            os.environ.setdefault(name, "0")
        os.environ.setdefault("WORLD_SIZE", "1")
    device, backend = training_device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by it DeepSpeed finds the device
        backend = "cpu:gloo,cuda:nccl"
    global _patience
    limit = _patience = timedelta(seconds=timeout_seconds)
    if world.size == 1:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    else:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=limit)
    return world


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Return the number of this run's processes on this machine, as the launcher said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def num_nodes() -> int:
    """Return the number of machines; 1 where they do not have equally many processes."""
    nodes, left = divmod(world_size(), local_world_size())
    return nodes if not left else 1


def sum_over_ranks(values: Tensor, *, group: Any = None) -> Tensor:
    """Return the sum over all ranks, without gradient. Collective: call on all ranks."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total, group=group)
    return total


def barrier() -> None:
    """Wait for all ranks. Collective: call on all ranks."""
    if world_size() > 1:
        dist.barrier()


def own_group() -> Any:
    """Return a gloo group of all ranks for one subject's messages, as patient as the first one.

    Collective: call on all ranks.
    """
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=_patience)


def gather_objects(value: Any, *, group: Any = None) -> list[Any]:
    """Return every rank's (small, picklable) value, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


class Exchange:
    """Every rank's short text, sent at once and read later: nobody waits in between.

    Read after a step that all ranks have done in between, it is there already.
    """

    def __init__(self, text: str, *, max_bytes: int, group: Any = None) -> None:
        """Send `text`, at most `max_bytes` of UTF-8. Collective: call on all ranks."""
        raw = text.encode()
        if len(raw) > max_bytes:
            raise ValueError(f"a message of {len(raw)} bytes, expected at most {max_bytes}")
        sent = torch.zeros(max_bytes, dtype=torch.uint8)
        sent[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self._parts, self._work = [sent], None
        if world_size() > 1:
            self._parts = [torch.empty_like(sent) for _ in range(world_size())]
            self._work = dist.all_gather(self._parts, sent, group=group, async_op=True)

    def read(self) -> list[str]:
        """Return every rank's text, in rank order; waits for those that have not sent theirs."""
        if self._work is not None:
            self._work.wait()
        return [part.numpy().tobytes().rstrip(b"\0").decode() for part in self._parts]


def raise_together(work: Callable[[], T]) -> T:
    """Return what `work` gives; what any rank raises is raised on all. Collective.

    A rank that left alone would be waited for by the others. ValueError and OSError, of bad input,
    become a ValueError that names the rank; any other error is raised as it is where it happened,
    and as a RuntimeError elsewhere.
    """
    fault: tuple[str, bool] | None = None  # and whether it is of the input
    own: Exception | None = None
    result = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        fault = f"rank {rank()}: {error}", True
    except Exception as error:
        own, fault = error, (f"rank {rank()}: {type(error).__name__}: {error}", False)
    faults = [found for found in gather_objects(fault) if found]
    if own is not None:
        raise own
    for text, of_input in faults:
        raise ValueError(text) if of_input else RuntimeError(text)
    return cast(T, result)


def gather_rows(local: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order, without gradient. Collective."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    """Gather along dimension 0; the gradient is the sum of what all ranks ask of our rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        return gather_rows(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        begin = rank() * ctx.rows
        return total[begin : begin + ctx.rows]


def all_gather_with_grad(local: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order: (n, ...) -> (n x ranks, ...).

    The backward pass sums over ranks, so that with DeepSpeed's mean over ranks and the engine's
    factor of world size the gradient is that of the global loss. Collective, forward and
    backward: call on all ranks, with equal shapes.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _AllGather.apply(local)  # type: ignore[no-untyped-call]
    return gathered
