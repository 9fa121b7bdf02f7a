"""The work folder of a mining: what is being done, and the blocks of it that are done.

A block is one file that appears by rename when it is whole, so a kill at any moment loses one
block at most. Another job in the same folder is refused by what differs.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.manifest import temporary_name, write_atomic

JOB_NAME = "job.json"
Arrays = Mapping[str, NDArray[Any]]


class WorkFolder:
    """Blocks of arrays by kind and number."""

    def __init__(self, folder: Path, job: Mapping[str, Any], *, restart: bool = False) -> None:
        """Begin or go on. Raises ValueError if the folder holds another job's blocks."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / JOB_NAME
        if file.is_file() and not restart:
            before = json.loads(file.read_text())
            changed = sorted(k for k in {**before, **job} if before.get(k) != job.get(k))
            if changed:
                listed = "; ".join(f"{k}: {before.get(k)!r} -> {job.get(k)!r}" for k in changed)
                raise ValueError(
                    f"{folder} holds the work of another mining ({listed}): go on with the old "
                    "settings, name another folder, or throw that work away with --restart"
                )
        elif restart:
            self.remove()
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(dict(job), indent=1).encode())

    def has(self, kind: str, number: int) -> bool:
        """Say whether a block is done."""
        return self.file(kind, number).is_file()

    def write(self, kind: str, number: int, arrays: Arrays) -> None:
        """Keep a block; it is there whole or not at all."""
        held = io.BytesIO()
        np.savez(held, allow_pickle=False, **dict(arrays))
        write_atomic(self.file(kind, number), held.getvalue())

    def read(self, kind: str, number: int) -> dict[str, NDArray[Any]]:
        """Return a block. Raises ValueError if its file is damaged."""
        file = self.file(kind, number)
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{file} cannot be read ({error}); remove it, and start again"
            ) from error

    def joined(self, kind: str, blocks: int, name: str) -> NDArray[Any]:
        """Return one array of all blocks, end to end."""
        return np.concatenate([self.read(kind, number)[name] for number in range(blocks)])

    def mapped(self, kind: str, blocks: int, name: str) -> NDArray[Any]:
        """Return one array of all blocks from a file that is mapped, and made first if need be."""
        file = self.folder / f"{kind}-{name}.npy"
        if not file.is_file():
            first = self.read(kind, 0)[name]
            sizes = [len(self.read(kind, number)[name]) for number in range(blocks)]
            temporary = temporary_name(file)
            whole = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=first.dtype, shape=(sum(sizes), *first.shape[1:])
            )
            begin = 0
            for number, size in enumerate(sizes):
                whole[begin : begin + size] = self.read(kind, number)[name]
                begin += size
            whole.flush()
            os.replace(temporary, file)
        mapped: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        return mapped

    def remove(self) -> None:
        """Remove the folder with what this class has put into it."""
        for file in [*self.folder.glob("*-*.np[yz]"), self.folder / JOB_NAME]:
            file.unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def file(self, kind: str, number: int) -> Path:
        """Return where a block lies, or will."""
        return self.folder / f"{kind}-{number:06d}.npz"
