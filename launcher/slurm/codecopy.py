"""A copy of the code in the run folder, so that a requeue runs what was submitted.

Copies are named after their content: the same code is stored once, however many jobs run it.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cocoa_dist.config import PACKAGE_DIR
from cocoa_dist.manifest import write_atomic

CODE_DIR = "code"
_PARTS = ("cocoa_dist", "launcher", "ds_configs", "slurm")
_LEFT_OUT = ("__pycache__",)


def running_code() -> Path:
    """Return the folder that this code was imported from: a checkout, or a copy of one."""
    return PACKAGE_DIR.parent


def copy_code(run_dir: Path, *, source: Path | None = None) -> Path:
    """Copy the code at `source` (default: what runs now) into the run folder; return the copy."""
    root = running_code() if source is None else source
    folder = run_dir / CODE_DIR
    if root.parent == folder:
        return root  # it is a copy of this run
    final = folder / code_digest(root)
    if final.is_dir():
        return final
    staging = folder / f".staging-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    for path in code_files(root):
        target = staging / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    try:
        staging.rename(final)
    except OSError:
        if not final.is_dir():  # else another job was faster with the same code
            raise
        shutil.rmtree(staging, ignore_errors=True)
    return final


def remember_code(run_dir: Path, code: Path, *, job: str) -> None:
    """Leave word for the batch script which copy a job runs when it is queued again."""
    folder = run_dir / "submit"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{job}.code", f"{code}\n".encode())


def moved_on(checkout: Path, code: Path) -> bool:
    """Whether the checkout a job was submitted from now holds other code than the job's copy."""
    if checkout == code or not (checkout / "cocoa_dist").is_dir():
        return False
    return code_digest(checkout) != code.name


def code_digest(root: Path) -> str:
    """Return a name for the content of the code at `root`."""
    digest = hashlib.sha256()
    for path in code_files(root):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def code_files(root: Path) -> Iterator[Path]:
    """Yield the files that belong to the code, in a fixed order."""
    for part in _PARTS:
        for folder, folders, names in os.walk(root / part):
            folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
            for name in sorted(names):
                if not name.endswith((".pyc", ".tmp")):
                    yield Path(folder) / name
