"""Saves and loads the checkpoints of one stage while the stage goes on training.

A save copies this rank's state to the host, which is all that training waits for; a thread writes,
hashes and syncs it. At later step boundaries the ranks tell each other how far they are, on a group
of their own and from the main thread alone; when all have written, rank 0's thread commits. A save
that fails is reported and tried again; older checkpoints are never touched before a newer one is
whole.
"""

import hashlib
import io
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cocoa_dist import distributed
from cocoa_dist import manifest as manifests
from cocoa_dist.config import AdapterConfig
from cocoa_dist.distributed import gather_objects, rank, sum_over_ranks, world_size
from cocoa_dist.manifest import FileEntry, Manifest
from cocoa_dist.metrics import JsonLines
from cocoa_dist.model.adapter import merge_adapter
from cocoa_dist.runtime import Fence, random_state, restore_random_state, seed_everything
from cocoa_dist.train import commit as commits
from cocoa_dist.train import shards
from cocoa_dist.train.commit import Fault, SaveError
from cocoa_dist.train.engine import TrainEngine
from cocoa_dist.train.verify import find_newest_whole

__all__ = ["WEIGHTS_NAME", "Checkpointer", "Found", "SaveError"]

log = logging.getLogger("cocoa_dist.train")

WEIGHTS_NAME = "weights.safetensors"
RECIPE_NAME = "resolved.yaml"
_LOOK_SECONDS = 0.2  # between two looks at a save that is waited for


@dataclass(frozen=True)
class Found:
    """Where a stage can go on: the newest whole checkpoint, if there is one."""

    folder: Path | None
    manifest: Manifest | None
    notes: tuple[str, ...]  # newer checkpoints that could not be used, and why


@dataclass(frozen=True)
class SaveNumbers:
    """What saving cost since the last look."""

    blocked_seconds: float  # training stood still: copies, looks at boundaries, waiting
    seconds: float | None  # from the copy to the rename, of the save that was committed
    waited: int  # saves of this incarnation that had to wait for the one before


@dataclass(frozen=True)
class _Part:
    """What this rank did for a save, or why it could not."""

    files: tuple[FileEntry, ...] = ()
    fault: Fault | None = None


class _Job:
    """One piece of work in a thread; a fault is kept for the ranks to agree on."""

    def __init__(self, work: Callable[["_Job"], tuple[FileEntry, ...]]) -> None:
        self.part: _Part | None = None
        self.bytes = 0  # written so far
        self._work = work
        # A thread, not a process: hashing and writing release the interpreter lock, the copy need
        # not be in shared memory, and it dies with its rank. Training is as fast beside either
        # (benchmarks/checkpoint_cpu.md, last column).
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.part = _Part(files=self._work(self))
        except Exception as error:  # carried to the main thread, which raises or tries again
            self.part = _Part(fault=Fault.of(error))

    def counted(self, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            yield chunk
            self.bytes += len(chunk)

    def join(self, *, timeout: float) -> None:
        self._thread.join(timeout)


@dataclass
class _Pending:
    """A save on its way: first every rank writes, then rank 0 commits."""

    staging: Path
    final: Path
    manifest: Manifest
    job: _Job
    committing: bool = False
    began: float = field(default_factory=time.monotonic)


class Checkpointer:
    """Saves, finds and loads the checkpoints of one stage. Collective: make it on all ranks."""

    def __init__(
        self,
        run_dir: Path,
        *,
        stage: str,
        keep_last: int,
        adapter: AdapterConfig | None = None,
        max_failed_saves: int = 3,
        recipe: str = "",
    ) -> None:
        """`adapter`: what the stage trains, merged into the weights at its end.

        `recipe`: the resolved one, which goes into each checkpoint.
        """
        self.run_dir, self.stage, self.keep_last = run_dir, stage, keep_last
        self.adapter, self.max_failed_saves, self.recipe = adapter, max_failed_saves, recipe
        self.root = run_dir / "checkpoints" / stage
        self.fence = Fence(run_dir)
        self.must_retry = False  # the last save failed: save again at the next boundary
        self.on_progress: Callable[[], None] = lambda: None  # called while a save gets on
        self.on_saved: Callable[[Path], None] = lambda folder: None
        self.on_failed: Callable[[str], None] = lambda reason: None
        self._group = distributed.own_group()
        self._host = shards.HostCopy()
        self._refused: frozenset[str] = frozenset()
        self._pending: _Pending | None = None
        self._attempts = self._failures = self._waited = self._moved = 0
        self._blocked = 0.0
        self._seconds: float | None = None

    def prepare(self, engine: TrainEngine) -> None:
        """Get the host memory of the saves before the first of them is due."""
        self._host.reserve(engine.state_bytes())

    def begin(
        self, engine: TrainEngine, manifest: Manifest, *, logs: Sequence[JsonLines] = ()
    ) -> None:
        """Start a save; training goes on when the copy is made. Collective: call on all ranks.

        `logs` are made durable before the manifest: a checkpoint never knows more than the record.
        Waits for a save that is still running. Raises SaveError on every rank as `poll` does.
        """
        started = time.monotonic()
        if self._pending is not None:
            self._waited += 1
            self._settle()
        self.must_retry = False
        self._attempts += 1
        final = manifests.step_folder(self.run_dir, stage=self.stage, step=manifest.step)
        staging = commits.staging_folder(
            self.root, final, epoch=self.fence.epoch, attempt=self._attempts
        )
        write = self._writer(engine, staging, logs=logs, with_weights=manifest.complete)
        self._pending = _Pending(staging, final, manifest, _Job(write), began=started)
        self._blocked += time.monotonic() - started

    def poll(self) -> None:
        """Take a running save as far as it goes without waiting. Collective: call on all ranks.

        Raises SaveError on every rank if saves failed too often, or another try is of no use.
        """
        if self._pending is not None:
            started = time.monotonic()
            self._advance()
            self._blocked += time.monotonic() - started

    def save(
        self, engine: TrainEngine, manifest: Manifest, *, logs: Sequence[JsonLines] = ()
    ) -> Path:
        """Save and wait until it is committed; return its folder. Collective: call on all ranks.

        Tries again what fails. Raises SaveError on every rank as `poll` does.
        """
        while True:
            self.begin(engine, manifest, logs=logs)
            started = time.monotonic()
            self._settle()
            self._blocked += time.monotonic() - started
            if not self.must_retry:
                return manifests.step_folder(self.run_dir, stage=self.stage, step=manifest.step)

    def take_numbers(self) -> SaveNumbers:
        """Return what saving has cost since the last call."""
        numbers = SaveNumbers(self._blocked, self._seconds, self._waited)
        self._blocked, self._seconds = 0.0, None
        return numbers

    def find(self) -> Found:
        """Look for the newest whole checkpoint, every rank checking its share of the files.

        Collective: call on all ranks.
        """
        if rank() == 0:
            commits.clear_left_overs(self.run_dir, fence=self.fence)
        folder, manifest, faults = find_newest_whole(self.run_dir, stage=self.stage)
        self._refused = frozenset(faults)
        notes = [
            f"checkpoint {name} of {self.stage} is not used: {fault}"
            for name, fault in faults.items()
        ]
        return Found(folder, manifest, tuple(notes))

    def load(self, engine: TrainEngine, found: Found, *, seed: int) -> None:
        """Put weights, optimizer state and generators back. Collective: call on all ranks.

        Written by another number of ranks, the shards are cut anew, and the generators of every
        rank start from (seed, stage, step, rank). Raises ValueError on every rank for what does
        not fit the model.
        """
        assert found.folder is not None, "nothing was found"
        assert found.manifest is not None, "nothing was found"
        folder, written_by = found.folder, found.manifest.world_size
        engine.load(folder, written_by=written_by)
        if written_by == world_size():
            state = torch.load(folder / _random_name(rank()), weights_only=True)
            restore_random_state(state)
            return
        key = f"{seed}/{self.stage}/{found.manifest.step}/{rank()}"
        digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
        seed_everything(int.from_bytes(digest, "little"))

    def _writer(
        self, engine: TrainEngine, staging: Path, *, logs: Sequence[JsonLines], with_weights: bool
    ) -> Callable[[_Job], tuple[FileEntry, ...]]:
        """Copy all that this rank saves, and return what writes it. Collective."""
        shard = engine.snapshot(self._host)
        generators = random_state()
        weights = self._merged_weights(engine) if with_weights else None
        this_rank = rank()

        def write(job: _Job) -> tuple[FileEntry, ...]:
            commits.check_fence(self.fence)
            for lines in logs:
                lines.sync()
            chunks = shards.safetensors_chunks(shard.tensors, shard.metadata)
            files = [
                shards.write_file(staging, shards.shard_name(this_rank), job.counted(chunks)),
                shards.write_file(staging, _random_name(this_rank), [_serialised(generators)]),
            ]
            if this_rank == 0 and self.recipe:
                files.append(shards.write_file(staging, RECIPE_NAME, [self.recipe.encode()]))
            if weights is not None:
                chunks = shards.safetensors_chunks(weights)
                files.append(shards.write_file(staging, WEIGHTS_NAME, job.counted(chunks)))
            return tuple(files)

        return write

    def _merged_weights(self, engine: TrainEngine) -> dict[str, Tensor] | None:
        weights = engine.gathered_weights()
        if weights is None or self.adapter is None:
            return weights
        return merge_adapter(weights, self.adapter)

    def _settle(self) -> None:
        """Wait until no save is on its way. Collective.

        The ranks go on telling each other how far they are: one that has died is noticed, and a
        save that is slow is told from one that hangs.
        """
        while self._pending is not None:
            self._pending.job.join(timeout=_LOOK_SECONDS)
            self._advance()

    def _advance(self) -> None:
        """Tell the ranks how far this one is, and do what follows from it. Collective."""
        pending = self._pending
        assert pending is not None, "no save is on its way"
        part = pending.job.part
        look = torch.tensor([int(part is not None), pending.job.bytes])
        done, moved = sum_over_ranks(look, group=self._group).tolist()
        if moved != self._moved:
            self._moved = moved
            self.on_progress()
        if done < world_size():
            return
        assert part is not None, "it is done on all ranks"
        parts: list[_Part] = gather_objects(part, group=self._group)
        fault = next((part.fault for part in parts if part.fault), None)
        if fault is not None:
            self._failed(fault, pending)
        elif not pending.committing:
            files = tuple(entry for part in parts for entry in part.files)
            manifest = pending.manifest.model_copy(update={"files": files})
            pending.job = _Job(lambda job: self._commit(pending, manifest))
            pending.committing = True
        else:
            self._pending, self._failures = None, 0
            self._seconds = time.monotonic() - pending.began
            if rank() == 0:
                log.info("saved %s in %.2f s", pending.final.name, self._seconds)
            self.on_saved(pending.final)

    def _commit(self, pending: _Pending, manifest: Manifest) -> tuple[FileEntry, ...]:
        """Commit on rank 0, in its thread; nothing on the others."""
        if rank() == 0:
            commits.commit(
                pending.staging,
                pending.final,
                manifest,
                fence=self.fence,
                refused=self._refused,
            )
            commits.retire(
                self.run_dir, stage=self.stage, newest=pending.final, keep_last=self.keep_last
            )
        return ()

    def _failed(self, fault: Fault, pending: _Pending) -> None:
        """Report a failed save, and raise where another try is of no use. Collective."""
        self._pending, self.must_retry = None, True
        self._failures += 1
        self.on_failed(fault.reason)
        if rank() == 0:
            shutil.rmtree(pending.staging, ignore_errors=True)
            log.warning(
                "%s could not be saved (%d in a row, checkpoint.max_failed_saves=%d): %s",
                pending.final.name,
                self._failures,
                self.max_failed_saves,
                fault.reason,
            )
        if fault.final or self._failures > self.max_failed_saves:
            raise SaveError(fault.reason, no_room=fault.no_room)


def _random_name(of_rank: int) -> str:
    return f"random_{of_rank:05d}.pt"


def _serialised(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
