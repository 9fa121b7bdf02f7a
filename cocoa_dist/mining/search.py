"""The nearest candidates of each query that may be its negatives: streamed, block by block.

Exact with torch. With faiss (if it is installed) over an inverted file, which looks at a part of
the candidates; `recall` says what that costs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Vectors = NDArray[np.float32]
Ints = NDArray[np.int64]
NOTHING = -1  # number of a neighbour that is not there
_CANDIDATES = 32768  # scored at once, with a block of queries
_MOST_TRAINED = 2**18  # vectors that the cells of an inverted file are learnt from


@dataclass(frozen=True)
class Pool:
    """The candidates: unit vectors (N, D), perhaps mapped from a file, and what each is."""

    vectors_ND: Vectors
    identity_N: Ints
    content_N: Ints
    again_N: NDArray[np.bool_]  # its content has come before: it is no candidate

    @staticmethod
    def of(vectors_ND: Vectors, identity_N: Ints, content_N: Ints) -> "Pool":
        """Mark what comes a second time."""
        again_N = np.ones(len(content_N), dtype=np.bool_)
        again_N[np.unique(content_N, return_index=True)[1]] = False
        return Pool(vectors_ND, identity_N, content_N, again_N)


@dataclass(frozen=True)
class Queries:
    """Some queries: unit vectors (Q, D), and what they look for."""

    vectors_QD: Vectors
    identity_Q: Ints
    content_Q: Ints
    ceiling_Q: Vectors  # a candidate above it is too close to be trusted


@dataclass(frozen=True)
class Neighbours:
    """The K best candidates of each query, best first; NOTHING and -inf where there are fewer."""

    number_QK: Ints
    score_QK: Vectors


def exact(queries: Queries, pool: Pool, *, count: int) -> Neighbours:
    """Return the candidates with the highest similarity that are allowed."""
    size = len(queries.vectors_QD)
    best_QK = torch.full((size, count), -torch.inf)
    number_QK = torch.full((size, count), NOTHING)
    query_QD = torch.from_numpy(queries.vectors_QD)
    for begin in range(0, len(pool.vectors_ND), _CANDIDATES):
        part = slice(begin, begin + _CANDIDATES)
        score_QC = query_QD @ torch.from_numpy(np.array(pool.vectors_ND[part])).T
        score_QC.masked_fill_(_refused(queries, pool, part, score_QC), -torch.inf)
        top = score_QC.topk(min(count, score_QC.shape[1]), dim=1)
        scores = torch.cat([best_QK, top.values], dim=1)
        numbers = torch.cat([number_QK, top.indices + begin], dim=1)
        best_QK, order = scores.topk(count, dim=1)
        number_QK = numbers.gather(1, order)
    number_QK = number_QK.masked_fill(best_QK == -torch.inf, NOTHING)
    return Neighbours(number_QK.numpy(), best_QK.numpy())


def _refused(queries: Queries, pool: Pool, part: slice, score_QC: Tensor) -> Tensor:
    """Mark candidates that are what a query looks for, or lie above its ceiling."""
    same_QC = queries.identity_Q[:, None] == pool.identity_N[None, part]
    same_QC |= queries.content_Q[:, None] == pool.content_N[None, part]
    same_QC |= pool.again_N[None, part]
    return torch.from_numpy(same_QC) | (score_QC > torch.from_numpy(queries.ceiling_Q)[:, None])


class FaissSearch:
    """An inverted file over a pool: each query looks into `probes` of its cells."""

    def __init__(self, pool: Pool, *, probes: int, seed: int = 0) -> None:
        """Train and fill the index. Raises ValueError if faiss is not installed."""
        try:
            import faiss
        except ImportError as error:
            raise ValueError(
                f"faiss is not installed ({error}): pip install faiss-cpu, or search with torch"
            ) from error
        self.pool = pool
        count, width = pool.vectors_ND.shape
        cells = max(1, min(int(4 * count**0.5), count // 39))  # it wants 39 points a cell
        quantiser: Any = faiss.IndexFlatIP(width)
        self._index: Any = faiss.IndexIVFFlat(quantiser, width, cells, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.seed = seed
        self._index.train(np.array(pool.vectors_ND[:_MOST_TRAINED]))
        for begin in range(0, count, _CANDIDATES):
            self._index.add(np.array(pool.vectors_ND[begin : begin + _CANDIDATES]))
        self._index.nprobe = min(probes, cells)

    def search(self, queries: Queries, *, count: int) -> Neighbours:
        """Return the best allowed candidates it finds; asks for more until there are enough."""
        asked, total = 4 * count, len(self.pool.vectors_ND)
        while True:
            score_QA, number_QA = self._index.search(queries.vectors_QD, min(asked, total))
            at = np.maximum(number_QA, 0)
            refused_QA = (number_QA < 0) | (score_QA > queries.ceiling_Q[:, None])
            refused_QA |= self.pool.identity_N[at] == queries.identity_Q[:, None]
            refused_QA |= self.pool.content_N[at] == queries.content_Q[:, None]
            refused_QA |= self.pool.again_N[at]
            enough = ((~refused_QA).sum(axis=1) >= count) | (number_QA < 0).any(axis=1)
            if enough.all() or asked >= total:
                break
            asked *= 4
        order = np.argsort(refused_QA, axis=1, kind="stable")[:, :count]
        gone_QK = np.take_along_axis(refused_QA, order, axis=1)
        number_QK = np.where(gone_QK, NOTHING, np.take_along_axis(number_QA, order, axis=1))
        score_QK = np.where(gone_QK, -np.inf, np.take_along_axis(score_QA, order, axis=1))
        missing = count - number_QK.shape[1]
        if missing > 0:
            number_QK = np.pad(number_QK, ((0, 0), (0, missing)), constant_values=NOTHING)
            score_QK = np.pad(score_QK, ((0, 0), (0, missing)), constant_values=-np.inf)
        return Neighbours(number_QK.astype(np.int64), score_QK.astype(np.float32))


def recall(found: Neighbours, right: Neighbours) -> float:
    """Return the share of the right neighbours that were found, 0 to 1; ties count as found."""
    hits = total = 0
    for query in range(len(right.number_QK)):
        wanted = right.number_QK[query] != NOTHING
        total += int(wanted.sum())
        if not wanted.any():
            continue
        worst = right.score_QK[query][wanted].min()
        there = found.number_QK[query] != NOTHING
        same = np.isin(right.number_QK[query][wanted], found.number_QK[query][there]).sum()
        as_good = (found.score_QK[query][there] >= worst - 1e-6).sum()
        hits += int(min(max(same, as_good), wanted.sum()))
    return hits / total if total else 1.0


def brute_force(queries: Queries, pool: Pool, *, count: int) -> Neighbours:
    """Score every candidate for every query in float64 and sort them: the slow truth."""
    parts = [
        queries.vectors_QD.astype(np.float64)
        @ pool.vectors_ND[begin : begin + _CANDIDATES].astype(np.float64).T
        for begin in range(0, len(pool.vectors_ND), _CANDIDATES)
    ]
    numbers = np.full((len(queries.vectors_QD), count), NOTHING, dtype=np.int64)
    scores = np.full(numbers.shape, -np.inf, dtype=np.float32)
    for query, score_N in enumerate(np.concatenate(parts, axis=1)):
        refused = pool.again_N | (pool.identity_N == queries.identity_Q[query])
        refused |= pool.content_N == queries.content_Q[query]
        refused |= score_N > queries.ceiling_Q[query]
        score_N[refused] = -np.inf
        best = np.argsort(-score_N, kind="stable")[:count]
        chosen = best[score_N[best] > -np.inf]
        numbers[query, : len(chosen)] = chosen
        scores[query, : len(chosen)] = score_N[chosen]
    return Neighbours(numbers, scores)
