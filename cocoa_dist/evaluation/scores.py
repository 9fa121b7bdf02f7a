"""Precision@1 from vectors: numpy alone, ties at their expected value, NaN an error.

MMEB stores the right candidate at index 0 of every row. An arg-max prefers index 0 where scores
are equal, so a model that gives one vector for everything would score 100; here it scores chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.evaluation.sets import SetInfo, nearest

Vectors = NDArray[np.float32]

BLOCK_VALUES = 1 << 24  # float32 gathered at a time: 64 MB
COLLAPSED_COSINE = 0.9999  # a mean cosine above it: the vectors are one vector and rounding
TIED_SHARE_WARNING = 0.01
MANY_ROWS = 20


@dataclass(frozen=True)
class SetVectors:
    """The vectors of one set, checked; scores are inner products, higher is better.

    Of embeddings of several vectors: the mean, over those of the query, of the best product.

    Raises ValueError naming set and row for anything that would be scored as something else.
    """

    name: str
    query_ND: Vectors
    candidates_MD: Vectors
    candidate_index_NC: NDArray[np.int64]  # rows of candidates_MD; column 0 is the right one
    candidate_count_N: NDArray[np.int64] | None = None  # columns of a row that count; None: all
    answer_N: NDArray[np.int64] | None = None  # the right candidate, if known: must be column 0
    vectors_each: int = 1  # above 1: D holds so many, end to end, scored by late interaction

    def __post_init__(self) -> None:
        _check_vectors(self, "query", self.query_ND)
        _check_vectors(self, "candidates", self.candidates_MD)
        if self.query_ND.shape[1] != self.candidates_MD.shape[1]:
            raise ValueError(
                f"set '{self.name}': queries have {self.query_ND.shape[1]} dimensions, candidates "
                f"{self.candidates_MD.shape[1]}: both sides must come from one model"
            )
        if self.vectors_each < 1 or self.query_ND.shape[1] % self.vectors_each:
            raise ValueError(
                f"set '{self.name}': {self.query_ND.shape[1]} numbers are not {self.vectors_each} "
                "vectors of one width: vectors_each does not fit"
            )
        _check_index(self)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which columns of a row hold candidates."""
        columns = np.arange(self.candidate_index_NC.shape[1])
        return np.asarray(columns[None, :] < self.counts[:, None])

    @property
    def counts(self) -> NDArray[np.int64]:
        """Candidates of each row."""
        if self.candidate_count_N is not None:
            return self.candidate_count_N
        return np.full(len(self.query_ND), self.candidate_index_NC.shape[1], dtype=np.int64)


@dataclass(frozen=True)
class SetScore:
    """How one set came out. Shares and scores are per cent."""

    precision_at_1: float  # ties at their expected value under random order
    rows: int
    tied_rows: int  # rows whose outcome hangs on how ties are broken
    chance: float  # mean of 100 / candidates
    candidates: tuple[int, int]  # fewest and most of a row
    argmax_precision_at_1: float  # by the published rule: the first of the best, so index 0 on ties
    query_cosine: float | None  # mean over pairs of queries; near 1: collapsed. None: one vector
    candidate_cosine: float | None
    distinct_candidates: int  # vectors that differ in at least one bit
    fixed_order: bool  # many rows, all with the same list: the right one cannot be first in all

    @property
    def collapsed(self) -> bool:
        """Whether either side is one vector for everything."""
        sides = (self.query_cosine, self.candidate_cosine)
        return any(cosine is not None and cosine > COLLAPSED_COSINE for cosine in sides)


def score_set(vectors: SetVectors) -> SetScore:
    """Score one set. Raises ValueError if a score is not finite."""
    distinct_M = _distinct(vectors.candidates_MD)
    above_N, tied_N = _ranks(vectors, distinct_M)
    best_N = above_N == 0
    counts_N = vectors.counts
    rows = len(counts_N)
    used = np.unique(vectors.candidate_index_NC[vectors.valid])
    return SetScore(
        precision_at_1=100.0 * math.fsum((best_N / tied_N).tolist()) / rows,
        rows=rows,
        tied_rows=int((best_N & (tied_N > 1)).sum()),
        chance=100.0 * math.fsum((1.0 / counts_N).tolist()) / rows,
        candidates=(int(counts_N.min()), int(counts_N.max())),
        argmax_precision_at_1=100.0 * int(best_N.sum()) / rows,
        query_cosine=mean_cosine(vectors.query_ND),
        candidate_cosine=mean_cosine(vectors.candidates_MD[used]),
        distinct_candidates=len(np.unique(distinct_M[used])),
        fixed_order=rows >= MANY_ROWS
        and int(counts_N.min()) > 1
        and bool((vectors.candidate_index_NC == vectors.candidate_index_NC[:1]).all()),
    )


def summarise(
    scores: Mapping[str, SetScore], *, sets: Mapping[str, SetInfo], expected: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the result as JSON values: per set, groups, IND, OOD and overall, in per cent.

    Every mean is one over sets, never one over the means of groups. A mean without sets is None.
    `expected` are sets that belong to the benchmark; `missing` lists those without a score.
    """
    entries = {name: _entry(score, sets.get(name)) for name, score in scores.items()}
    groups: dict[str, list[str]] = {}
    for name in scores:
        groups.setdefault(str(entries[name]["group"] or "other"), []).append(name)
    in_distribution = [
        name for name, info in sets.items() if info.in_distribution and name in scores
    ]
    out = [n for n, info in sets.items() if info.in_distribution is False and n in scores]
    missing = [name for name in expected if name not in scores]
    return {
        "sets": entries,
        "groups": {group: _mean(scores, names) for group, names in groups.items()},
        "ind": _mean(scores, in_distribution),
        "ood": _mean(scores, out),
        "overall": _mean(scores, list(scores)),
        "chance": {
            "groups": {group: _mean(scores, names, "chance") for group, names in groups.items()},
            "ind": _mean(scores, in_distribution, "chance"),
            "ood": _mean(scores, out, "chance"),
            "overall": _mean(scores, list(scores), "chance"),
        },
        "missing": missing,
        "warnings": _warnings(scores, sets, missing, total=len(expected)),
    }


def mean_cosine(vectors_ND: Vectors) -> float | None:
    """Return the mean cosine over all pairs of different rows; None for fewer than two.

    By the sum of the unit vectors, so in one pass; zero vectors count as a direction of none.
    """
    count = len(vectors_ND)
    if count < 2:
        return None
    total_D = np.zeros(vectors_ND.shape[1])
    own = 0.0
    rows = max(1, BLOCK_VALUES // vectors_ND.shape[1])
    for begin in range(0, count, rows):
        block_BD = vectors_ND[begin : begin + rows].astype(np.float64)
        norms_B = np.linalg.norm(block_BD, axis=1)
        unit_BD = block_BD / np.where(norms_B == 0, 1.0, norms_B)[:, None]
        total_D += unit_BD.sum(axis=0)
        own += float((norms_B > 0).sum())
    return float((total_D @ total_D - own) / (count * (count - 1)))


def _ranks(
    vectors: SetVectors, distinct_M: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, per row, how many candidates score above the right one and how many equal to it.

    The right one counts as equal to itself. Candidates with the same bits are equal whatever a
    matrix product rounds them to in its different columns.
    """
    index_NC, valid_NC = vectors.candidate_index_NC, vectors.valid
    rows, width = index_NC.shape
    above_N = np.zeros(rows, dtype=np.int64)
    tied_N = np.zeros(rows, dtype=np.int64)
    block = max(1, BLOCK_VALUES // (width * vectors.query_ND.shape[1]))
    for begin in range(0, rows, block):
        part = slice(begin, begin + block)
        index_BC = np.where(valid_NC[part], index_NC[part], index_NC[part, :1])
        gathered_BCD = vectors.candidates_MD[index_BC]
        with np.errstate(over="ignore", invalid="ignore"):
            scores_BC = _scores(gathered_BCD, vectors.query_ND[part], vectors.vectors_each)
        finite_B = np.isfinite(scores_BC).all(axis=1)
        if not finite_B.all():
            row = begin + int((~finite_B).argmax())
            raise ValueError(
                f"set '{vectors.name}' row {row}: a score is not finite though its vectors are: "
                "they are too long for float32; scale them to length 1"
            )
        ids_BC = distinct_M[index_BC]
        same_BC = ids_BC == ids_BC[:, :1]
        right_B1 = scores_BC[:, :1]
        above_N[part] = ((scores_BC > right_B1) & ~same_BC & valid_NC[part]).sum(axis=1)
        tied_N[part] = (((scores_BC == right_B1) | same_BC) & valid_NC[part]).sum(axis=1)
    return above_N, tied_N


def _scores(gathered_BCD: Vectors, query_BD: Vectors, vectors_each: int) -> Vectors:
    """Return the score of each query's C candidates, (B, C)."""
    if vectors_each == 1:
        products: Vectors = np.matmul(gathered_BCD, query_BD[:, :, None])[:, :, 0]
        return products
    count, candidates, _ = gathered_BCD.shape
    ask_BKW = query_BD.reshape(count, vectors_each, -1)
    answer_BVW = gathered_BCD.reshape(count, candidates * vectors_each, -1)
    each_BVK = np.matmul(answer_BVW, ask_BKW.transpose(0, 2, 1))
    best_BCK = each_BVK.reshape(count, candidates, vectors_each, vectors_each).max(axis=2)
    scores: Vectors = best_BCK.mean(axis=2, dtype=np.float32)
    return scores


def _distinct(vectors_MD: Vectors) -> NDArray[np.int64]:
    """Return a number for each row; two rows have the same number if they have the same bits."""
    positive = np.ascontiguousarray(vectors_MD + np.float32(0.0))  # -0.0 is 0.0
    keys_M = positive.view(np.dtype((np.void, positive.dtype.itemsize * positive.shape[1])))[:, 0]
    return np.asarray(np.unique(keys_M, return_inverse=True)[1], dtype=np.int64).reshape(-1)


def _check_vectors(vectors: SetVectors, side: str, values: Vectors) -> None:
    where = f"set '{vectors.name}': {side}"
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"{where} has shape {values.shape}, expected (rows, dimensions), not empty"
        )
    if values.dtype != np.float32:
        raise ValueError(f"{where} is {values.dtype}, expected float32")
    finite_N = np.isfinite(values).all(axis=1)
    if not finite_N.all():
        row = int((~finite_N).argmax())
        bad = values[row][~np.isfinite(values[row])][0]
        raise ValueError(
            f"{where} row {row} holds {bad} ({int((~finite_N).sum())} of {len(values)} rows are "
            "not finite): such a vector is never a hit; find out why the model gives it"
        )


def _check_index(vectors: SetVectors) -> None:
    index_NC, name = vectors.candidate_index_NC, vectors.name
    if index_NC.ndim != 2 or not np.issubdtype(index_NC.dtype, np.integer):
        raise ValueError(
            f"set '{name}': candidate_index is {index_NC.dtype} {index_NC.shape}, expected "
            "integers in (rows, candidates)"
        )
    if len(index_NC) != len(vectors.query_ND):
        raise ValueError(
            f"set '{name}': candidate_index has {len(index_NC)} rows, query {len(vectors.query_ND)}"
        )
    counts_N = vectors.counts
    if counts_N.shape != (len(index_NC),) or (counts_N > index_NC.shape[1]).any():
        raise ValueError(
            f"set '{name}': candidate_count has shape {counts_N.shape} and at most "
            f"{counts_N.max(initial=0)}, expected ({len(index_NC)},) and at most the "
            f"{index_NC.shape[1]} columns of candidate_index"
        )
    if (counts_N < 1).any():
        row = int((counts_N < 1).argmax())
        raise ValueError(f"set '{name}' row {row}: the list of candidates is empty")
    valid_NC = vectors.valid
    outside_NC = ((index_NC < 0) | (index_NC >= len(vectors.candidates_MD))) & valid_NC
    if outside_NC.any():
        row, column = (int(i) for i in np.argwhere(outside_NC)[0])
        raise ValueError(
            f"set '{name}' row {row}: candidate_index[{column}] is {index_NC[row, column]}, out of "
            f"range: there are candidates 0 to {len(vectors.candidates_MD) - 1}"
        )
    _check_duplicates(vectors, valid_NC)
    _check_answer(vectors)


def _check_duplicates(vectors: SetVectors, valid_NC: NDArray[np.bool_]) -> None:
    index_NC = vectors.candidate_index_NC
    unique_NC = np.where(valid_NC, index_NC, -1 - np.arange(index_NC.shape[1]))
    ordered_NC = np.sort(unique_NC, axis=1)
    repeated_NC = ordered_NC[:, 1:] == ordered_NC[:, :-1]
    twice_N = repeated_NC.any(axis=1)
    if twice_N.any():
        row = int(twice_N.argmax())
        candidate = int(ordered_NC[row, 1:][repeated_NC[row]][0])
        raise ValueError(
            f"set '{vectors.name}' row {row}: candidate {candidate} is listed more than once "
            f"({int(twice_N.sum())} rows have duplicate candidates); list each candidate once"
        )


def _check_answer(vectors: SetVectors) -> None:
    if vectors.answer_N is None:
        return
    if vectors.answer_N.shape != (len(vectors.query_ND),):
        raise ValueError(
            f"set '{vectors.name}': answer has shape {vectors.answer_N.shape}, expected "
            f"({len(vectors.query_ND)},)"
        )
    wrong_N = vectors.answer_N != vectors.candidate_index_NC[:, 0]
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise ValueError(
            f"set '{vectors.name}' row {row}: the right candidate is {vectors.answer_N[row]}, but "
            f"column 0 of candidate_index is {vectors.candidate_index_NC[row, 0]} "
            f"({int(wrong_N.sum())} rows are so): put the right one first"
        )


def _entry(score: SetScore, info: SetInfo | None) -> dict[str, Any]:
    return {
        "precision_at_1": score.precision_at_1,
        "rows": score.rows,
        "tied_rows": score.tied_rows,
        "chance": score.chance,
        "candidates": list(score.candidates),
        "argmax_precision_at_1": score.argmax_precision_at_1,
        "query_cosine": score.query_cosine,
        "candidate_cosine": score.candidate_cosine,
        "distinct_candidates": score.distinct_candidates,
        "collapsed": score.collapsed,
        "group": info.group if info else None,
        "in_distribution": info.in_distribution if info else None,
    }


def _mean(
    scores: Mapping[str, SetScore], names: Sequence[str], field: str = "precision_at_1"
) -> float | None:
    values = [float(getattr(scores[name], field)) for name in names]
    return math.fsum(values) / len(values) if values else None


def _warnings(
    scores: Mapping[str, SetScore],
    sets: Mapping[str, SetInfo],
    missing: Sequence[str],
    *,
    total: int,
) -> list[str]:
    found = []
    collapsed = [name for name, score in scores.items() if score.collapsed]
    if collapsed:
        worst = scores[collapsed[0]]
        found.append(
            f"collapsed, one vector for everything: {', '.join(collapsed)} (in {collapsed[0]} the "
            f"mean cosine of queries is {_cosine(worst.query_cosine)}, of candidates "
            f"{_cosine(worst.candidate_cosine)})"
        )
    for name, score in scores.items():
        if score.tied_rows > TIED_SHARE_WARNING * score.rows and not score.collapsed:
            found.append(
                f"{name}: {score.tied_rows} of {score.rows} rows tie with the right candidate; an "
                f"arg-max that takes the first would say {score.argmax_precision_at_1:.2f}"
            )
        if score.fixed_order:
            found.append(
                f"{name}: all {score.rows} rows list the same candidates in the same order: is the "
                "right one really the first of each?"
            )
        info = sets.get(name)
        if info is None:
            found.append(
                f"{name}: not in the table of sets{nearest(name, sets)}: in the overall mean alone"
            )
        elif info.candidates is not None and score.candidates != (info.candidates,) * 2:
            low, high = score.candidates
            found.append(
                f"{name}: {low if low == high else f'{low} to {high}'} candidates a row, "
                f"published are {info.candidates}: the score cannot be compared with published ones"
            )
    if missing:
        found.append(
            f"{len(missing)} of {total} sets are missing, the means are not those of the benchmark:"
            f" {', '.join(missing)}"
        )
    return found


def _cosine(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.5f}"
