"""Whether every rank keeps all weights gathered between steps, and what that takes.

Resident weights are gathered once a step instead of in every forward and backward pass; each rank
pays with memory for a whole copy. A rule, because the right answer is a matter of numbers.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from cocoa_dist.distributed import (
    gather_objects,
    local_world_size,
    rank,
    training_device,
    world_size,
)

log = logging.getLogger("cocoa_dist.train")

STATE_SHARE = 0.5  # of the memory, for weights, gradients and optimizer; the rest for activations
_MASTER_AND_MOMENTS = 12  # bytes a trained parameter: float32 weight and two AdamW moments
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_GIB = 2**30


@dataclass(frozen=True)
class Residency:
    """Whether weights stay gathered, and the numbers that say why."""

    resident: bool
    reason: str


def decide_residency(choice: Literal["auto"] | bool, model: nn.Module) -> Residency:
    """Decide for a model that is not partitioned yet; rank 0 logs it. Collective for `auto`.

    All ranks decide alike, by the one with the least memory.
    """
    needed = resident_bytes(model, world_size=world_size())
    available = min(gather_objects(available_bytes() if choice == "auto" else 0))
    found = residency_for(choice, needed=needed, available=available)
    if rank() == 0:
        log.info("%s", found.reason)
    return found


def residency_for(choice: Literal["auto"] | bool, *, needed: int, available: int) -> Residency:
    """Apply the rule to numbers of bytes a rank."""
    if choice != "auto":
        word = "stay resident" if choice else "are gathered when they are used"
        return Residency(choice, f"weights {word}: engine.resident_parameters is {choice}")
    room = int(STATE_SHARE * available)
    numbers = (
        f"resident weights, gradients and optimizer state need {needed / _GIB:.2f} GiB a rank, "
        f"{room / _GIB:.2f} GiB of {available / _GIB:.2f} GiB available are for them"
    )
    if needed <= room:
        return Residency(True, f"weights stay resident: {numbers}")
    return Residency(False, f"weights are gathered when they are used: {numbers}")


def resident_bytes(model: nn.Module, *, world_size: int) -> int:
    """Return what a rank holds when weights are resident: all of them, and its share of state."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = sum(p.numel() * (2 * p.element_size() + _MASTER_AND_MOMENTS) for p in trained)
    return whole + -(-sharded // world_size)


def available_bytes() -> int:
    """Return this rank's share of the memory that is free now: of its GPU, or of the host."""
    if training_device().type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return host_bytes() // local_world_size()


def host_bytes(*, cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Return the host memory that can still be taken: the least of the machine's and the cgroup's.

    Raises ValueError where the system says neither (then the recipe has to decide).
    """
    limits = [
        found
        for found in (
            _machine_bytes(meminfo),
            _cgroup_bytes(cgroup / "memory.max", cgroup / "memory.current"),
            _cgroup_bytes(
                cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes"
            ),
        )
        if found is not None
    ]
    if not limits:
        raise ValueError(
            f"neither {meminfo} nor {cgroup} says how much memory is free; set "
            "engine.resident_parameters to true or false instead of auto"
        )
    return min(limits)


def _machine_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # the file counts in KiB
    return None


def _cgroup_bytes(limit: Path, usage: Path) -> int | None:
    """Return limit - usage; None without a limit ("max") or without such files."""
    try:
        return max(int(limit.read_text()) - int(usage.read_text()), 0)
    except (OSError, ValueError):
        return None
