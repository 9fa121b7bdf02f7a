"""Finds the newest checkpoint of a stage whose every byte is what its manifest says.

The files are dealt to the ranks and hashed by threads, so that checking takes as long as a rank's
share; a checkpoint that is not whole is passed over, with the reason.
"""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cocoa_dist import manifest as manifests
from cocoa_dist.distributed import gather_objects, rank, world_size
from cocoa_dist.manifest import FileEntry, Manifest

log = logging.getLogger("cocoa_dist.train")

_THREADS = 4  # of a rank; the hash lets go of the interpreter lock
_PROGRESS_SECONDS = 5.0


def find_newest_whole(
    run_dir: Path, *, stage: str
) -> tuple[Path | None, Manifest | None, dict[str, str]]:
    """Return folder and manifest of the newest whole checkpoint, and the faults of newer ones.

    The faults are by name of the folder, newest first. Collective: call on all ranks.
    """
    found: list[tuple[Path, Manifest | str]] = []
    if rank() == 0:  # one rank lists: another's view of a shared disk may be older
        for folder, item in manifests.checkpoints(run_dir, stage=stage):
            found.append((folder, item if isinstance(item, Manifest) else str(item)))
    found = gather_objects(found)[0]
    faults: dict[str, str] = {}
    for folder, manifest in found:
        fault = manifest if isinstance(manifest, str) else find_fault_together(folder, manifest)
        if fault is None:
            assert isinstance(manifest, Manifest), "a manifest that cannot be read is a fault"
            return folder, manifest, faults
        faults[folder.name] = fault
    return None, None, faults


def find_fault_together(folder: Path, manifest: Manifest) -> str | None:
    """Compare a checkpoint's files with its manifest; the first fault, None if all are whole.

    Collective: call on all ranks.
    """
    shares = deal([entry.bytes for entry in manifest.files], num_lanes=world_size())
    mine = [manifest.files[index] for index in shares[rank()]]
    faults: list[str | None] = gather_objects(_check_share(folder, mine))
    return next((fault for fault in faults if fault), None)


def deal(sizes: Sequence[int], *, num_lanes: int) -> list[list[int]]:
    """Deal items to lanes, the largest first to the lane with the least; deterministic."""
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    loads = [0] * num_lanes
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lane = loads.index(min(loads))
        lanes[lane].append(index)
        loads[lane] += sizes[index]
    return lanes


def _check_share(folder: Path, entries: Sequence[FileEntry]) -> str | None:
    """Check this rank's files in threads; rank 0 says how far it is, if it takes long."""
    total, done = sum(entry.bytes for entry in entries), 0
    said = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        checks = pool.map(lambda entry: manifests.find_file_fault(folder, entry), entries)
        for entry, fault in zip(entries, checks, strict=True):
            if fault is not None:
                pool.shutdown(cancel_futures=True)
                return fault
            done += entry.bytes
            if rank() == 0 and time.monotonic() - said > _PROGRESS_SECONDS:
                said = time.monotonic()
                log.info(
                    "checking %s: %.1f of %.1f GB of each rank's share",
                    folder.name,
                    done / 1e9,
                    total / 1e9,
                )
    return None
