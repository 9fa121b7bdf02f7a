"""Trying out, before the first step, what would otherwise fail in the middle of a night.

A collective, a write into the run folder, room for two checkpoints, and the fullest pack forward
and backward, as many of it as a step keeps at once, after two smaller ones have foretold its
memory. Leaves weights, gradients, optimizer and generators as they were: a run with it has the same
numbers as one without.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cocoa_dist.batch import PackedBatch
from cocoa_dist.data.fullest import Fullest
from cocoa_dist.distributed import raise_together, rank, sum_over_ranks, world_size
from cocoa_dist.runtime import random_state, restore_random_state
from cocoa_dist.train.engine import TrainEngine
from cocoa_dist.train.guards import name_records
from cocoa_dist.train.pack_memory import advice, foretell, meter

log = logging.getLogger("cocoa_dist.train")

CHECKPOINTS_IN_FLIGHT = 2  # the newest stays until the one being written is whole
_PROBE_BYTES = 64 * 1024
_GIB = 2**30
_WHAT_ELSE = (
    "Lower data.tokens_per_pack or data.patches_per_pack, set model.checkpoint_activations=true, "
    "or engine.resident_parameters=false"
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Trial:
    """What a stage's memory is tried with."""

    fullest: Callable[[Collection[int]], Fullest | None]  # the fullest pack without some records
    packs_a_step: int  # of a rank, at most
    # Packs with more tokens or more patches than that one, and so perhaps in need of more memory
    fuller: Callable[[PackedBatch], Iterable[Fullest]] = lambda first: ()
    # The fullest pack of at most so many tokens and patches
    smaller: Callable[[tuple[int, int]], Fullest | None] = lambda room: None
    budgets: tuple[int, int] = (0, 0)  # data.tokens_per_pack and data.patches_per_pack


def preflight(
    engine: TrainEngine,
    *,
    run_dir: Path,
    keep_last: int,
    trial: Trial | None,
    keeps_best: bool = False,
) -> None:
    """Try everything; rank 0 logs what it took. Collective: call on all ranks.

    `trial` is None where a stage goes on: its packs have been tried. Raises ValueError on all
    ranks, naming what failed with numbers and what to change.
    """
    begin = time.monotonic()
    check_collective()
    one, weights = checkpoint_bytes(engine), engine.weights_bytes()
    needed = CHECKPOINTS_IN_FLIGHT * one + weights
    if keeps_best:  # stays while a better one is written
        needed += one + weights
    raise_together(lambda: check_write(run_dir))
    raise_together(lambda: check_disk(run_dir, needed=needed, keep_last=keep_last))
    parts = ["collective", "checkpoint write", f"room for {needed / _GIB:.2f} GiB"]
    if trial is not None:
        held = packs_held(engine, trial.packs_a_step)
        first = trial.fullest(())
        assert first is not None, "a stage has records"
        hint = check_memory(engine, trial, first.pack, held=held)
        pack = check_fullest_pack(
            engine, lambda bad: trial.fullest(bad) if bad else first, held=held, hint=hint
        )
        for other in trial.fuller(pack):
            loss_of_pack(engine, other.pack, held=held, hint=hint)
        times = f"{held} times " if held > 1 else ""
        size = f"{pack.num_tokens} tokens, {len(pack.pixel_values)} patches"
        parts.append(f"{times}a pack of {size}")
    if rank() == 0:
        log.info("pre-flight in %.2f s: %s", time.monotonic() - begin, ", ".join(parts))


def check_collective() -> None:
    """Raise ValueError unless a sum over the ranks is right. Collective: call on all ranks."""
    size = world_size()
    found = sum_over_ranks(torch.tensor(float(rank() + 1))).item()
    expected = size * (size + 1) / 2
    if found != expected:
        raise ValueError(
            f"pre-flight: an all-reduce of 1 to {size} gave {found:g} on rank {rank()}, expected "
            f"{expected:g}: look at the network, or at two runs on one MASTER_PORT"
        )


def checkpoint_bytes(engine: TrainEngine) -> int:
    """Return the size of one checkpoint, all ranks together. Collective: call on all ranks."""
    return round(sum_over_ranks(torch.tensor(engine.state_bytes(), dtype=torch.float64)).item())


def check_write(run_dir: Path) -> None:
    """Write, sync, read back and remove a small file where checkpoints go.

    Raises ValueError if the run folder does not take it.
    """
    path = run_dir / "checkpoints" / f".preflight.rank{rank()}"
    content = bytes(range(256)) * (_PROBE_BYTES // 256)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        found = path.read_bytes()
        path.unlink()
    except OSError as error:
        raise ValueError(
            f"pre-flight: {path.parent} takes no file of {_PROBE_BYTES} bytes: {error}. Mend it, "
            "or give another --run-dir"
        ) from error
    if found != content:
        raise ValueError(
            f"pre-flight: {path} read back {len(found)} bytes unlike the {len(content)} written: "
            "do not trust this file system with checkpoints, give another --run-dir"
        )


def check_disk(run_dir: Path, *, needed: int, keep_last: int) -> None:
    """Raise ValueError unless the disk has room for the checkpoints in flight (rank 0 looks)."""
    if rank() != 0:
        return
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise ValueError(
            f"pre-flight: {run_dir} has {free / _GIB:.2f} GiB free, {CHECKPOINTS_IN_FLIGHT} "
            f"checkpoints, one with all weights, need {needed / _GIB:.2f} GiB: make room, lower "
            f"checkpoint.keep_last (now {keep_last}), or give a --run-dir on another disk"
        )


def packs_held(engine: TrainEngine, packs_a_step: int) -> int:
    """Return how many packs' activations a step keeps at once on a rank."""
    if not engine.objective.step_wide:
        return 1
    if engine.uses_grad_cache(packs_a_step):
        return min(packs_a_step, engine.grad_cache.packs)
    return packs_a_step


def check_memory(engine: TrainEngine, trial: Trial, full: PackedBatch, *, held: int) -> str:
    """Try two packs smaller than `full` and return what they say of the budgets that fit.

    Raises ValueError on all ranks if the fullest pack is foretold not to fit. Collective.
    """

    def smaller(room: tuple[int, int]) -> PackedBatch | None:
        found = trial.smaller(room)
        return None if found is None else found.pack

    found = foretell(full, smaller, lambda pack: loss_of_pack(engine, pack, held=held), by=meter())
    hint = advice(found, budgets=trial.budgets, full=full)
    if found is not None and not found.fits:
        raise ValueError(
            f"pre-flight: the largest pack of the stage ({_rows(full, held)}) would not fit "
            f"into memory: {hint}. {_WHAT_ELSE}"
        )
    return hint


def _rows(pack: PackedBatch, held: int) -> str:
    return f"{pack.num_tokens} tokens, {len(pack.pixel_values)} patches, {held} at once"


def check_fullest_pack(
    engine: TrainEngine,
    fullest: Callable[[Collection[int]], Fullest | None],
    *,
    held: int,
    hint: str = "",
) -> PackedBatch:
    """Try the fullest pack, and where its loss is not finite another one; return the first.

    If other records do, some of the first are to blame, and the guards of the steps will leave
    them out: they are named and the run goes on. Raises ValueError if no pack does, or memory does
    not suffice, with `hint`. Collective: call on all ranks.
    """
    first = fullest(())
    assert first is not None, "a stage has records"
    loss = loss_of_pack(engine, first.pack, held=held, hint=hint)
    if math.isfinite(loss):
        return first.pack
    second = fullest(first.records)
    if second is None or not math.isfinite(loss_of_pack(engine, second.pack, held=held)):
        raise ValueError(
            f"pre-flight: the loss of the largest pack of the stage ({first.pack.num_tokens} "
            f"tokens) is {loss}: are the weights the stage starts from whole, and does model.dtype "
            "hold them?"
        )
    if rank() == 0:
        log.warning(
            "pre-flight: the loss of the largest pack is %s, that of the next one is not; steps "
            "with such a record will be skipped. It is among %s of %s",
            *(loss, name_records(first.keys), first.source),
        )
    return first.pack


def loss_of_pack(engine: TrainEngine, pack: PackedBatch, *, held: int, hint: str = "") -> float:
    """Run a pack forward and backward, `held` of it at once, and forget it.

    Returns the sum of its terms over all ranks. Collective: call on all ranks. Raises ValueError
    if memory does not suffice; `hint` is what is known of budgets that do.
    """
    generators = random_state()
    try:
        terms = engine.accumulate([pack] * held)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a host it has no class
        if not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        raise ValueError(
            f"pre-flight: the largest pack of the stage ({_rows(pack, held)}) does not fit into "
            f"memory on rank {rank()}: {str(error).splitlines()[0]}. {hint}{'. ' if hint else ''}"
            f"{_WHAT_ELSE}"
        ) from error
    finally:
        restore_random_state(generators)
    engine.discard_gradients()
    local = sum(term.local_sum for term in terms.values())
    return sum_over_ranks(torch.tensor(local, dtype=torch.float64)).item()
