"""What the queries of a step are compared with: the targets and hard negatives of all ranks.

Gathered with gradient. A candidate is hidden from a query, and so no negative of it, if it could
not be used, is the same thing as the query's own target, or lies closer than that by a margin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.distributed import all_gather_with_grad, gather_rows, rank
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.objectives.matching import first, similarities

QUERY, TARGET, NEGATIVE = 0, 1, 2  # sides of a pair; its further negatives count on


@dataclass(frozen=True)
class Pairs:
    """A rank's pairs of one step, in the order of the plan; K hard negatives each.

    Where an embedding is several vectors, D stands for two dimensions: vectors, width.
    """

    query_BD: Tensor
    target_BD: Tensor
    identity_B: Tensor  # int64, of the records
    drawn_B: Tensor  # int64, of the targets: another one where a record has several
    weight_B: Tensor  # float32, 1 or 0
    negative_BKD: Tensor
    label_BK2: Tensor  # int64, of the negatives: identity, content
    weight_BK: Tensor  # float32, 0 for a negative that the record lacks
    content_B: Tensor  # int64, of the targets; meaningful where K > 0
    score_BS: Tensor  # float32, a teacher's, of the target and the negatives; NaN: none


@dataclass(frozen=True)
class Candidates:
    """Rows that a rank's B queries are compared with, and which are left out for which."""

    rows_CD: Tensor  # targets of all ranks, then their negatives; or all queries
    hidden_BC: Tensor  # bool
    own_B: Tensor  # int64: the column that is right

    def cut(self, dimension: int) -> "Candidates":
        """Return the candidates by the first dimensions of their vectors, unit length again."""
        return Candidates(first(self.rows_CD, dimension), self.hidden_BC, self.own_B)


@dataclass(frozen=True)
class Gathered:
    """Both directions of a step, and what measures are taken of."""

    to_targets: Candidates
    to_queries: Candidates
    weight_N: Tensor  # of the pairs of all ranks
    hard_weight_H: Tensor  # of their negatives


def pairs_of(
    outputs: Sequence[ModelOutput],
    packs: Sequence[PackedBatch],
    *,
    negatives: int = 0,
    scored: bool = False,
) -> Pairs:
    """Bring the embeddings of all packs into pair order; queries, targets and negatives apart."""
    embeddings = torch.cat([_embeddings(output) for output in outputs])
    pair_ids = torch.cat([pack.pair_ids for pack in packs])
    weights = torch.cat([pack.pair_weights for pack in packs])
    identities = torch.cat([pack.identities for pack in packs])
    rows_SB = _rows_of_sides(packs, negatives=negatives)
    query_B, target_B, *negative_KB = rows_SB
    assert all(torch.equal(pair_ids[query_B], pair_ids[rows_B]) for rows_B in rows_SB[1:]), (
        "a pair lost a side"
    )
    count = len(query_B)
    negative_BK = torch.stack(negative_KB, dim=1) if negatives else query_B.new_zeros(count, 0)
    labels_E2 = torch.zeros(len(pair_ids), 2, dtype=torch.int64, device=query_B.device)
    if negatives:  # else nobody may have filled them in
        contents = torch.cat([pack.contents for pack in packs])
        labels_E2 = torch.stack([identities, contents], dim=1)
    score_BS = weights.new_zeros(count, 0)
    if scored:
        scores = torch.cat([pack.scores for pack in packs])
        score_BS = scores[torch.stack(rows_SB[1:], dim=1)]
    return Pairs(
        query_BD=embeddings[query_B],
        target_BD=embeddings[target_B],
        identity_B=identities[query_B],
        drawn_B=identities[target_B],
        weight_B=weights[target_B],
        negative_BKD=embeddings[negative_BK]
        if negatives
        else embeddings.new_zeros(count, 0, *embeddings.shape[1:]),
        label_BK2=labels_E2[negative_BK],
        weight_BK=weights[negative_BK],
        content_B=labels_E2[target_B, 1],
        score_BS=score_BS,
    )


def _rows_of_sides(packs: Sequence[PackedBatch], *, negatives: int) -> list[Tensor]:
    """Return, for each side, the rows of its embeddings (B,), in the order of the pairs."""
    sides = torch.cat([pack.sides for pack in packs])
    pair_ids = torch.cat([pack.pair_ids for pack in packs])
    found = []
    for side in range(2 + negatives):
        of_side = (sides == side).nonzero()[:, 0]
        found.append(of_side[pair_ids[of_side].argsort(stable=True)])
    return found


def gather(
    pairs: Pairs,
    *,
    mask_false_negatives: bool,
    margin: float | None = None,
    guided: Pairs | None = None,
    guide_margin: float = 0.0,
) -> Gathered:
    """Gather the candidates of all ranks. Collective: call on all ranks, with equal B and K.

    `margin`: also hide what is more similar to a query than its target by more than this; and
    `guide_margin` by the embeddings of another model, `guided`.
    """
    count, num_negatives = pairs.weight_BK.shape
    ways = _both_ways(pairs, all_gather_with_grad(_all_sides(pairs)))
    judges = [] if margin is None else [(ways, margin)]
    if guided is not None:
        judges.append((_both_ways(guided, gather_rows(_all_sides(guided))), guide_margin))
    known_B2 = torch.stack([pairs.identity_B, pairs.drawn_B], dim=1)
    known_N2, weight_N = gather_rows(known_B2), gather_rows(pairs.weight_B)
    own_B = torch.arange(count, device=known_N2.device) + rank() * count
    hidden_BN = (weight_N == 0)[None, :].expand(count, -1).clone()
    if mask_false_negatives:
        hidden_BN |= (known_B2[:, None] == known_N2[None]).any(dim=-1)
    hidden_BC = hidden_BN
    weight_H = weight_N.new_zeros(0)
    if num_negatives:
        weight_H = gather_rows(pairs.weight_BK).flatten()
        hidden_BH = (weight_H == 0)[None, :].expand(count, -1)
        if mask_false_negatives:
            hidden_BH = hidden_BH | _same_as_target(pairs)
        hidden_BC = torch.cat([hidden_BN, hidden_BH], dim=1)
    both = []
    for way, hidden in enumerate((hidden_BC, hidden_BN)):
        left_out = hidden.clone()
        for judged, most in judges:
            left_out |= _closer(judged[way], own_B, margin=most)
        left_out[torch.arange(count, device=own_B.device), own_B] = False
        both.append(Candidates(ways[way].rows_CD, left_out, own_B))
    return Gathered(both[0], both[1], weight_N, weight_H)


@dataclass(frozen=True)
class _Way:
    """One direction: what asks, and all candidates."""

    from_BD: Tensor
    rows_CD: Tensor


def _all_sides(pairs: Pairs) -> Tensor:
    sides = [pairs.query_BD[:, None], pairs.target_BD[:, None], pairs.negative_BKD]
    return torch.cat(sides, dim=1)


def _both_ways(pairs: Pairs, all_NSD: Tensor) -> tuple[_Way, _Way]:
    """Return queries to targets, then to their hard negatives; and targets to queries."""
    targets_CD = all_NSD[:, TARGET]
    if pairs.weight_BK.shape[1]:
        targets_CD = torch.cat([targets_CD, all_NSD[:, NEGATIVE:].flatten(0, 1)])
    return _Way(pairs.query_BD, targets_CD), _Way(pairs.target_BD, all_NSD[:, QUERY])


def _same_as_target(pairs: Pairs) -> Tensor:
    """Mark the hard negatives of all ranks that are what a query looks for (B, H). Collective."""
    label_H2 = gather_rows(pairs.label_BK2).flatten(0, 1)
    same_identity_BH = pairs.identity_B[:, None] == label_H2[None, :, 0]
    return same_identity_BH | (pairs.content_B[:, None] == label_H2[None, :, 1])


@torch.no_grad()
def _closer(way: _Way, own_B: Tensor, *, margin: float) -> Tensor:
    """Mark what is more similar than the own candidate by more than `margin`, as it is now."""
    similar_BC = similarities(way.from_BD, way.rows_CD)
    return similar_BC > similar_BC.gather(1, own_B[:, None]) + margin


def _embeddings(output: ModelOutput) -> Tensor:
    assert output.embeddings_ED is not None
    return output.embeddings_ED
