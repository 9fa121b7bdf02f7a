"""Deals the records of a step to ranks, in equal numbers and equal work, and a rank's to packs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_NODE = -1
_BALANCED = 1.01  # the most that a rank may have of the mean of a unit, if swaps can do it
_SWAPS = 256
_CANDIDATES = 48  # records of a rank that are looked at for a swap
_TRIED = 96  # waiting items that are looked at to fill a bin tightly


def deal(
    sizes: NDArray[np.integer[Any]], *, num_ranks: int, num_nodes: int = 1, node: Ints | None = None
) -> list[Ints]:
    """Deal items to ranks: equally many to each, and as nearly as can be equally much.

    `sizes` is (items, units), such as tokens and patches; every unit is balanced. `node`: where
    each item is at hand (NO_NODE: anywhere); nearly all stay there, some are swapped for balance.
    The ranks of a node are neighbours. Returns each rank's items in ascending order. Raises
    ValueError if the items do not divide.
    """
    count = len(sizes)
    if count % num_ranks or num_ranks % num_nodes:
        raise ValueError(f"{count} items, {num_ranks} ranks, {num_nodes} nodes do not divide")
    shares = _shares(sizes)
    at_home = _equal_parts(node, count=count, num_nodes=num_nodes)
    members = np.concatenate(
        [_snake(items, shares[items].sum(axis=1), num_ranks // num_nodes) for items in at_home]
    )
    _swap_until_balanced(members, shares)
    return [np.sort(items) for items in members]


def greedy_knapsack(lengths: NDArray[np.integer[Any]], budgets: Sequence[int]) -> list[Ints]:
    """Put items into few bins that keep every budget, largest first; deterministic.

    `lengths` is (items, units), one or two units, such as tokens and patches; an item is as large
    as the largest share of a budget that it takes. Fills one bin after the other with the largest
    item that still fits: research in packing says that no cleverer rule is worth its time.
    Raises ValueError for an item that fits into no bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    limits = np.asarray(budgets, dtype=np.int64)
    too_large = np.flatnonzero((sizes > limits).any(axis=1))
    if len(too_large):
        first = int(too_large[0])
        raise ValueError(f"item {first} has size {sizes[first].tolist()}, budgets are {budgets}")
    order = np.argsort(-(sizes / limits).max(axis=1), kind="stable")
    if (sizes.sum(axis=0) <= limits).all():
        return [order] if len(order) else []
    return _fill(order, sizes, limits)


def pack_ranks(
    sizes: NDArray[np.integer[Any]], parts: Sequence[Ints], budgets: Sequence[int]
) -> list[list[Ints]]:
    """Put the items of each rank into bins, of which all ranks need as many as the neediest one.

    `sizes` is (items, units); a part holds a rank's items. Where a rank needs more bins than any
    rank's items would fill, it is packed again with more care. Returns items by rank and bin.
    """
    found = [greedy_knapsack(sizes[items], budgets) for items in parts]
    loads = np.stack([sizes[items].sum(axis=0) for items in parts]) / np.asarray(budgets)
    fewest = int(np.ceil(loads.max() - 1e-9))
    for rank, items in enumerate(parts):
        if len(found[rank]) > fewest:
            again = tight_knapsack(sizes[items], budgets)
            found[rank] = min(found[rank], again, key=len)
    return [[items[inside] for inside in bins] for items, bins in zip(parts, found, strict=True)]


def tight_knapsack(lengths: NDArray[np.integer[Any]], budgets: Sequence[int]) -> list[Ints]:
    """Put items into bins as greedy_knapsack does, each bin as nearly full as can be.

    The largest waiting item and those of some others whose sizes add up to most of the room, by
    the unit that is scarcest; sums that can be reached are the bits of an integer. Some ten times
    slower. Raises ValueError for an item that fits into no bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    limits = np.asarray(budgets, dtype=np.int64)
    if (sizes > limits).any():
        return greedy_knapsack(lengths, budgets)  # which names the item
    scarce = int((sizes.sum(axis=0) / limits).argmax())
    waiting = np.argsort(-(sizes / limits).max(axis=1), kind="stable")
    bins: list[Ints] = []
    while len(waiting):
        others = waiting[1:][:: -(-len(waiting) // _TRIED)]
        room = limits - sizes[waiting[0]]
        inside = [waiting[0], *others[_fullest_sum(sizes[others], room, scarce)]]
        room = limits - sizes[inside].sum(axis=0)
        waiting = waiting[~np.isin(waiting, inside)]
        while len(fitting := np.flatnonzero((sizes[waiting] <= room).all(axis=1))):
            inside.append(waiting[fitting[0]])  # the largest that the others have left room for
            room = room - sizes[inside[-1]]
            waiting = np.delete(waiting, fitting[0])
        bins.append(np.array(inside, dtype=np.int64))
    return bins


def _fullest_sum(sizes: Ints, room: Ints, scarce: int) -> list[int]:
    """Return rows that together take most of the room in a unit, as far as all units allow."""
    steps = sizes[:, scarce].tolist()
    mask = (1 << (int(room[scarce]) + 1)) - 1
    reached = [1]  # bit n: some of the rows before add up to n
    for step in steps:
        reached.append((reached[-1] | (reached[-1] << step)) & mask)
    total, chosen = reached[-1].bit_length() - 1, []
    left = room.copy()
    for row in range(len(steps) - 1, -1, -1):
        if reached[row] >> total & 1:
            continue
        total -= steps[row]
        if (sizes[row] <= left).all():
            left = left - sizes[row]
            chosen.append(row)
    return chosen


def _fill(order: Ints, sizes: Ints, limits: Ints) -> list[Ints]:
    """Fill bins in the given order of items. The inner loop runs some 40,000 times a large step."""
    padded = np.zeros((len(sizes), 2), dtype=np.int64)
    padded[:, : sizes.shape[1]] = sizes
    limit_a, limit_b = (*limits.tolist(), 0)[:2]
    waiting = [(index, *padded[index].tolist()) for index in order.tolist()]
    bins: list[Ints] = []
    while waiting:
        room_a, room_b = limit_a, limit_b
        inside, left = [], []
        for item in waiting:
            index, a, b = item
            if a <= room_a and b <= room_b:
                inside.append(index)
                room_a -= a
                room_b -= b
            else:
                left.append(item)
        bins.append(np.array(inside, dtype=np.int64))
        waiting = left
    return bins


def _shares(sizes: NDArray[np.integer[Any]]) -> Floats:
    """Return sizes as shares of the mean of each unit; a unit that nothing has is left out."""
    means = sizes.mean(axis=0)
    used = means > 0
    return np.asarray(sizes[:, used] / means[used], dtype=np.float64)


def _equal_parts(node: Ints | None, *, count: int, num_nodes: int) -> list[Ints]:
    """Part items by node, equally many to each; what a node has too many of goes where room is."""
    if node is None or num_nodes == 1:
        node = np.full(count, NO_NODE if num_nodes > 1 else 0)
    quota = count // num_nodes
    own = [np.flatnonzero(node == number)[:quota] for number in range(num_nodes)]
    homeless = np.setdiff1d(np.arange(count), np.concatenate(own))
    parts, begin = [], 0
    for items in own:
        end = begin + quota - len(items)
        parts.append(np.concatenate([items, homeless[begin:end]]))
        begin = end
    return parts


def _snake(items: Ints, load: Floats, num_ranks: int) -> Ints:
    """Deal items to ranks, heaviest first and back and forth; returns (ranks, items of each)."""
    heaviest_first = items[np.argsort(-load, kind="stable")]
    rounds = heaviest_first.reshape(-1, num_ranks).copy()
    rounds[1::2] = rounds[1::2, ::-1]
    return np.ascontiguousarray(rounds.T)


def _swap_until_balanced(members: Ints, shares: Floats) -> None:
    """Swap items between the rank that has most of a unit and the one that has least of it."""
    sums = shares[members].sum(axis=1)
    mean = sums.mean(axis=0)
    if not len(mean):
        return
    for _ in range(_SWAPS):
        relative = sums / mean
        most, unit = np.unravel_index(int(relative.argmax()), relative.shape)
        least = int(relative[:, unit].argmin())
        if relative[most, unit] <= _BALANCED:
            return
        from_most, from_least = (_candidates(members[rank]) for rank in (most, least))
        moved = shares[members[most, from_most]][:, None] - shares[members[least, from_least]][None]
        after = np.maximum(sums[most] - moved, sums[least] + moved) / mean
        worst = after.max(axis=2)
        i, j = np.unravel_index(int(worst.argmin()), worst.shape)
        if worst[i, j] >= relative[[most, least]].max():
            return
        a, b = (most, from_most[i]), (least, from_least[j])
        members[a], members[b] = members[b], members[a]
        sums[most] -= moved[i, j]
        sums[least] += moved[i, j]


def _candidates(items: Ints) -> Ints:
    """Return the places of a rank's items to look at: all, or some of every size."""
    return np.arange(0, len(items), -(-len(items) // _CANDIDATES))
