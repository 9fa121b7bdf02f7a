"""Mines hard negatives: embed, search, write; each goes on where it was interrupted."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.data.revision import MINED
from cocoa_dist.data.shard_format import MANIFEST_NAME, dataset_info, read_manifest
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.store import absolute, open_store
from cocoa_dist.data.writing.build import BuildOptions, BuildReport, build_dataset, rejected_kinds
from cocoa_dist.mining.search import (
    NOTHING,
    FaissSearch,
    Neighbours,
    Pool,
    Queries,
    Vectors,
    brute_force,
    exact,
    recall,
)
from cocoa_dist.mining.source import MinedSource
from cocoa_dist.mining.vectors import Vectoriser, embed
from cocoa_dist.mining.work import Arrays, WorkFolder

_VECTORS, _FOUND, _ALL = "vectors", "found", "neighbours"
_ROWS = 65536  # worked on at once

Step = Literal["embed", "search", "write"]
OnProgress = Callable[[Step, int, int], None]  # what is done, how much, of how much


@dataclass(frozen=True)
class MiningOptions:
    """What decides which negatives are found."""

    count: int = 4  # negatives of each record
    margin: float = 0.05  # a candidate this close to the own target's similarity is left out
    skip: int = 0  # of the nearest that are left
    search: Literal["torch", "faiss"] = "torch"
    probes: int = 16  # cells that faiss looks into
    block: int = 1024  # records embedded, and queries searched, between two checkpoints
    check: int = 200  # queries that are searched by brute force too
    append: bool = False  # keep the negatives that records have

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("skip", 0), ("probes", 1), ("block", 1), ("check", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if not -2.0 <= self.margin <= 2.0:
            raise ValueError(f"margin is {self.margin}, expected a difference of cosines, -2 to 2")


@dataclass(frozen=True)
class Measured:
    """How good the neighbours are."""

    recall: float  # of `checked` queries against brute force
    checked: int
    without: int  # records that got no negative
    fewer: int  # records that got some, but not as many as asked for
    mean_gap: float  # similarity to the own target less that to the first negative, mean


@dataclass(frozen=True)
class MiningReport:
    """What came out."""

    built: BuildReport
    measured: Measured
    seconds: float


def mine(
    data: str | Path,
    destination: Path,
    vectoriser: Vectoriser,
    *,
    work: Path,
    options: MiningOptions,
    build: BuildOptions | None = None,
    restart: bool = False,
    on_progress: OnProgress = lambda step, done, total: None,
) -> MiningReport:
    """Write the data set `data` to `destination` with hard negatives; goes on after a kill.

    `work` holds what is done, until the data set is there. In a script it must stand below
    `if __name__ == "__main__"`. Raises ValueError for a data set, a folder or vectors that cannot
    be used, and for work of another mining in `work`.
    """
    began = time.monotonic()
    location = absolute(data)
    reader = ShardReader(location)
    job = _job(reader, vectoriser, options)
    before = _mined_before(destination, job)
    if before is not None:
        return MiningReport(*before, seconds=time.monotonic() - began)
    folder = WorkFolder(work, job, restart=restart)
    blocks = -(-len(reader) // options.block)
    _embed_all(folder, reader, vectoriser, options, on_progress=on_progress)
    reader.close()
    query_ND = folder.mapped(_VECTORS, blocks, "query_BD")
    pool = Pool.of(
        folder.mapped(_VECTORS, blocks, "target_BD"),
        folder.joined(_VECTORS, blocks, "identity_B"),
        folder.joined(_VECTORS, blocks, "content_B"),
    )
    own_N = _own_scores(query_ND, pool.vectors_ND)
    queries = Queries(query_ND, pool.identity_N, pool.content_N, own_N - options.margin)
    _search_all(folder, queries, pool, options, on_progress=on_progress)
    found = Neighbours(
        folder.joined(_FOUND, blocks, "number"), folder.joined(_FOUND, blocks, "score")
    )
    folder.write(_ALL, 0, {"number": found.number_QK, "score": found.score_QK, "own": own_N})
    measured = _measure(queries, pool, found, own_N, options)
    said = {"location": location, **job, **asdict(measured)}
    built = build_dataset(
        MinedSource(
            data=location,
            neighbours=folder.file(_ALL, 0),
            provenance={"data": job["data"], "vectors": job["vectors"]},
            job=job,
            append=options.append,
        ),
        destination,
        info={**_info(location), MINED: said},
        options=build,
        on_progress=lambda now: on_progress("write", now.rows, now.total_rows),
    )
    folder.remove()
    return MiningReport(built, measured, seconds=time.monotonic() - began)


def _mined_before(destination: Path, job: Mapping[str, Any]) -> tuple[BuildReport, Measured] | None:
    """Return what is known of a data set that is there and was mined by the same job."""
    if not (destination / MANIFEST_NAME).is_file():
        return None
    info = dataset_info(read_manifest(destination))
    said = info.info.get(MINED, {})
    if any(said.get(name) != value for name, value in job.items()):
        return None
    measured = Measured(**{field.name: said[field.name] for field in fields(Measured)})
    reasons = rejected_kinds(destination)
    report = BuildReport(info, info.num_shards, sum(reasons.values()), reasons, seconds=0.0)
    return report, measured


def _own_scores(query_ND: Vectors, target_ND: Vectors) -> Vectors:
    """Return the similarity of each query to its own target, (N,)."""
    parts = [
        np.einsum("nd,nd->n", query_ND[begin : begin + _ROWS], target_ND[begin : begin + _ROWS])
        for begin in range(0, len(query_ND), _ROWS)
    ]
    return np.concatenate(parts).astype(np.float32)


def _job(reader: ShardReader, vectoriser: Vectoriser, options: MiningOptions) -> dict[str, Any]:
    """Return all that decides what is found."""
    chosen = {k: v for k, v in asdict(options).items() if k not in ("check", "probes")}
    if options.search == "faiss":
        chosen["probes"] = options.probes
    return {"data": reader.fingerprint, "vectors": vectoriser.digest, **chosen}


def _info(location: str) -> dict[str, Any]:
    """Return what the data set says of itself, less what it was made with."""
    info = read_manifest(open_store(location))["info"]
    return {name: value for name, value in info.items() if name not in ("build", MINED)}


def _embed_all(
    folder: WorkFolder,
    reader: ShardReader,
    vectoriser: Vectoriser,
    options: MiningOptions,
    *,
    on_progress: OnProgress,
) -> None:
    total = len(reader)
    for number, begin in enumerate(range(0, total, options.block)):
        end = min(begin + options.block, total)
        if not folder.has(_VECTORS, number):
            records = [reader.record(row) for row in range(begin, end)]
            made = embed(vectoriser, range(begin, end), records)
            folder.write(_VECTORS, number, made.arrays())
        on_progress("embed", end, total)


def _search_all(
    folder: WorkFolder,
    queries: Queries,
    pool: Pool,
    options: MiningOptions,
    *,
    on_progress: OnProgress,
) -> None:
    total = len(queries.vectors_QD)
    index: FaissSearch | None = None
    for number, begin in enumerate(range(0, total, options.block)):
        end = min(begin + options.block, total)
        if not folder.has(_FOUND, number):
            if options.search == "faiss" and index is None:
                index = FaissSearch(pool, probes=options.probes)
            asked, part = options.count + options.skip, _part(queries, np.arange(begin, end))
            found = index.search(part, count=asked) if index else exact(part, pool, count=asked)
            arrays: Arrays = {
                "number": found.number_QK[:, options.skip :],
                "score": found.score_QK[:, options.skip :],
            }
            folder.write(_FOUND, number, arrays)
        on_progress("search", end, total)


def _measure(
    queries: Queries, pool: Pool, found: Neighbours, own_N: Vectors, options: MiningOptions
) -> Measured:
    """Compare some queries, spread over all, with brute force; count what was found for all."""
    total = len(queries.vectors_QD)
    rows = np.unique(np.linspace(0, total - 1, min(options.check, total)).astype(np.int64))
    share = 1.0
    if len(rows):
        truth = brute_force(_part(queries, rows), pool, count=options.count + options.skip)
        right = Neighbours(truth.number_QK[:, options.skip :], truth.score_QK[:, options.skip :])
        share = recall(Neighbours(found.number_QK[rows], found.score_QK[rows]), right)
    there_N = (found.number_QK != NOTHING).sum(axis=1)
    gap_N = (own_N - found.score_QK[:, 0])[there_N > 0]
    return Measured(
        recall=share,
        checked=len(rows),
        without=int((there_N == 0).sum()),
        fewer=int(((there_N > 0) & (there_N < options.count)).sum()),
        mean_gap=float(gap_N.mean()) if len(gap_N) else 0.0,
    )


def _part(queries: Queries, rows: NDArray[np.int64]) -> Queries:
    return Queries(
        queries.vectors_QD[rows],
        queries.identity_Q[rows],
        queries.content_Q[rows],
        queries.ceiling_Q[rows],
    )
