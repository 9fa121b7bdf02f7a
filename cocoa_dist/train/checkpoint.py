"""Collective save and load of a stage's state, with the manifest written last.

Staging folder -> every rank writes its files (sha256 while writing, fsync, rename) -> digests are
gathered -> rank 0 checks the fence, writes the manifest and gives the folder its name by one
rename. Whatever dies before that rename leaves the previous checkpoint untouched.
"""

import errno
import hashlib
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from safetensors.torch import save_file

from cocoa_dist import manifest as manifests
from cocoa_dist.config import AdapterConfig
from cocoa_dist.distributed import barrier, gather_objects, rank
from cocoa_dist.manifest import FileEntry, Manifest, ManifestError
from cocoa_dist.model.adapter import merge_adapter
from cocoa_dist.runtime import Fence, random_state, restore_random_state
from cocoa_dist.train.engine import TrainEngine

log = logging.getLogger("cocoa_dist.train")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SHARD_FOLDER = "shards"
WEIGHTS_NAME = "weights.safetensors"


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the run's older checkpoints are untouched."""

    def __init__(self, reason: str, *, no_room: bool) -> None:
        super().__init__(reason)
        self.no_room = no_room  # the disk is full or read-only: no use in trying again


@dataclass(frozen=True)
class _Fault:
    """Why a rank could not do its part of a save."""

    reason: str
    no_room: bool = False

    @staticmethod
    def of(error: BaseException, *, where: str = "") -> "_Fault":
        number = getattr(error, "errno", None)
        prefix = f"{where}: " if where else ""
        return _Fault(f"{prefix}{error}", number in NO_ROOM)


class _HashingFile:
    """Counts and hashes what is written, and remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save turns it into a RuntimeError without the reason
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        self.file.flush()


@dataclass
class _Written:
    """What this rank wrote into a staging folder, or why it could not."""

    files: list[FileEntry] = field(default_factory=list)
    fault: _Fault | None = None


class AtomicCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's writer: every file whole or absent, its digest taken on the way.

    It never raises while saving: DeepSpeed meets at a barrier afterwards, which a rank that left
    early would hang. Errors are kept for `Checkpointer` to agree on.
    """

    def __init__(self, staging: Path | None = None) -> None:
        super().__init__(None)
        self.name = "cocoa_dist"
        self.staging = staging
        self.written = _Written()

    def create(self, info: Any) -> None:
        """Do nothing: the staging folder is there."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file of this rank."""
        assert self.staging is not None
        write_tensors(state_dict, Path(path), staging=self.staging, written=self.written)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; its digest was checked against the manifest before."""
        # DeepSpeed's shards hold its own classes, so weights_only is not to be had here.
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: Any) -> bool:
        """Do nothing: committing is the manifest's business."""
        return True


def write_tensors(content: Any, path: Path, *, staging: Path, written: _Written) -> None:
    """torch.save to a temporary name, fsync, rename; notes digest or error in `written`."""
    temporary = path.with_name(path.name + ".tmp")
    hashing: _HashingFile | None = None
    try:
        with temporary.open("wb", buffering=0) as file:
            hashing = _HashingFile(file)
            torch.save(content, hashing)  # type: ignore[arg-type]
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        reason = hashing.error if hashing is not None and hashing.error else error
        written.fault = written.fault or _Fault.of(reason, where=path.name)
        temporary.unlink(missing_ok=True)
        return
    entry = FileEntry(
        path=str(path.relative_to(staging)),
        bytes=hashing.bytes,
        sha256=hashing.digest.hexdigest(),
    )
    written.files.append(entry)


@dataclass(frozen=True)
class Found:
    """Where a stage can go on: the newest whole checkpoint, if there is one."""

    folder: Path | None
    manifest: Manifest | None
    notes: tuple[str, ...]  # newer checkpoints that could not be used, and why


class Checkpointer:
    """Saves, finds and loads the checkpoints of one stage."""

    def __init__(
        self, run_dir: Path, *, stage: str, keep_last: int, adapter: AdapterConfig | None = None
    ) -> None:
        """`adapter`: what the stage trains, to be merged into the weights at its end."""
        self.run_dir, self.stage, self.keep_last = run_dir, stage, keep_last
        self.adapter = adapter
        self.root = run_dir / "checkpoints" / stage
        self.fence = Fence(run_dir)

    def save(self, engine: TrainEngine, manifest: Manifest) -> Path:
        """Write a checkpoint; return its folder. Collective: call on all ranks.

        Raises SaveError on every rank if any rank could not write its part.
        """
        final = manifests.step_folder(self.run_dir, stage=self.stage, step=manifest.step)
        staging = self.root / f".staging-{final.name}-{self.fence.epoch or 'local'}"
        self._agree(self._prepare(staging), staging)
        written = self._write(engine, staging, with_weights=manifest.complete)
        gathered: list[_Written] = gather_objects(written)
        fault = next((part.fault for part in gathered if part.fault), None)
        if fault is None and rank() == 0:
            files = tuple(entry for part in gathered for entry in part.files)
            fault = self._commit(staging, final, manifest.model_copy(update={"files": files}))
        self._agree(fault, staging)
        if rank() == 0:
            self._retire(newest=final)
        return final

    def find(self) -> Found:
        """Look for the newest whole checkpoint of the stage, every file checked by rank 0.

        Collective: call on all ranks.
        """
        found: Found = gather_objects(self._find() if rank() == 0 else None)[0]
        return found

    def _find(self) -> Found:
        notes: list[str] = []
        for folder, found in manifests.checkpoints(self.run_dir, stage=self.stage):
            fault = str(found) if isinstance(found, ManifestError) else None
            if isinstance(found, Manifest):
                fault = manifests.find_fault(folder, found)
                if fault is None:
                    return Found(folder, found, tuple(notes))
            notes.append(f"checkpoint {folder.name} of {self.stage} is not used: {fault}")
        return Found(None, None, tuple(notes))

    def load(self, engine: TrainEngine, folder: Path) -> None:
        """Put weights, optimizer state and generators back. Collective: call on all ranks."""
        engine.deepspeed.checkpoint_engine = AtomicCheckpointEngine()
        loaded, _ = engine.deepspeed.load_checkpoint(
            str(folder), tag=SHARD_FOLDER, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise ManifestError(f"{folder} holds no shards for rank {rank()}")
        state = torch.load(folder / _random_name(rank()), weights_only=True)
        restore_random_state(state)

    def _prepare(self, staging: Path) -> _Fault | None:
        """Rank 0 clears what dead incarnations left and makes the staging folder."""
        if rank() != 0:
            return None
        try:
            self.fence.check()  # first: what lies there may be the work of the one that runs now
            for left in self.root.glob(".staging-*"):
                shutil.rmtree(left, ignore_errors=True)
            (staging / SHARD_FOLDER).mkdir(parents=True)
        except (OSError, RuntimeError) as error:
            return _Fault.of(error)
        return None

    def _write(self, engine: TrainEngine, staging: Path, *, with_weights: bool) -> _Written:
        writer = AtomicCheckpointEngine(staging)
        engine.deepspeed.checkpoint_engine = writer
        engine.deepspeed.save_checkpoint(str(staging), tag=SHARD_FOLDER, save_latest=False)
        written = writer.written
        write_tensors(
            random_state(), staging / _random_name(rank()), staging=staging, written=written
        )
        if with_weights:
            weights = engine.gathered_weights()
            if weights is not None:
                plain = merge_adapter(weights, self.adapter) if self.adapter else weights
                _write_weights(plain, staging, written)
        return written

    def _commit(self, staging: Path, final: Path, manifest: Manifest) -> _Fault | None:
        """Rank 0: remove what is not listed, check the fence, write the manifest, rename."""
        try:
            _remove_unlisted(staging, {entry.path for entry in manifest.files})
            self.fence.check()
            manifests.fsync_folder(staging / SHARD_FOLDER)
            manifests.write_manifest(staging, manifest)
            if final.exists():  # a broken checkpoint of this step: its manifest was refused
                broken = self.root / f".staging-broken-{final.name}"
                final.rename(broken)
                shutil.rmtree(broken, ignore_errors=True)
            staging.rename(final)
            manifests.fsync_folder(self.root)
        except (OSError, RuntimeError) as error:
            return _Fault.of(error)
        return None

    def _retire(self, *, newest: Path) -> None:
        """Keep the last few whole checkpoints; a failure is reported, the save stands."""
        whole = 1
        for folder, found in manifests.checkpoints(self.run_dir, stage=self.stage):
            if folder.name >= newest.name:
                continue
            whole += isinstance(found, Manifest)
            if isinstance(found, Manifest) and whole <= self.keep_last:
                continue
            doomed = self.root / f".staging-retired-{folder.name}"
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("old checkpoint %s could not be removed: %s", folder.name, error)

    def _agree(self, fault: _Fault | None, staging: Path) -> None:
        """Raise SaveError on every rank if one has a fault, after clearing up. Collective."""
        shared: _Fault | None = next((f for f in gather_objects(fault) if f), None)
        if shared is not None and rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        barrier()
        if shared is not None:
            raise SaveError(shared.reason, no_room=shared.no_room)


def _random_name(of_rank: int) -> str:
    return f"random_{of_rank:05d}.pt"


def _write_weights(weights: dict[str, Any], staging: Path, written: _Written) -> None:
    path = staging / WEIGHTS_NAME
    try:
        save_file(weights, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except Exception as error:  # safetensors raises its own class for a full disk
        fault = _Fault(f"{WEIGHTS_NAME}: {error}", "No space left" in str(error))
        written.fault = written.fault or fault
        return
    entry = FileEntry(
        path=WEIGHTS_NAME, bytes=path.stat().st_size, sha256=manifests.sha256_file(path)
    )
    written.files.append(entry)


def _remove_unlisted(staging: Path, listed: set[str]) -> None:
    """DeepSpeed drops helper scripts beside its shards; a checkpoint holds what it lists."""
    for path in staging.rglob("*"):
        if path.is_file() and str(path.relative_to(staging)) not in listed:
            path.unlink()
