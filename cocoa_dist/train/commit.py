"""How files become a checkpoint: staging folder, fence, manifest last, one rename, retention.

Rank 0's part of a save, on files alone. Whatever dies before the rename leaves the checkpoints that
were there untouched; what it leaves behind lies in `.staging-*` and is cleared by the next start.
"""

import errno
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cocoa_dist import manifest as manifests
from cocoa_dist.manifest import Manifest
from cocoa_dist.runtime import Fence
from cocoa_dist.train.shards import SHARD_FOLDER

log = logging.getLogger("cocoa_dist.train")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_STAGING = ".staging-"
_REASON_LETTERS = 1000  # a fault has to fit into a message between ranks


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the run's older checkpoints are untouched."""

    def __init__(self, reason: str, *, no_room: bool) -> None:
        super().__init__(reason)
        self.no_room = no_room  # full, read-only or forbidden: somebody has to see to it


@dataclass(frozen=True)
class Fault:
    """Why a rank could not do its part of a save."""

    reason: str
    no_room: bool = False
    final: bool = False  # trying again cannot help: fenced, or a fault of this program

    @staticmethod
    def of(error: Exception) -> "Fault":
        """Describe what was raised. Only the file system's troubles are worth another try."""
        trouble = isinstance(error, OSError)
        number = getattr(error, "errno", None)
        text = str(error) if trouble or isinstance(error, FencedError) else repr(error)
        return Fault(text[:_REASON_LETTERS], no_room=number in NO_ROOM, final=not trouble)


class FencedError(RuntimeError):
    """Another incarnation has the run, or has committed the step: this one may not."""


def staging_folder(root: Path, final: Path, *, epoch: str, attempt: int) -> Path:
    """Return where the files of a save gather; a name of its own for each attempt."""
    return root / f"{_STAGING}{final.name}-{epoch or 'local'}-{attempt}"


def check_fence(fence: Fence) -> None:
    """Raise FencedError unless this incarnation may commit."""
    try:
        fence.check()
    except RuntimeError as error:
        raise FencedError(str(error)) from error


def clear_left_overs(run_dir: Path, *, fence: Fence) -> None:
    """Remove what dead incarnations left in any stage. Rank 0, before its first save."""
    try:
        check_fence(fence)  # what lies there may be the work of the one that runs now
    except FencedError as error:
        log.warning("%s; nothing is cleared", error)
        return
    for left in (run_dir / "checkpoints").glob(f"*/{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def commit(
    staging: Path, final: Path, manifest: Manifest, *, fence: Fence, refused: Collection[str]
) -> None:
    """Make the files of `staging` the checkpoint `final`. Rank 0.

    `refused`: names of checkpoints that this incarnation found broken and may replace.
    Raises FencedError, or OSError.
    """
    check_fence(fence)
    _remove_unlisted(staging, {entry.path for entry in manifest.files})
    manifests.fsync_folder(staging / SHARD_FOLDER)
    manifests.write_manifest(staging, manifest)
    check_fence(fence)  # again: writing may have taken long, or this process may have been stopped
    if final.exists():
        _move_broken_away(final, refused=refused)
        check_fence(fence)
    os.rename(staging, final)  # fails if another incarnation's checkpoint has come in between
    manifests.fsync_folder(final.parent)


def retire(
    run_dir: Path, *, stage: str, newest: Path, keep_last: int, best_step: int | None = None
) -> None:
    """Keep the last whole checkpoints up to `newest`, and the best one.

    A failure is reported, the save stands.
    """
    kept = (
        None
        if best_step is None
        else manifests.step_folder(run_dir, stage=stage, step=best_step).name
    )
    whole = 1
    for folder, found in manifests.checkpoints(run_dir, stage=stage):
        if folder.name >= newest.name:
            continue
        whole += isinstance(found, Manifest)
        if isinstance(found, Manifest) and (whole <= keep_last or folder.name == kept):
            continue
        doomed = folder.with_name(f"{_STAGING}retired-{folder.name}")
        try:
            os.rename(folder, doomed)  # first: a checkpoint is whole or not there
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("old checkpoint %s could not be removed: %s", folder.name, error)


def _move_broken_away(final: Path, *, refused: Collection[str]) -> None:
    """Make room for a checkpoint in place of a broken one of the same step.

    Raises FencedError if the one that is there is whole: this incarnation began before that step,
    so another one wrote it.
    """
    try:
        manifests.read_manifest(final)
        broken = final.name in refused
    except manifests.ManifestError:
        broken = True
    if not broken:
        raise FencedError(f"{final} was committed by another incarnation; not committing")
    away = final.with_name(f"{_STAGING}broken-{final.name}")
    os.rename(final, away)
    shutil.rmtree(away, ignore_errors=True)


def _remove_unlisted(staging: Path, listed: set[str]) -> None:
    """Make a checkpoint hold what its manifest lists and nothing else."""
    for path in staging.rglob("*"):
        if path.is_file() and str(path.relative_to(staging)) not in listed:
            path.unlink()
