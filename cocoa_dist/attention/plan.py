"""What a kernel needs to give every row exactly the keys its rule allows.

At most two calls in flash-attn's varlen layout: one over problems whose rows see all their keys,
one over problems whose rows see them causally. Every row is a query of exactly one problem, so
results are placed and never merged. Beside them O(T) key intervals, for kernels that take a mask.
Holds no scores and no table of T x T.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cocoa_dist.attention.gather import Index, RowGather

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class PlanCall:
    """One attention call over S problems of different lengths.

    Problem s holds rows `cu_seqlens_q[s]` to `cu_seqlens_q[s + 1]` of this call's queries, and
    likewise of its keys. A causal problem is bottom-right aligned: its last query sees all keys.
    """

    lengths_q: tuple[int, ...]  # (S,) on the host
    lengths_k: tuple[int, ...]
    cu_seqlens_q: Tensor  # (S + 1,) int32, starts with 0
    cu_seqlens_k: Tensor  # (S + 1,) int32
    causal: bool

    @classmethod
    def of(
        cls, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], *, causal: bool
    ) -> "PlanCall":
        """Make a call from its lengths.

        Raises ValueError, with the numbers, for lengths that no kernel gives right results for.
        """
        if len(lengths_q) != len(lengths_k) or not lengths_q:
            raise ValueError(f"{len(lengths_q)} query lengths, {len(lengths_k)} key lengths")
        for number, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            if n_q < 1 or n_k < 1:
                raise ValueError(f"problem {number} is empty: {n_q} queries, {n_k} keys")
            if causal and n_k < n_q:
                raise ValueError(
                    f"causal problem {number} has {n_q} queries and only {n_k} keys: its first "
                    f"{n_q - n_k} queries would see nothing"
                )
        longest = max(sum(lengths_q), sum(lengths_k))
        if longest > INT32_MAX:
            raise ValueError(f"{longest} rows do not fit into int32 cu_seqlens")
        return cls(
            lengths_q, lengths_k, _cumulative(lengths_q), _cumulative(lengths_k), causal=causal
        )

    @cached_property
    def num_q(self) -> int:
        """Queries of the call."""
        return sum(self.lengths_q)

    @cached_property
    def num_k(self) -> int:
        """Keys of the call; a row counts once for each problem that has it."""
        return sum(self.lengths_k)

    @cached_property
    def max_seqlen_q(self) -> int:
        """Longest query side, a host integer."""
        return max(self.lengths_q)

    @cached_property
    def max_seqlen_k(self) -> int:
        """Longest key side, a host integer."""
        return max(self.lengths_k)

    def map(self, move: Callable[[Tensor], Tensor]) -> "PlanCall":
        """Return the call with `move(tensor)` in place of every tensor."""
        return replace(
            self, cu_seqlens_q=move(self.cu_seqlens_q), cu_seqlens_k=move(self.cu_seqlens_k)
        )


@dataclass(frozen=True)
class Bucket:
    """`count` problems that all have `n_q` queries and `n_k` keys."""

    count: int
    n_q: int
    n_k: int
    causal: bool


@dataclass(frozen=True, eq=False)
class Buckets:
    """The problems of all calls with those of one shape next to each other (for `split`)."""

    shapes: tuple[Bucket, ...]
    queries: RowGather | None  # rows of the pack -> rows bucket by bucket
    keys: RowGather | None

    @cached_property
    def restore(self) -> RowGather | None:
        """The gather that puts results of the buckets back into the pack's order."""
        return None if self.queries is None else self.queries.inverse()

    def map(self, move: Callable[[Tensor], Tensor]) -> "Buckets":
        """Return the buckets with `move(tensor)` in place of every tensor."""
        return replace(self, queries=_moved(self.queries, move), keys=_moved(self.keys, move))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Everything a kernel needs to know about who sees whom in one pack of T tokens."""

    num_tokens: int  # T
    calls: tuple[PlanCall, ...]  # one or two; together they hold every row once as a query
    query_rows: tuple[Tensor, ...]  # per call: rows of the pack that are its queries, int64;
    # none at all where the one call takes every row in order
    keys: RowGather | None  # rows of the pack -> keys of the calls, one after another
    lo: Tensor  # (M, T) int32: row t sees the union over m of [lo[m, t], hi[m, t])
    hi: Tensor  # (M, T) int32
    visible_area: int  # number of (row, key) pairs that are visible: what FLOPs are counted from
    host: "AttentionPlan | None" = field(default=None, repr=False)  # what `to` moved from

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.lo.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, what `split` adds to them on first use not counted."""
        gathered = () if self.keys is None else self.keys.tensors
        cumulated = [t for call in self.calls for t in (call.cu_seqlens_q, call.cu_seqlens_k)]
        return sum(t.nbytes for t in (*self.query_rows, *gathered, *cumulated, self.lo, self.hi))

    @cached_property
    def buckets(self) -> Buckets:
        """The problems grouped by shape; worked out on the host."""
        if self.host is not None:
            return self.host.buckets.map(lambda tensor: moved_to(tensor, self.device))
        with torch.inference_mode(False):  # a plan first used in evaluation may be trained with
            return _buckets(self)

    def visibility(self) -> Tensor:
        """Return the dense table (T, T), bool. For tests, pictures and the dense reference."""
        columns = torch.arange(self.num_tokens, device=self.device)
        inside = (columns >= self.lo[..., None]) & (columns < self.hi[..., None])
        return inside.any(dim=0)

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """Return the plan with its tensors on `device`; the host numbers stay."""
        if self.device == torch.device(device):
            return self
        moved = self._map(lambda tensor: moved_to(tensor, device))
        return replace(moved, host=self.host or self)

    def pin_memory(self) -> "AttentionPlan":
        """Return the plan in page-locked memory, so that `to` does not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "AttentionPlan":
        return replace(
            self,
            calls=tuple(call.map(move) for call in self.calls),
            query_rows=tuple(map(move, self.query_rows)),
            keys=_moved(self.keys, move),
            lo=move(self.lo),
            hi=move(self.hi),
        )


def moved_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`. Only copies to a GPU run beside the host's work.

    Back to the host they would too, and leave memory that is read before it is written.
    """
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def _moved(gather: RowGather | None, move: Callable[[Tensor], Tensor]) -> RowGather | None:
    return None if gather is None else gather.map(move)


def _cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))


def _buckets(plan: AttentionPlan) -> Buckets:
    """Order problems by causality and shape (stable), and their rows with them."""
    problems = sorted(_problems(plan), key=lambda problem: problem[:3])
    shapes = [
        Bucket(count=len(list(group)), n_q=n_q, n_k=n_k, causal=causal)
        for (causal, n_q, n_k), group in groupby(problems, key=lambda problem: problem[:3])
    ]
    lengths_q, lengths_k, starts_q, starts_k = np.array([p[1:] for p in problems]).T
    rows_q, rows_k = expand_ranges(starts_q, lengths_q), expand_ranges(starts_k, lengths_k)
    if plan.query_rows:
        rows_q = torch.cat(plan.query_rows).numpy()[rows_q].astype(np.int32)
    if plan.keys is not None:
        rows_k = plan.keys.index.numpy()[rows_k]
    return Buckets(
        tuple(shapes),
        RowGather.of(rows_q, plan.num_tokens),
        RowGather.of(rows_k, plan.num_tokens),
    )


def _problems(plan: AttentionPlan) -> Iterator[tuple[bool, int, int, int, int]]:
    """Yield (causal, n_q, n_k, first query, first key) of every problem, in the calls' order."""
    start_q = start_k = 0
    for call in plan.calls:
        for n_q, n_k in zip(call.lengths_q, call.lengths_k, strict=True):
            yield call.causal, n_q, n_k, start_q, start_k
            start_q, start_k = start_q + n_q, start_k + n_k


def expand_ranges(starts: Index, lengths: Index) -> Index:
    """Return the rows of ranges [start, start + length), one range after another; int32."""
    ends = np.cumsum(lengths)
    first = np.repeat(starts - (ends - lengths), lengths)
    return (first + np.arange(len(first))).astype(np.int32)
