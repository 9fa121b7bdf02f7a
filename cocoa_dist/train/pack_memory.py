"""Whether the fullest pack will fit into memory, foretold from two smaller ones.

What a pack takes grows with its rows: no mask, no padding, nothing squared but within a sample. So
two small packs give a line, and the line says which budget fits before anything runs out. A host
does not raise when it runs out, it kills.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from cocoa_dist.batch import PackedBatch
from cocoa_dist.distributed import gather_objects, local_world_size, training_device
from cocoa_dist.train.residency import host_bytes

SHARES = (0.25, 0.5)  # of the fullest pack, that are tried first
_ROOM_USED = 0.95  # by a budget that is named: allocators lose a little to gaps
_STEP = 64  # budgets are named in multiples of so many tokens
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GIB = 2**30


class Meter(Protocol):
    """Measures this process's memory on the device it trains on."""

    def begin(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int:
        """Return the most bytes in use since `begin`."""

    def room(self) -> int:
        """Return how many bytes this process can have in use at most."""


class GpuMeter:
    """Torch's own numbers for a GPU."""

    def begin(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the most bytes that tensors have taken."""
        return int(torch.cuda.max_memory_allocated())

    def room(self) -> int:
        """Return what is free, and what torch holds."""
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved())


class HostMeter:
    """The process's resident memory, by Linux."""

    def begin(self) -> None:
        """Forget the peak so far."""
        _CLEAR.write_text("5")

    def peak(self) -> int:
        """Return the most resident bytes."""
        return self._status("VmHWM")

    def room(self) -> int:
        """Return what the process has, and its share of what is free."""
        return self._status("VmRSS") + host_bytes() // local_world_size()

    @staticmethod
    def _status(key: str) -> int:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def meter() -> Meter | None:
    """Return what measures memory here; None where the system does not say."""
    if training_device().type == "cuda":
        return GpuMeter()
    try:
        found = HostMeter()
        found.begin()
        found.peak(), found.room()
    except (OSError, StopIteration, ValueError):
        return None
    return found


@dataclass(frozen=True)
class Foretold:
    """A line through what packs took: bytes of a rank by share of the fullest pack."""

    fixed: float  # weights, gradients, optimizer, buffers
    whole: float  # what the fullest pack adds to it
    room: float

    @property
    def fits(self) -> bool:
        """Whether the fullest pack is expected to fit."""
        return self.fixed + self.whole <= self.room

    @property
    def share(self) -> float:
        """The largest share of the fullest pack that surely fits; 0 if none does."""
        left = _ROOM_USED * self.room - self.fixed
        return max(0.0, left / self.whole) if self.whole > 0 else 1.0

    @staticmethod
    def through(shares: tuple[float, float], peaks: tuple[int, int], *, room: int) -> "Foretold":
        """Lay the line through two packs."""
        slope = (peaks[1] - peaks[0]) / (shares[1] - shares[0])
        slope = max(slope, 0.0)  # of packs so small that the allocator's pages hide them
        return Foretold(fixed=peaks[1] - slope * shares[1], whole=slope, room=room)


def foretell(
    full: PackedBatch,
    smaller: Callable[[tuple[int, int]], PackedBatch | None],
    run: Callable[[PackedBatch], object],
    *,
    by: Meter | None,
) -> Foretold | None:
    """Run two packs smaller than `full`, and foretell what it takes; the worst of all ranks.

    `smaller` makes a pack of at most so many tokens and patches. None where no smaller pack can be
    made, or memory cannot be measured. Collective: call on all ranks.
    """
    rows = (full.num_tokens, len(full.pixel_values))
    packs = [smaller((int(s * rows[0]), int(s * rows[1]))) for s in SHARES]
    if not all(gather_objects(by is not None)) or by is None:
        return None
    shares, peaks = [], []
    for pack in packs:
        if pack is None:  # the same on all ranks
            return None
        by.begin()
        run(pack)
        peaks.append(by.peak())
        shares.append((pack.num_tokens / rows[0] + len(pack.pixel_values) / rows[1]) / 2)
    if shares[1] <= shares[0]:
        return None
    here = Foretold.through((shares[0], shares[1]), (peaks[0], peaks[1]), room=by.room())
    everywhere: list[Foretold] = gather_objects(here)
    return min(everywhere, key=lambda one: one.share)


def advice(found: Foretold | None, *, budgets: tuple[int, int], full: PackedBatch) -> str:
    """Name the largest budgets that fit; empty where that is not known.

    `budgets`: data.tokens_per_pack and data.patches_per_pack as they are.
    """
    if found is None:
        return ""
    rows = (full.num_tokens, len(full.pixel_values))
    tokens, patches = (int(found.share * min(b, r)) for b, r in zip(budgets, rows, strict=True))
    numbers = (
        f"{(found.fixed + found.whole) / _GIB:.2f} GiB are needed, {found.fixed / _GIB:.2f} GiB of "
        f"them whatever the pack is, {found.room / _GIB:.2f} GiB are there"
    )
    if found.share >= 1.0:
        return numbers
    if tokens < _STEP:
        return f"{numbers}: no pack fits"
    tokens -= tokens % _STEP
    return (
        f"{numbers}: the largest that fits is data.tokens_per_pack={tokens} "
        f"data.patches_per_pack={patches}"
    )
