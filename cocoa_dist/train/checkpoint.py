"""Saves and loads the checkpoints of one stage while the stage goes on training.

A thread copies this rank's state to the host, then writes, hashes and syncs it. Forward and
backward passes go on beside it: they read the weights and leave them alone. Only the next optimizer
step has to wait for the copy. At step boundaries the ranks tell each other how far they are, on a
group of their own and from the main thread alone, and read at the next boundary what was told at
this one, so that nobody waits for that either; when all have written, rank 0's thread commits. A
save that fails is reported and tried again; older checkpoints are never touched before a newer one
is whole.
"""

import io
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cocoa_dist import distributed
from cocoa_dist import manifest as manifests
from cocoa_dist.config import AdapterConfig
from cocoa_dist.distributed import Exchange, gather_objects, rank, world_size
from cocoa_dist.manifest import Best, FileEntry, Manifest
from cocoa_dist.metrics import JsonLines
from cocoa_dist.model.adapter import merge_adapter
from cocoa_dist.runtime import Fence, random_state, restore_random_state, seed_rank
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
_TOLD_BYTES = 8192  # of a rank at a boundary: four files of 200 bytes, or a fault


@dataclass(frozen=True)
class Found:
    """Where a stage can go on: the newest whole checkpoint, if there is one."""

    folder: Path | None
    manifest: Manifest | None
    notes: tuple[str, ...]  # newer checkpoints that could not be used, and why


@dataclass(frozen=True)
class SaveNumbers:
    """What saving cost since the last look."""

    blocked_seconds: float  # training stood still: for copies, at boundaries, for the save before
    seconds: float | None  # from begin to rename, of the save that was committed; rank 0 knows
    waited: int  # saves of this incarnation that had to wait for the one before


@dataclass(frozen=True)
class _Part:
    """How far a rank is with its part of a save; `done`: its files, or why there are none."""

    written: int  # bytes
    done: bool = False
    files: tuple[FileEntry, ...] = ()
    fault: Fault | None = None

    def as_text(self) -> str:
        """Return it for the other ranks."""
        files = [entry.model_dump() for entry in self.files]
        fault = asdict(self.fault) if self.fault else None
        return json.dumps([self.written, self.done, files, fault], ensure_ascii=False)

    @staticmethod
    def from_text(text: str) -> "_Part":
        """Return what another rank told."""
        written, done, files, fault = json.loads(text)
        entries = tuple(FileEntry(**entry) for entry in files)
        return _Part(written, done, entries, Fault(**fault) if fault else None)


class _Job:
    """One piece of work in a thread; a fault is kept for the ranks to agree on."""

    def __init__(self, work: Callable[["_Job"], tuple[FileEntry, ...]]) -> None:
        self.copied = threading.Event()  # the live weights are no longer needed
        self._part = _Part(written=0)
        self._work = work
        # A thread, not a process: hashing and writing release the interpreter lock, the copy need
        # not be in shared memory, and it dies with its rank. Training is as fast beside either
        # (benchmarks/checkpoint_cpu.md, last column).
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def part(self) -> _Part:
        """How far it is."""
        return self._part

    def _run(self) -> None:
        try:
            files = self._work(self)
            self._part = _Part(self._part.written, done=True, files=files)
        except Exception as error:  # carried to the main thread, which raises or tries again
            self._part = _Part(self._part.written, done=True, fault=Fault.of(error))
        finally:
            self.copied.set()

    def counted(self, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            yield chunk
            self._part = _Part(self._part.written + len(chunk))

    def join(self, *, timeout: float) -> None:
        self._thread.join(timeout)


@dataclass
class _Pending:
    """A save on its way: first every rank writes, then rank 0 commits."""

    staging: Path
    final: Path
    manifest: Manifest
    job: _Job
    told: Exchange | None = None  # what the ranks told at the last boundary, not read yet
    committing: bool = False
    began: float = field(default_factory=time.monotonic)
    renamed: float | None = None  # on rank 0: when it became a checkpoint


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
        keep_best: str | None = None,
    ) -> None:
        """`adapter`: what the stage trains, merged into the weights at its end.

        `recipe`: the resolved one, which goes into each checkpoint. `keep_best`: the measure whose
        best checkpoint stays, whole weights included.
        """
        self.keep_best = keep_best
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
        self._best: Best | None = None  # of the checkpoints that were committed
        self._attempts = self._failures = self._waited = 0
        self._moved = (0, 0)  # bytes written and ranks done, as told last
        self._blocked = 0.0
        self._seconds: float | None = None

    def prepare(self, engine: TrainEngine) -> None:
        """Get the host memory of the saves before the first of them is due."""
        self._host.reserve(engine.state_bytes())

    def is_best(self, value: float | None) -> bool:
        """Say whether a score is above that of every checkpoint so far, one on its way included."""
        best = self._best if self._pending is None else self._pending.manifest.best
        return _is_above(value, best)

    def begin(
        self,
        engine: TrainEngine,
        manifest: Manifest,
        *,
        logs: Sequence[JsonLines] = (),
        value: float | None = None,
    ) -> None:
        """Start a save; the next optimizer step waits for its copy. Collective: call on all ranks.

        `value`: the measure of `keep_best` at this step, alike on all ranks. `logs` are made
        durable before the manifest: a checkpoint never knows more than the record. Waits for a
        save that is still running. Raises SaveError on every rank as `poll` does.
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
        engine.before_update = self.wait_for_copy
        manifest = manifest.model_copy(update={"best": self._best_with(manifest.step, value)})
        is_best = manifest.best is not None and manifest.best.step == manifest.step
        write = self._writer(engine, staging, logs=logs, with_weights=manifest.complete or is_best)
        self._pending = _Pending(staging, final, manifest, _Job(write), began=started)
        self._blocked += time.monotonic() - started

    def wait_for_copy(self) -> None:
        """Wait until the save on its way has copied the weights as they were."""
        pending = self._pending
        if pending is None or pending.committing:  # a commit reads files alone
            return
        started = time.monotonic()
        pending.job.copied.wait()
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
        self,
        engine: TrainEngine,
        manifest: Manifest,
        *,
        logs: Sequence[JsonLines] = (),
        value: float | None = None,
    ) -> Path:
        """Save and wait until it is committed; return its folder. Collective: call on all ranks.

        Tries again what fails. Raises SaveError on every rank as `poll` does.
        """
        while True:
            self.begin(engine, manifest, logs=logs, value=value)
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
        self._best = self._known_best(manifest)
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
        seed_rank(seed, stage=self.stage, step=found.manifest.step, rank=rank())

    def _known_best(self, manifest: Manifest | None) -> Best | None:
        """Return what a checkpoint names as the best, if it is there. Collective."""
        best = manifest.best if manifest is not None else None
        if best is None or best.measure != self.keep_best:
            return None
        missing = None
        if rank() == 0:
            try:
                folder = manifests.step_folder(self.run_dir, stage=self.stage, step=best.step)
                manifests.read_manifest(folder)
            except manifests.ManifestError as error:
                missing = str(error)
                log.warning("the best checkpoint of %s is gone: %s", self.stage, missing)
        return best if gather_objects(missing)[0] is None else None

    def _best_with(self, step: int, value: float | None) -> Best | None:
        """Return the best checkpoint if one of this step and value is committed."""
        if self.keep_best is None or value is None or not _is_above(value, self._best):
            return self._best
        return Best(measure=self.keep_best, step=step, value=value)

    def _writer(
        self, engine: TrainEngine, staging: Path, *, logs: Sequence[JsonLines], with_weights: bool
    ) -> Callable[[_Job], tuple[FileEntry, ...]]:
        """Find all that this rank saves, and return what copies and writes it. Collective."""
        live = engine.live_state()
        generators = random_state()
        weights = self._merged_weights(engine) if with_weights else None
        this_rank = rank()

        def write(job: _Job) -> tuple[FileEntry, ...]:
            shard = self._host.take(live)
            job.copied.set()
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
        """Do what follows from what the ranks told at the last boundary, and tell anew. Collective.

        What is decided here depends on what was told alone, so all ranks decide alike.
        """
        pending = self._pending
        assert pending is not None, "no save is on its way"
        if pending.told is not None:
            parts = [_Part.from_text(text) for text in pending.told.read()]
            pending.told = None
            self._report(parts)
            if all(part.done for part in parts):
                self._all_done(pending, parts)
                return
        text = pending.job.part.as_text()
        pending.told = Exchange(text, max_bytes=_TOLD_BYTES, group=self._group)

    def _report(self, parts: Sequence[_Part]) -> None:
        moved = sum(part.written for part in parts), sum(part.done for part in parts)
        if moved != self._moved:
            self._moved = moved
            self.on_progress()

    def _all_done(self, pending: _Pending, parts: Sequence[_Part]) -> None:
        """Commit what all ranks have written; or end a save that was committed, or failed."""
        fault = next((part.fault for part in parts if part.fault), None)
        if fault is not None:
            self._failed(fault, pending)
        elif not pending.committing:
            files = tuple(entry for part in parts for entry in part.files)
            manifest = pending.manifest.model_copy(update={"files": files})
            pending.job = _Job(lambda job: self._commit(pending, manifest))
            pending.committing = True
        else:
            self._pending, self._failures, self._best = None, 0, pending.manifest.best
            self._seconds = (pending.renamed or time.monotonic()) - pending.began
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
            pending.renamed = time.monotonic()
            commits.retire(
                self.run_dir,
                stage=self.stage,
                newest=pending.final,
                keep_last=self.keep_last,
                best_step=manifest.best.step if manifest.best else None,
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


def _is_above(value: float | None, best: Best | None) -> bool:
    """Say whether a score beats the best one; a tie does not, nor does NaN."""
    if value is None or not math.isfinite(value):
        return False
    return best is None or value > best.value


def _random_name(of_rank: int) -> str:
    return f"random_{of_rank:05d}.pt"


def _serialised(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
