"""Compiles segments and a rule into an AttentionPlan, on the host, in O(T).

What a sample contributes depends on the order of its roles alone, once it is said in numbers of
segments and not of tokens: it is worked out once for each such pattern, whatever the lengths.
Where segments begin turns it into rows, for the whole pack at once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from cocoa_dist.attention.gather import Index, RowGather
from cocoa_dist.attention.plan import INT32_MAX, AttentionPlan, PlanCall, expand_ranges
from cocoa_dist.segments import AttentionRule, Role, Segment, View, check_segments

_CACHED_PATTERNS = 1024  # orders of roles; a sample of many segments takes O(segments^2)

Views = tuple[View, ...]  # in the order of Role
Ranges = tuple[tuple[int, int], ...]  # half-open, in segments of the sample


def compile_plan(samples: Sequence[Sequence[Segment]], rule: AttentionRule) -> AttentionPlan:
    """Compile a pack: `samples` holds each sample's segments in pack coordinates.

    Raises ValueError, with the numbers, for segments that overlap, leave gaps or are empty.
    """
    num_tokens = check_segments(samples)
    if num_tokens > INT32_MAX:
        raise ValueError(f"a pack of {num_tokens} tokens does not fit into int32 cu_seqlens")
    views = tuple(rule.views[role] for role in Role)
    patterns = [_pattern(tuple([s.role for s in sample]), views) for sample in samples]
    edges = np.array([s.start for s in chain.from_iterable(samples)] + [num_tokens])
    counts = np.array([len(sample) for sample in samples])
    firsts = np.cumsum(counts) - counts
    full = _lower([pattern.full for pattern in patterns], firsts, edges, causal=False)
    causal = _lower([pattern.causal for pattern in patterns], firsts, edges, causal=True)
    lowered = [call for call in (full, causal) if call is not None]
    lo, hi = _intervals(patterns, np.repeat(firsts, counts), edges)
    return AttentionPlan(
        num_tokens=num_tokens,
        calls=tuple(one.call for one in lowered),
        query_rows=_query_rows([one.queries for one in lowered], num_tokens),
        keys=RowGather.of(np.concatenate([one.keys for one in lowered]), num_tokens),
        lo=lo,
        hi=hi,
        visible_area=sum(one.area for one in lowered),
    )


@dataclass(frozen=True, slots=True)
class _Problems:
    """The problems of one causality class in one sample, in the order of their first query."""

    queries: Ranges
    keys: Ranges
    ranges_q: tuple[int, ...]  # how many of the ranges each problem has
    ranges_k: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What a sample with these roles contributes to a plan, in segments of the sample."""

    full: _Problems
    causal: _Problems
    lo: tuple[tuple[int, ...], ...]  # M times: per segment, where the m-th visible range begins
    hi: tuple[tuple[int, ...], ...]  # where it ends; -1: behind the row itself
    blank: tuple[int, ...]  # a zero for each segment


@dataclass(frozen=True, slots=True)
class _Lowered:
    """One call of a plan, and which rows of the pack are its queries and keys."""

    call: PlanCall
    queries: Index
    keys: Index
    area: int


@dataclass(frozen=True, slots=True)
class _Problem:
    """Queries that share their keys."""

    queries: Ranges
    keys: Ranges
    causal: bool


_TO_ROW = -1  # a range that ends behind the row itself


@lru_cache(maxsize=_CACHED_PATTERNS)
def _pattern(roles: tuple[Role, ...], views: Views) -> _Pattern:
    sample = [Segment(number, number + 1, role) for number, role in enumerate(roles)]
    view_of = dict(zip(Role, views, strict=True))
    problems = sorted(_problems(sample, view_of), key=lambda problem: problem.queries[0])
    visible = [_visible_ranges(segment, sample, view_of[segment.role]) for segment in sample]
    depth = max(map(len, visible))
    padded = [ranges + [(0, 0)] * (depth - len(ranges)) for ranges in visible]
    return _Pattern(
        full=_collected(p for p in problems if not p.causal),
        causal=_collected(p for p in problems if p.causal),
        lo=tuple(tuple(ranges[m][0] for ranges in padded) for m in range(depth)),
        hi=tuple(tuple(ranges[m][1] for ranges in padded) for m in range(depth)),
        blank=(0,) * len(roles),
    )


def _problems(sample: list[Segment], view_of: Mapping[Role, View]) -> Iterator[_Problem]:
    """Yield problems so that every row of the sample is a query of exactly one."""
    by_view: dict[View, list[Segment]] = {}
    for segment in sample:
        by_view.setdefault(view_of[segment.role], []).append(segment)
    for view, segments in by_view.items():
        full = [s for s in sample if s.role in view.full]
        causal = [s for s in sample if s.role in view.causal]
        if not causal:
            yield _Problem(_joined(segments), _joined(full), causal=False)
        elif {s.role for s in segments} == {s.role for s in causal}:
            yield _Problem(_joined(segments), _joined(full) + _joined(causal), causal=True)
        else:
            yield from _one_by_one(segments, full, causal)


def _one_by_one(
    segments: list[Segment], full: list[Segment], causal: list[Segment]
) -> Iterator[_Problem]:
    """Yield one problem for each query segment: the causal keys are not the queries themselves."""
    causal_roles = {s.role for s in causal}
    for segment in segments:
        seen = full + [s for s in causal if s.stop <= segment.start]
        own = segment.role in causal_roles
        keys = _joined(seen) + (_joined([segment]) if own else ())
        yield _Problem(_joined([segment]), keys, causal=own)


def _visible_ranges(segment: Segment, sample: list[Segment], view: View) -> list[tuple[int, int]]:
    """Return the merged key ranges of a segment's rows; _TO_ROW marks one that ends at the row."""
    ranges: list[tuple[int, int]] = []
    for key in sample:
        if not (key.role in view.full or (key.role in view.causal and key.start <= segment.start)):
            continue
        stop = _TO_ROW if key is segment and key.role in view.causal else key.stop
        if ranges and ranges[-1][1] == key.start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((key.start, stop))
    return ranges


def _joined(segments: Iterable[Segment]) -> Ranges:
    """Return the segments as ranges, neighbours in one."""
    ranges: list[tuple[int, int]] = []
    for segment in segments:
        if ranges and ranges[-1][1] == segment.start:
            ranges[-1] = (ranges[-1][0], segment.stop)
        else:
            ranges.append((segment.start, segment.stop))
    return tuple(ranges)


def _collected(problems: Iterable[_Problem]) -> _Problems:
    kept = list(problems)
    return _Problems(
        queries=tuple(chain.from_iterable(p.queries for p in kept)),
        keys=tuple(chain.from_iterable(p.keys for p in kept)),
        ranges_q=tuple(len(p.queries) for p in kept),
        ranges_k=tuple(len(p.keys) for p in kept),
    )


def _lower(parts: list[_Problems], firsts: Index, edges: Index, *, causal: bool) -> _Lowered | None:
    """Turn the samples' problems of one class into a call; None where there are none.

    `firsts[s]`: number in the pack of sample s's first segment; `edges[n]`: where segment n begins.
    """
    if not any(part.ranges_q for part in parts):
        return None
    starts_q, sizes_q = _ranges([part.queries for part in parts], firsts, edges)
    starts_k, sizes_k = _ranges([part.keys for part in parts], firsts, edges)
    lengths_q = _summed(sizes_q, [part.ranges_q for part in parts])
    lengths_k = _summed(sizes_k, [part.ranges_k for part in parts])
    call = PlanCall.of(tuple(lengths_q.tolist()), tuple(lengths_k.tolist()), causal=causal)
    hidden = lengths_q * (lengths_q - 1) // 2 if causal else 0
    return _Lowered(
        call,
        expand_ranges(starts_q, sizes_q),
        expand_ranges(starts_k, sizes_k),
        area=int((lengths_q * lengths_k - hidden).sum()),
    )


def _ranges(parts: list[Ranges], firsts: Index, edges: Index) -> tuple[Index, Index]:
    """Return where each range begins in the pack and how many rows it has."""
    shift = np.repeat(firsts, [len(part) for part in parts])
    bounds = np.array(list(chain.from_iterable(parts)))
    starts = edges[bounds[:, 0] + shift]
    return starts, edges[bounds[:, 1] + shift] - starts


def _summed(sizes: Index, counts: list[tuple[int, ...]]) -> Index:
    """Add up the sizes of each problem's ranges."""
    each = np.array(list(chain.from_iterable(counts)))
    return np.add.reduceat(sizes, np.cumsum(each) - each)


def _query_rows(queries: list[Index], num_tokens: int) -> tuple[Tensor, ...]:
    """Return the rows of each call's queries; none where one call takes all rows in order."""
    if len(queries) == 1 and np.array_equal(queries[0], np.arange(num_tokens)):
        return ()
    return tuple(torch.from_numpy(rows.astype(np.int64)) for rows in queries)


def _intervals(patterns: list[_Pattern], shift: Index, edges: Index) -> tuple[Tensor, Tensor]:
    """Join the samples' visible ranges into two tables (M, T) int32, in pack coordinates.

    `shift[n]`: number of the first segment of the sample that segment n of the pack is in.
    """
    lengths = np.diff(edges)
    to_row = np.arange(1, int(edges[-1]) + 1)
    depth = max(len(pattern.lo) for pattern in patterns)
    lo = np.empty((depth, len(to_row)), dtype=np.int32)
    hi = np.empty((depth, len(to_row)), dtype=np.int32)
    for m in range(depth):
        begin = _each_segment(p.lo[m] if m < len(p.lo) else p.blank for p in patterns)
        end = _each_segment(p.hi[m] if m < len(p.hi) else p.blank for p in patterns)
        lo[m] = np.repeat(edges[begin + shift], lengths)
        hi[m] = np.where(
            np.repeat(end == _TO_ROW, lengths), to_row, np.repeat(edges[end + shift], lengths)
        )
    return torch.from_numpy(lo), torch.from_numpy(hi)


def _each_segment(numbers: Iterable[tuple[int, ...]]) -> Index:
    return np.array(list(chain.from_iterable(numbers)))
