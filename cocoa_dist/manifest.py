"""What a finished checkpoint is: schema, atomic write, strict read, newest whole one.

A checkpoint exists if and only if its folder holds a `manifest.json`; the folder gets its final
name by one rename, after every file in it is durable. Reads no tensor and imports no torch.
"""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
GUIDE_MARK = "+guide-"  # in `base_model`: behind it stands what a guide of the stage is known by
_STEP_FOLDER = re.compile(r"^step_(\d{8})$")


def _inside(path: str) -> str:
    """Refuse a path that leads out of the checkpoint's folder."""
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"'{path}' leads out of the checkpoint")
    return path


class FileEntry(BaseModel):
    """One file of a checkpoint: path relative to its folder, size in bytes, sha256 in hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, AfterValidator(_inside)]
    bytes: int
    sha256: str


class Best(BaseModel):
    """The checkpoint of a stage with the best score so far; it stays beside the last ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str  # evaluation.keep_best, as in metrics.jsonl; more is better
    step: int
    value: float


class Manifest(BaseModel):
    """The record of one checkpoint; what the launcher, resume and status read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    run: str
    recipe_fingerprint: str
    stage: str
    step: int  # optimizer steps done in this stage
    target_step: int
    complete: bool  # step == target_step: the stage is done
    epoch: str  # incarnation of the run that wrote it
    parent: str | None  # stage end its weights began from, relative to the run folder
    parent_sha256: str | None = None  # of the parent's weights; frozen ones are read from there
    world_size: int
    engine: str
    versions: dict[str, str]
    base_model: str  # sha256 over the weights the run started from
    data_state: dict[str, Any]  # position of the data plan; see data/order.py
    samples: int  # in this stage
    tokens: int
    skipped_steps: int
    bad_records: int = 0  # uses of records that could not be used, in this stage
    wall_seconds: float  # of this stage's loop, over all incarnations; start-up is not in it
    productive_seconds: float  # of it, inside steps, waiting for data included
    train_cpu_seconds: float  # CPU time of all ranks inside optimizer steps
    loss: dict[str, float]
    best: Best | None = None  # of this stage up to this checkpoint, which may be it
    files: tuple[FileEntry, ...]
    created_at: float = 0.0  # seconds since 1970


class ManifestError(ValueError):
    """A checkpoint that cannot be used; the message says what was found and what was expected."""


class DamagedEndError(ManifestError):
    """The checkpoint at a stage's end is not what was written; `what` says so without a remedy."""

    def __init__(self, what: str, *, folder: Path) -> None:
        super().__init__(
            f"{what}; remove that folder and the stage goes on from the checkpoint before it"
        )
        self.what, self.folder = what, folder


def step_folder(run_dir: Path, *, stage: str, step: int) -> Path:
    """Return where the checkpoint of (stage, step) lives."""
    return run_dir / "checkpoints" / stage / f"step_{step:08d}"


def fsync_folder(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other writer has, on any machine that sees the folder."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears as `path`, whole and durable, only if the block succeeds."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader sees the old file or the new one."""
    with durable_file(path) as file:
        file.write(data)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, atomically and durably."""
    stamped = manifest.model_copy(update={"created_at": time.time()})
    text = json.dumps(stamped.model_dump(mode="json"), indent=1)
    write_atomic(folder / MANIFEST_NAME, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one checkpoint folder.

    Raises ManifestError if it is missing, unreadable or of another schema.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {MANIFEST_NAME}: not a checkpoint") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ManifestError(f"{path} has schema_version {version!r}, expected {SCHEMA_VERSION}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ManifestError(f"{path}: field {where}: {first['msg']}") from error


def step_folders(run_dir: Path, *, stage: str) -> list[Path]:
    """Folders of a stage that carry a step name, newest first, whole or not."""
    root = run_dir / "checkpoints" / stage
    if not root.is_dir():
        return []
    named = [path for path in root.iterdir() if _STEP_FOLDER.match(path.name)]
    return sorted(named, key=lambda path: path.name, reverse=True)


def checkpoints(run_dir: Path, *, stage: str) -> Iterator[tuple[Path, Manifest | ManifestError]]:
    """Yield the checkpoints of a stage, newest first, each with its manifest or its fault."""
    for folder in step_folders(run_dir, stage=stage):
        try:
            yield folder, read_manifest(folder)
        except ManifestError as error:
            yield folder, error


def newest(run_dir: Path, *, stage: str) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint of a stage that has a readable manifest, if there is one."""
    for folder, found in checkpoints(run_dir, stage=stage):
        if isinstance(found, Manifest):
            return folder, found
    return None


def stage_end(
    run_dir: Path, *, stage: str, only: Container[str] | None = None
) -> tuple[Path, Manifest]:
    """Return the complete checkpoint of a stage, every file checked, or `only` those of a name.

    Raises ManifestError if the stage is not finished, DamagedEndError if its end is not whole.
    """
    for folder, found in checkpoints(run_dir, stage=stage):
        if isinstance(found, Manifest) and found.complete:
            fault = find_fault(folder, found, only=only)
            if fault is None:
                return folder, found
            raise DamagedEndError(
                f"the end of stage '{stage}' is not whole: {folder}: {fault}", folder=folder
            )
    raise ManifestError(f"stage '{stage}' has no complete checkpoint in {run_dir}")


def stage_best(
    run_dir: Path, *, stage: str, only: Container[str] | None = None
) -> tuple[Path, Manifest]:
    """Return the best checkpoint of a stage, every file checked, or `only` those of a name.

    Raises ManifestError if the newest checkpoint names none, or if it is not whole.
    """
    found = newest(run_dir, stage=stage)
    if found is None or found[1].best is None:
        raise ManifestError(
            f"stage '{stage}' of {run_dir} has no best checkpoint: evaluation.keep_best names the "
            "measure by which one is kept"
        )
    folder = step_folder(run_dir, stage=stage, step=found[1].best.step)
    manifest = read_manifest(folder)
    fault = find_fault(folder, manifest, only=only)
    if fault is not None:
        raise ManifestError(
            f"the best checkpoint of stage '{stage}' is not whole: {folder}: {fault}"
        )
    return folder, manifest


def set_aside(folder: Path) -> Path:
    """Take a checkpoint out of a run without removing it; return where it lies then."""
    first = folder.with_name(f"damaged-{folder.name}")
    more = (first.with_name(f"{first.name}.{number}") for number in count(2))
    away = next(place for place in chain([first], more) if not place.exists())
    os.rename(folder, away)
    fsync_folder(folder.parent)
    return away


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_fault(
    folder: Path, manifest: Manifest, *, only: Container[str] | None = None
) -> str | None:
    """Compare the files of a checkpoint, or `only` some, with its manifest; None if all are whole.

    Reads every byte. The text names the file, what was found and what was expected.
    """
    wanted = (entry for entry in manifest.files if only is None or entry.path in only)
    faults = (find_file_fault(folder, entry) for entry in wanted)
    return next((fault for fault in faults if fault is not None), None)


def find_file_fault(folder: Path, entry: FileEntry) -> str | None:
    """Compare one file of a checkpoint with what its manifest lists; None if it is whole."""
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes, expected {entry.bytes}"
        digest = sha256_file(path)
    except FileNotFoundError:
        return f"{entry.path} is missing"
    except OSError as error:
        return f"{entry.path} cannot be read: {error.strerror}"
    if digest != entry.sha256:
        return f"{entry.path} has sha256 {digest[:12]}..., expected {entry.sha256[:12]}..."
    return None
