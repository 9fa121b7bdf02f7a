"""Compiles segments and a rule into at most two gathered attention calls, on the host, in O(T).

A plan is what a kernel needs to give every row exactly the keys its rule allows: one call for
rows that see all their keys, one for rows that see them causally. Every row is a query of exactly
one call, so results are placed and never merged. Holds no scores and no dense mask.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cocoa_dist.segments import AttentionRule, Role, Segment, View, check_segments

_INT32_MAX = 2**31 - 1
_CACHED_TOKENS = 512  # samples up to this length are planned once per shape
_CACHED_SHAPES = 8192
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanCall:
    """One attention call over S variable-length problems, in the layout of flash-attn's varlen.

    A causal problem is bottom-right aligned: its last query sees all its keys.
    """

    q_index: Tensor | None  # (rows of q,) int64; None: all rows in order, nothing to gather
    k_index: Tensor | None  # (rows of k,) int64; None likewise
    cu_seqlens_q: Tensor  # (S + 1,) int32, starts with 0
    cu_seqlens_k: Tensor  # (S + 1,) int32
    lengths_q: tuple[int, ...]  # (S,) host copies of the lengths
    lengths_k: tuple[int, ...]
    causal: bool

    @property
    def max_seqlen_q(self) -> int:
        """Longest query side, a host integer."""
        return max(self.lengths_q)

    @property
    def max_seqlen_k(self) -> int:
        """Longest key side, a host integer."""
        return max(self.lengths_k)

    @cached_property
    def buckets(self) -> "Buckets":
        """The same call with problems of equal lengths next to each other (for `split`)."""
        with torch.inference_mode(False):  # a plan first used in evaluation may be trained with
            return _bucket(self)

    def to(self, device: torch.device | str) -> "PlanCall":
        """Return the call with its tensors on `device`."""
        return replace(
            self,
            q_index=None if self.q_index is None else self.q_index.to(device, non_blocking=True),
            k_index=None if self.k_index is None else self.k_index.to(device, non_blocking=True),
            cu_seqlens_q=self.cu_seqlens_q.to(device, non_blocking=True),
            cu_seqlens_k=self.cu_seqlens_k.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Bucket:
    """`count` problems that all have `n_q` queries and `n_k` keys."""

    count: int
    n_q: int
    n_k: int


@dataclass(frozen=True)
class Buckets:
    """Row orders that put problems of one shape together."""

    q_order: Tensor  # (rows of q,) int64: rows of the pack, bucket by bucket
    k_order: Tensor  # (rows of k,) int64
    shapes: tuple[Bucket, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """Everything a kernel needs to know about who sees whom in one pack of T tokens."""

    num_tokens: int  # T
    calls: tuple[PlanCall, ...]  # one or two; together they hold every row once as a query
    lo: Tensor  # (M, T) int32: row t sees the union over m of [lo[m, t], hi[m, t])
    hi: Tensor  # (M, T) int32
    visible_area: int  # number of (row, key) pairs that are visible: what FLOPs are counted from

    @cached_property
    def restore_order(self) -> Tensor:
        """Row order that undoes the bucketing of `split` over all calls; (T,) int64."""
        with torch.inference_mode(False):
            return torch.argsort(torch.cat([call.buckets.q_order for call in self.calls]))

    def visibility(self) -> Tensor:
        """Return the dense table (T, T), bool. For tests, pictures and the dense reference."""
        columns = torch.arange(self.num_tokens, device=self.lo.device)
        inside = (columns >= self.lo[..., None]) & (columns < self.hi[..., None])
        return inside.any(dim=0)

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """Return the plan with its tensors on `device`; the host numbers stay."""
        if self.lo.device == torch.device(device):
            return self
        return replace(
            self,
            calls=tuple(call.to(device) for call in self.calls),
            lo=self.lo.to(device, non_blocking=True),
            hi=self.hi.to(device, non_blocking=True),
        )


def compile_plan(samples: Sequence[Sequence[Segment]], rule: AttentionRule) -> AttentionPlan:
    """Compile a pack: `samples` holds each sample's segments in pack coordinates.

    Raises ValueError, with the numbers, for segments that overlap, leave gaps or are empty.
    """
    num_tokens = check_segments(samples)
    views = tuple(rule.views[role] for role in Role)
    full, causal = _Problems(), _Problems()
    parts: list[_SamplePlan] = []
    starts: list[int] = []
    for sample in samples:
        start = sample[0].start
        part = _plan_sample(tuple((s.role, s.stop - s.start) for s in sample), views)
        for problem in part.problems:
            (causal if problem.causal else full).add(problem.queries + start, problem.keys + start)
        parts.append(part)
        starts.append(start)
    calls = [
        problems.call(num_tokens, causal=flag)
        for problems, flag in ((full, False), (causal, True))
        if problems.queries
    ]
    lo, hi = _intervals(parts, starts)
    return AttentionPlan(num_tokens, tuple(calls), lo, hi, sum(part.area for part in parts))


class _Problems:
    """Collects the problems of one causality class."""

    def __init__(self) -> None:
        self.queries: list[Index] = []
        self.keys: list[Index] = []

    def add(self, queries: Index, keys: Index) -> None:
        self.queries.append(queries)
        self.keys.append(keys)

    def call(self, num_tokens: int, *, causal: bool) -> PlanCall:
        lengths_q = tuple(map(len, self.queries))
        lengths_k = tuple(map(len, self.keys))
        if sum(lengths_k) > _INT32_MAX:
            raise ValueError(f"{sum(lengths_k)} keys do not fit into int32 cu_seqlens")
        return PlanCall(
            q_index=_gather_index(self.queries, num_tokens),
            k_index=_gather_index(self.keys, num_tokens),
            cu_seqlens_q=_cumulative(lengths_q),
            cu_seqlens_k=_cumulative(lengths_k),
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            causal=causal,
        )


@dataclass(frozen=True)
class _Problem:
    """Queries that share their keys; rows in the sample's coordinates."""

    queries: Index
    keys: Index
    causal: bool

    @property
    def area(self) -> int:
        hidden = len(self.queries) * (len(self.queries) - 1) // 2 if self.causal else 0
        return len(self.queries) * len(self.keys) - hidden


@dataclass(frozen=True)
class _SamplePlan:
    """What a sample contributes to a plan, wherever in a pack it lies."""

    problems: tuple[_Problem, ...]
    lo_MT: Index  # visible ranges of its rows
    hi_MT: Index
    area: int


Shape = tuple[tuple[Role, int], ...]  # role and length of each segment
Views = tuple[View, ...]  # in the order of Role


def _plan_sample(shape: Shape, views: Views) -> _SamplePlan:
    """Plan one sample; short ones of the same shape are planned once."""
    if sum(length for _, length in shape) <= _CACHED_TOKENS:
        return _plan_short_sample(shape, views)
    return _plan_shape(shape, views)


@lru_cache(maxsize=_CACHED_SHAPES)
def _plan_short_sample(shape: Shape, views: Views) -> _SamplePlan:
    return _plan_shape(shape, views)


def _plan_shape(shape: Shape, views: Views) -> _SamplePlan:
    stops = np.cumsum([length for _, length in shape]).tolist()
    sample = [
        Segment(stop - length, stop, role)
        for stop, (role, length) in zip(stops, shape, strict=True)
    ]
    view_of = dict(zip(Role, views, strict=True))
    problems = tuple(_problems(sample, view_of))
    ranges = [_visible_ranges(segment, sample, view_of[segment.role]) for segment in sample]
    depth = max(map(len, ranges))
    table = np.asarray([r + [(0, 0, False)] * (depth - len(r)) for r in ranges], dtype=np.int64)
    rows = np.repeat(table, [length for _, length in shape], axis=0)  # (T, M, 3)
    to_row = np.arange(1, len(rows) + 1)[:, None]
    hi_TM = np.where(rows[..., 2] == 1, to_row, rows[..., 1])
    return _SamplePlan(problems, rows[..., 0].T, hi_TM.T, sum(p.area for p in problems))


def _problems(sample: Sequence[Segment], view_of: Mapping[Role, View]) -> Iterator[_Problem]:
    """Yield problems so that every row of the sample is a query of exactly one."""
    by_view: dict[View, list[Segment]] = {}
    for segment in sample:
        by_view.setdefault(view_of[segment.role], []).append(segment)
    for view, segments in by_view.items():
        keys_full = _rows(s for s in sample if s.role in view.full)
        keys_causal = [s for s in sample if s.role in view.causal]
        if not keys_causal:
            yield _Problem(_rows(segments), keys_full, causal=False)
        elif {s.role for s in segments} == {s.role for s in keys_causal}:
            keys = np.concatenate([keys_full, _rows(keys_causal)])
            yield _Problem(_rows(segments), keys, causal=True)
        else:
            yield from _run_by_run(segments, keys_full, keys_causal)


def _run_by_run(
    segments: list[Segment], keys_full: Index, keys_causal: list[Segment]
) -> Iterator[_Problem]:
    """Yield one problem for each query segment: the causal keys are not the queries themselves."""
    causal_roles = {s.role for s in keys_causal}
    for segment in segments:
        before = _rows(s for s in keys_causal if s.stop <= segment.start)
        keys = np.concatenate([keys_full, before])
        own = segment.role in causal_roles
        if own:
            keys = np.concatenate([keys, _rows([segment])])
        yield _Problem(_rows([segment]), keys, causal=own)


def _visible_ranges(
    segment: Segment, sample: Sequence[Segment], view: View
) -> list[tuple[int, int, bool]]:
    """Return merged key ranges of a segment's rows; the flag marks a range that ends at the row."""
    ranges: list[tuple[int, int, bool]] = []
    for key in sample:
        own = key is segment
        if not (key.role in view.full or (key.role in view.causal and key.start <= segment.start)):
            continue
        to_row = own and key.role in view.causal
        if ranges and ranges[-1][1] == key.start and not ranges[-1][2]:
            ranges[-1] = (ranges[-1][0], key.stop, to_row)
        else:
            ranges.append((key.start, key.stop, to_row))
    return ranges


def _intervals(parts: list[_SamplePlan], starts: list[int]) -> tuple[Tensor, Tensor]:
    """Join the samples' ranges into two tables (M, T) int32, in pack coordinates."""
    widths = [part.lo_MT.shape[1] for part in parts]
    depth = max(part.lo_MT.shape[0] for part in parts)
    shift = np.repeat(starts, widths)
    tables = []
    for name in ("lo_MT", "hi_MT"):
        joined = np.zeros((depth, len(shift)), dtype=np.int64)
        for part, start, width in zip(parts, starts, widths, strict=True):
            table: Index = getattr(part, name)
            joined[: len(table), start : start + width] = table
        tables.append(torch.from_numpy((joined + shift).astype(np.int32)))
    return tables[0], tables[1]


def _rows(segments: Iterable[Segment]) -> Index:
    parts = [np.arange(s.start, s.stop) for s in segments]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _gather_index(parts: list[Index], num_tokens: int) -> Tensor | None:
    rows = np.concatenate(parts)
    if len(rows) == num_tokens and bool((rows == np.arange(num_tokens)).all()):
        return None
    return torch.from_numpy(rows)


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def _bucket(call: PlanCall) -> Buckets:
    """Order the problems of a call by shape (stable), and the rows with them."""
    order = sorted(range(len(call.lengths_q)), key=lambda i: (call.lengths_q[i], call.lengths_k[i]))
    shapes = [
        Bucket(count=len(list(group)), n_q=n_q, n_k=n_k)
        for (n_q, n_k), group in groupby((call.lengths_q[i], call.lengths_k[i]) for i in order)
    ]
    return Buckets(
        q_order=_reordered(call.q_index, call.lengths_q, order),
        k_order=_reordered(call.k_index, call.lengths_k, order),
        shapes=tuple(shapes),
    )


def _reordered(index: Tensor | None, lengths: tuple[int, ...], order: list[int]) -> Tensor:
    total = sum(lengths)
    rows = np.arange(total) if index is None else index.cpu().numpy()
    parts = np.split(rows, np.cumsum(lengths)[:-1])
    joined = torch.from_numpy(np.concatenate([parts[i] for i in order]))
    return joined if index is None else joined.to(index.device)
