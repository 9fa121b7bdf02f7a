"""InfoNCE (arXiv 1807.03748, eq. 4) over the candidates of all ranks, gathered with gradient.

Candidates that are the same thing as a query's own target (equal identity: text and picture) are
no negatives and leave the denominator. Records that could not be used count neither as queries
nor as candidates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.distributed import all_gather_with_grad, gather_rows, rank
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.objectives.base import BRIDGE_MEASURES, Measures, measure_bridge

QUERY, TARGET = 0, 1


@dataclass(frozen=True)
class Pairs:
    """A rank's pairs of one step, in the order of the plan."""

    query_BD: Tensor
    target_BD: Tensor
    identity_B: Tensor  # int64
    weight_B: Tensor  # float32, 1 or 0


class Contrastive:
    """Cross-entropy of each query's own target among all candidates, in nats per query."""

    heads = HeadsConfig(embeddings=True)
    weights: Mapping[str, float] = {"contrastive": 1.0}
    step_wide = True

    def __init__(
        self, *, temperature: float, symmetric: bool = False, mask_false_negatives: bool = True
    ) -> None:
        """`symmetric` adds the same term from target to query."""
        self.measures = Measures(
            *("distances", "pairs", "closeness", "couples", "squares", "left_out"),
            *BRIDGE_MEASURES,
        )
        self.temperature = temperature
        self.directions = 2 if symmetric else 1
        self.mask_false_negatives = mask_false_negatives

    def counts(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Usable queries, once for each direction."""
        usable = sum(float(pack.pair_weights[pack.sides == QUERY].sum()) for pack in packs)
        return {"contrastive": self.directions * usable}

    def sums(
        self, outputs: Sequence[ModelOutput], packs: Sequence[PackedBatch]
    ) -> dict[str, Tensor]:
        """Sum over this rank's queries. Collective: call on all ranks, with equal B."""
        pairs = _pairs(outputs, packs)
        count = len(pairs.query_BD)
        both = all_gather_with_grad(torch.stack([pairs.query_BD, pairs.target_BD], dim=1))
        identity_N, weight_N = gather_rows(pairs.identity_B), gather_rows(pairs.weight_B)
        own_B = torch.arange(count, device=identity_N.device) + rank() * count
        hidden_BN = self._hidden(pairs.identity_B, identity_N, weight_N, own_B)
        total = self._direction(pairs.query_BD, both[:, 1], hidden_BN, own_B, pairs.weight_B)
        if self.directions == 2:
            total = total + self._direction(
                pairs.target_BD, both[:, 0], hidden_BN, own_B, pairs.weight_B
            )
        self._measure(pairs, both[:, 1], weight_N, own_B, hidden_BN)
        for output, pack in zip(outputs, packs, strict=True):
            measure_bridge(self.measures, output, pack)
        return {"contrastive": total}

    @torch.no_grad()
    def _measure(
        self, pairs: Pairs, target_ND: Tensor, weight_N: Tensor, own_B: Tensor, hidden_BN: Tensor
    ) -> None:
        """Add up how the unit vectors of usable pairs lie to each other."""
        target_BD, weight_B = pairs.target_BD.detach(), pairs.weight_B
        cosine_BN = target_BD @ target_ND.detach().T
        weight_BN = weight_B[:, None] * weight_N[None, :]
        other_BN = weight_BN.scatter(1, own_B[:, None], 0.0)
        distance_B = (pairs.query_BD.detach() - target_BD).square().sum(dim=1)
        self.measures.add(
            distances=(distance_B * weight_B).sum(),
            pairs=weight_B.sum(),
            closeness=((4.0 * cosine_BN - 4.0).exp() * other_BN).sum(),
            couples=other_BN.sum(),
            squares=(cosine_BN.square() * weight_BN).sum(),
            left_out=(hidden_BN * other_BN).sum(),
        )

    def health(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Give alignment, uniformity, effective rank of the targets, share of false negatives.

        Alignment and uniformity: arXiv 2005.10242, alpha = 2 and t = 2; over unit vectors.
        Effective rank: (tr C)^2 / tr C^2 of the targets' second moments C, 1 when all are alike and
        the number of dimensions when all are used alike.
        """
        health = {}
        if measured["bridges"]:
            health["token_similarity"] = measured["alike"] / measured["bridges"]
        if measured["pairs"]:
            health["alignment"] = measured["distances"] / measured["pairs"]
        if measured["squares"]:
            health["effective_rank"] = measured["pairs"] ** 2 / measured["squares"]
        if measured["couples"]:
            health["false_negative_ratio"] = measured["left_out"] / measured["couples"]
            if measured["closeness"] > 0:
                health["uniformity"] = math.log(measured["closeness"] / measured["couples"])
        return health

    def _hidden(
        self, identity_B: Tensor, identity_N: Tensor, weight_N: Tensor, own_B: Tensor
    ) -> Tensor:
        """Mark candidates that are no negatives of a query; never its own target."""
        hidden_BN = (weight_N == 0)[None, :].expand(len(identity_B), -1).clone()
        if self.mask_false_negatives:
            hidden_BN |= identity_B[:, None] == identity_N[None, :]
        hidden_BN[torch.arange(len(own_B), device=own_B.device), own_B] = False
        return hidden_BN

    def _direction(
        self, from_BD: Tensor, to_ND: Tensor, hidden_BN: Tensor, own_B: Tensor, weight_B: Tensor
    ) -> Tensor:
        logits_BN = (from_BD @ to_ND.T / self.temperature).masked_fill(hidden_BN, -torch.inf)
        loss_B = F.cross_entropy(logits_BN, own_B, reduction="none")
        return (loss_B * weight_B).sum()


def _pairs(outputs: Sequence[ModelOutput], packs: Sequence[PackedBatch]) -> Pairs:
    """Bring the embeddings of all packs into pair order; queries and targets apart."""
    embeddings = torch.cat([_embeddings(output) for output in outputs])
    sides = torch.cat([pack.sides for pack in packs])
    pair_ids = torch.cat([pack.pair_ids for pack in packs])
    weights = torch.cat([pack.pair_weights for pack in packs])
    identities = torch.cat([pack.identities for pack in packs])
    rows = {}
    for side in (QUERY, TARGET):
        of_side = (sides == side).nonzero()[:, 0]
        rows[side] = of_side[pair_ids[of_side].argsort(stable=True)]
    assert torch.equal(pair_ids[rows[QUERY]], pair_ids[rows[TARGET]]), "a pair lost a side"
    return Pairs(
        query_BD=embeddings[rows[QUERY]],
        target_BD=embeddings[rows[TARGET]],
        identity_B=identities[rows[TARGET]],
        weight_B=weights[rows[TARGET]],
    )


def _embeddings(output: ModelOutput) -> Tensor:
    assert output.embeddings_ED is not None
    return output.embeddings_ED
