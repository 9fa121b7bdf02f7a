"""Row gathers whose backward is a gather too: exact, repeatable, without atomics.

PyTorch turns the gradient of `index_select` into an `index_add`: row by row on the CPU, atomics in
no fixed order on a GPU. Who uses a row is known when the plan is made, so the gradient is written
as sums in a fixed order instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Index = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class RowGather:
    """Takes rows of an (N, ...) tensor; every row is taken at least once.

    The backward pass starts from each row's first use and adds the further uses, one round for
    each: within a round no row occurs twice, so nothing depends on the order of execution.
    """

    index: Tensor  # (R,) int32: row of the input that each row of the output is
    first_use: Tensor  # (N,) int32: where in the output each row occurs first
    further_uses: tuple[tuple[Tensor, Tensor], ...]  # (rows, uses), both (n,) int32

    @classmethod
    def of(cls, index: Index, num_rows: int) -> "RowGather | None":
        """Plan a gather of `num_rows` rows; None where it would change nothing.

        Raises ValueError if a row is never taken: its gradient would be lost without a word.
        """
        if len(index) == num_rows and bool((index == np.arange(num_rows)).all()):
            return None
        uses = np.bincount(index, minlength=num_rows)
        if len(uses) != num_rows or not uses.all():
            raise ValueError(
                f"a gather of {num_rows} rows must take each at least once; rows from 0 to "
                f"{len(uses) - 1} occur, {int((uses[:num_rows] == 0).sum())} never"
            )
        order = np.argsort(index, kind="stable").astype(np.int32)
        first = np.cumsum(uses) - uses
        rounds = []
        for turn in range(1, int(uses.max())):
            rows = np.flatnonzero(uses > turn).astype(np.int32)
            rounds.append((torch.from_numpy(rows), torch.from_numpy(order[first[rows] + turn])))
        return cls(torch.from_numpy(index), torch.from_numpy(order[first]), tuple(rounds))

    @property
    def is_permutation(self) -> bool:
        """Whether every row is taken exactly once."""
        return not self.further_uses

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors held."""
        return (self.index, self.first_use, *(t for pair in self.further_uses for t in pair))

    def inverse(self) -> "RowGather":
        """Return the gather that puts rows back; only for a permutation."""
        if not self.is_permutation:
            raise ValueError("a gather that takes rows more than once has no inverse")
        return RowGather(self.first_use, self.index, ())

    def map(self, move: Any) -> "RowGather":
        """Return the gather with `move(tensor)` in place of every tensor."""
        pairs = tuple((move(rows), move(uses)) for rows, uses in self.further_uses)
        return RowGather(move(self.index), move(self.first_use), pairs)


def gather_rows(rows: Tensor, gather: RowGather | None) -> Tensor:
    """Take rows (N, ...) -> (R, ...); None takes them as they are."""
    if gather is None:
        return rows
    taken: Tensor = _GatherRows.apply(rows, gather)  # type: ignore[no-untyped-call]
    return taken


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: RowGather) -> Tensor:
        ctx.gather = gather
        return rows.index_select(0, gather.index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gather: RowGather = ctx.gather
        total = gradient.index_select(0, gather.first_use)
        for rows, uses in gather.further_uses:
            total.index_add_(0, rows, gradient.index_select(0, uses))
        return total, None


def part_rows(rows: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Take rows (N, ...) apart: part p holds rows `indices[p]`; together they hold each row once.

    No index at all: every row in order is the one part, which costs nothing.
    """
    if not indices:
        return (rows,)
    parts: tuple[Tensor, ...] = _PartRows.apply(rows, *indices)  # type: ignore[no-untyped-call]
    return parts


def place_rows(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Undo `part_rows`."""
    if not indices:
        return parts[0]
    placed: Tensor = _PlaceRows.apply(indices, *parts)  # type: ignore[no-untyped-call]
    return placed


def _placed(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    rows = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for part, index in zip(parts, indices, strict=True):
        rows.index_copy_(0, index, part)
    return rows


class _PartRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.indices = indices
        return tuple(rows.index_select(0, index) for index in indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (_placed(gradients, ctx.indices), *(None for _ in ctx.indices))


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Sequence[Tensor], *parts: Tensor) -> Tensor:
        ctx.indices = indices
        return _placed(parts, indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(gradient.index_select(0, index) for index in ctx.indices))
