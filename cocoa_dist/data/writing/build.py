"""Building a data set with many processes: shards are the unit, and whole ones are never redone.

The same source gives the same bytes for any number of processes and interruptions. Nothing of a
build counts before the manifest is there; the same call goes on after a kill.
"""

import errno
import fcntl
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa_dist.data.records import Record
from cocoa_dist.data.shard_format import (
    BUILD_FOLDER,
    ENERGON_FOLDER,
    MANIFEST_NAME,
    REJECTED_LIST,
    SCHEMA_VERSION,
    DatasetInfo,
    dataset_info,
    file_names,
    read_manifest,
    remove_build,
)
from cocoa_dist.data.writing.dataset import (
    check_batching,
    clear_leftovers,
    duplicate_between,
    finish,
    prepare_folder,
)
from cocoa_dist.data.writing.keys import SeenKeys
from cocoa_dist.data.writing.pool import Counts, Job, record_bytes, write_parts
from cocoa_dist.data.writing.shard_file import Part, read_part
from cocoa_dist.data.writing.source import Source
from cocoa_dist.data.writing.tokens import TokenCounter
from cocoa_dist.manifest import write_atomic

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
BATCH_BYTES = 2 * 2**20  # aimed at: one read of a loader
SHARD_BYTES = 512 * 2**20  # aimed at
_MAX_BATCH_RECORDS = 256
_MAX_SHARD_RECORDS = 2**16
_MIN_SHARDS = 8  # of small collections too, so that processes have something to share
_PROBES = 16  # places in the source where rows are looked at for their size
_PROBE_ROWS = 4  # at each of them
_LOCK_SECONDS = 5.0  # a killed builder's processes need a moment to die
_PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_REASONS_NAMED = 5  # in an error


@dataclass(frozen=True)
class BuildOptions:
    """How to build; `processes` alone does not change what comes out."""

    processes: int = 1
    tokenizer: Path | None = None  # a Hugging Face folder; None: texts are not counted
    records_per_batch: int | None = None  # None: from the size of some rows
    records_per_shard: int | None = None  # source rows; None: likewise
    max_rejected: float = 0.05  # share of the rows that may become no record
    restart: bool = False  # throw away what another build left


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is."""

    rows: int  # of the source that are done, those of kept shards included
    total_rows: int
    rejected: int
    bytes: int  # of pictures and texts, written by this call
    shards: int
    total_shards: int
    kept_shards: int  # were whole when this call began
    kept_rows: int


@dataclass(frozen=True)
class BuildReport:
    """What came out."""

    info: DatasetInfo
    kept_shards: int  # were whole when this call began
    rejected: int
    reasons: dict[str, int]  # rejected rows by kind of reason, most frequent first
    seconds: float


def build_dataset(
    source: Source,
    destination: Path,
    *,
    info: dict[str, Any],
    options: BuildOptions | None = None,
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
) -> BuildReport:
    """Write the records of a source into the folder `destination`, or go on where a build was.

    `info` goes into the manifest: name, source, licence; `build`, a hash of source and settings, is
    added. A data set that was built from the same is left as it is. Raises ValueError for a folder
    that is in use or not ours to write, another build's shards in it, a duplicate key, a damaged
    source file, too many rejected rows, and a full disk. In a script it must stand below
    `if __name__ == "__main__"`, as writer processes import the script.
    """
    options = options or BuildOptions()
    began = time.monotonic()
    if not len(source):
        raise ValueError(f"{destination}: the source has no rows, expected at least one")
    _check_folder(destination)
    job = _job(source, destination, options)
    info = {**info, "build": _plan_hash(job)}
    there = _built_before(destination, info["build"], began=began)
    if there is not None:
        return there
    with _named_if_full(destination):
        prepare_folder(destination)
        with _only_builder(destination):
            _check_plan(job, restart=options.restart)
            progress = _Progress(job, options.max_rejected, on_progress)
            progress.keep_whole_shards()
            write_parts(
                job,
                progress.missing,
                processes=options.processes,
                on_part=progress.add_part,
                on_counts=progress.add_counts,
            )
            written = finish(
                destination,
                [progress.parts[shard] for shard in range(job.num_shards)],
                info=info,
                tokenizer_sha256=job.count_tokens.sha256 if job.count_tokens else "",
                records_per_batch=job.records_per_batch,
                records_per_shard=job.records_per_shard,
                source=source,
            )
    return BuildReport(
        info=written,
        kept_shards=progress.kept_shards,
        rejected=progress.reasons.total(),
        reasons=dict(progress.reasons.most_common()),
        seconds=time.monotonic() - began,
    )


def reason_kind(reason: str) -> str:
    """Return what kind of reason it is: what stands before its first colon."""
    return reason.partition(":")[0]


class _Progress:
    """The parts of a build as they come, and the limit on rejected rows."""

    def __init__(
        self, job: Job, max_rejected: float, on_progress: Callable[[BuildProgress], None]
    ) -> None:
        self.parts: dict[int, Part] = {}
        self.missing: list[int] = []
        self.kept_shards = 0
        self.reasons: Counter[str] = Counter()
        self._job, self._on_progress = job, on_progress
        self._limit = max_rejected * len(job.source)
        self._kept_rows = self._kept_rejected = 0
        self._examples: list[str] = []
        self._seen = SeenKeys(job.folder)

    def keep_whole_shards(self) -> None:
        """Take the shards that are whole, and list the others."""
        for shard in range(self._job.num_shards):
            part = read_part(self._job.folder, shard)
            if part is None:
                self.missing.append(shard)
                continue
            self._kept_rows += part.num_rows
            self._kept_rejected += len(part.rejected)
            self.kept_shards += 1
            self.add_part(part)
        self.add_counts(Counts())

    def add_part(self, part: Part) -> None:
        """Take a finished shard. Raises ValueError past the limit of rejected rows.

        Also for a key that another shard has: the sooner it is known, the less is written for it.
        """
        self.parts[part.shard] = part
        twice = self._seen.add(part)
        if twice is not None:
            raise duplicate_between(
                *(twice, self._job.folder, list(self.parts.values())),
                records_per_shard=self._job.records_per_shard,
                source=self._job.source,
            )
        self.reasons.update(reason_kind(row["reason"]) for row in part.rejected)
        room = _REASONS_NAMED - len(self._examples)
        self._examples += [f"{row['where']}: {row['reason']}" for row in part.rejected[:room]]
        if self.reasons.total() > self._limit:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.reasons.most_common())
            raise ValueError(
                f"{self._job.folder}: {self.reasons.total()} of {len(self._job.source)} rows "
                f"cannot become a record, more than max_rejected allows ({self._limit:.0f}): "
                f"{kinds}; such as {'; '.join(self._examples)}. Repair them, or raise the limit: "
                "whole shards stay"
            )

    def add_counts(self, counts: Counts) -> None:
        """Say how far the build is."""
        self._on_progress(
            BuildProgress(
                rows=self._kept_rows + counts.rows,
                total_rows=len(self._job.source),
                rejected=self._kept_rejected + counts.rejected,
                bytes=counts.bytes,
                shards=len(self.parts),
                total_shards=self._job.num_shards,
                kept_shards=self.kept_shards,
                kept_rows=self._kept_rows,
            )
        )


def _check_folder(destination: Path) -> None:
    """Raise ValueError if the folder holds anything that no builder made."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ValueError(f"{destination} is a file, expected a folder, or a name that is free")
    ours = {*file_names(destination), "index", ENERGON_FOLDER, BUILD_FOLDER, MANIFEST_NAME}
    found = sorted(path.name for path in destination.iterdir() if not path.name.startswith("."))
    others = [name for name in found if name not in ours]
    if others:
        raise ValueError(
            f"{destination} is not empty: it holds {', '.join(others[:3])}"
            f"{' and more' if len(others) > 3 else ''}; name an empty folder, or one that is not "
            "there yet"
        )


@contextmanager
def _only_builder(destination: Path) -> Iterator[None]:
    """Hold the folder against other builders. Raises ValueError if one is at work in it."""
    file = (destination / BUILD_FOLDER / _LOCK_NAME).open("a")
    with file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{destination}: another process is building there; wait for it, or name "
                        "another folder"
                    ) from error
                time.sleep(0.1)
        yield


@contextmanager
def _named_if_full(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ValueError(
            f"{destination} cannot be written on: {error}; whole shards stay, make room and start "
            "the same command again"
        ) from error


def _job(source: Source, destination: Path, options: BuildOptions) -> Job:
    counter = None if options.tokenizer is None else TokenCounter(options.tokenizer)
    batch, shard = options.records_per_batch, options.records_per_shard
    if batch is None or shard is None:
        mean = _mean_record_bytes(source)
        batch = batch or _batch_records(mean)
        shard = shard or _shard_records(len(source), mean, batch=batch)
    check_batching(records_per_batch=batch, records_per_shard=shard)
    return Job(source, destination, batch, shard, counter)


def _mean_record_bytes(source: Source) -> float:
    """Return how large records are, from some places spread over the source."""
    sizes = []
    for probe in range(_PROBES):
        start = len(source) * probe // _PROBES
        rows = source.rows(start, min(start + _PROBE_ROWS, len(source)))
        sizes += [record_bytes(row) for row in rows if isinstance(row, Record)]
    return max(1.0, sum(sizes) / max(1, len(sizes)))


def _batch_records(mean_bytes: float) -> int:
    """Return a power of two, so that batches have about BATCH_BYTES."""
    fitting = max(1, min(_MAX_BATCH_RECORDS, int(BATCH_BYTES / mean_bytes)))
    return 1 << (fitting.bit_length() - 1)


def _shard_records(count: int, mean_bytes: float, *, batch: int) -> int:
    """Return a multiple of `batch`, so that shards have about SHARD_BYTES."""
    fitting = min(_MAX_SHARD_RECORDS, int(SHARD_BYTES / mean_bytes), -(-count // _MIN_SHARDS))
    return batch * max(1, -(-fitting // batch))


def _plan(job: Job) -> dict[str, Any]:
    """Return all that decides what comes out."""
    return {
        "format": SCHEMA_VERSION,
        "rows": len(job.source),
        "source": hashlib.sha256(json.dumps(job.source.stamp).encode()).hexdigest(),
        "records_per_batch": job.records_per_batch,
        "records_per_shard": job.records_per_shard,
        "tokenizer": job.count_tokens.sha256 if job.count_tokens else "",
    }


def _plan_hash(job: Job) -> str:
    return hashlib.sha256(json.dumps(_plan(job)).encode()).hexdigest()[:16]


def _built_before(destination: Path, plan_hash: str, *, began: float) -> BuildReport | None:
    """Return the report of a data set that is there and was built from the same."""
    if not (destination / MANIFEST_NAME).is_file():
        return None
    found = dataset_info(read_manifest(destination))
    if found.info.get("build") != plan_hash:
        return None
    remove_build(destination)  # a builder that was killed at the very end left it
    reasons = rejected_kinds(destination)
    return BuildReport(
        info=found,
        kept_shards=found.num_shards,
        rejected=sum(reasons.values()),
        reasons=reasons,
        seconds=time.monotonic() - began,
    )


def rejected_kinds(destination: Path) -> dict[str, int]:
    """Return how many rows of the source became no record, by kind of reason."""
    kinds: Counter[str] = Counter()
    file = destination / REJECTED_LIST
    if file.is_file():
        with file.open("rb") as lines:
            kinds.update(reason_kind(json.loads(line)["reason"]) for line in lines)
    return dict(kinds.most_common())


def _check_plan(job: Job, *, restart: bool) -> None:
    """Note what is being built, and refuse the shards of another build."""
    content = _plan(job)
    file = job.folder / BUILD_FOLDER / _PLAN_NAME
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        found = None
    except ValueError:
        found = {}
    if found not in (None, content) and not restart:
        changed = [name for name, value in content.items() if found.get(name) != value]
        raise ValueError(
            f"{job.folder} holds shards of another build: {', '.join(changed)} changed since; "
            "build with the old files and settings, name another folder, or throw the shards away "
            "(--restart)"
        )
    if found is None or restart:
        clear_leftovers(job.folder, keep=_LOCK_NAME)  # we hold the lock
    write_atomic(file, (json.dumps(content, indent=1) + "\n").encode())
