"""Queries against the candidates of all ranks: InfoNCE or sigmoid, by one or several dimensions.

Candidates are the targets and hard negatives of the whole step, gathered with gradient; see
candidates.py for what is left out for whom. Records that could not be used count neither as
queries nor as candidates.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import ContrastiveConfig
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.model.heads import HeadsConfig, SimilarityStart
from cocoa_dist.objectives.base import BRIDGE_MEASURES, Measures, measure_bridge
from cocoa_dist.objectives.candidates import (
    QUERY,
    TARGET,
    Candidates,
    Gathered,
    Pairs,
    gather,
    pairs_of,
)
from cocoa_dist.objectives.matching import end_to_end, first, own_similarities
from cocoa_dist.objectives.similarity import distillation_sum, info_nce_sum, sigmoid_sum

log = logging.getLogger("cocoa_dist.objectives")

TERM, DISTILLATION = "contrastive", "distillation"
_ALWAYS = ("distances", "pairs", "closeness", "couples", "squares", "left_out")
_SHARES = {
    "false_negative_ratio": ("left_out", "couples"),
    "missing_negative_ratio": ("missing", "wanted"),
    "hidden_negative_ratio": ("hard_left_out", "hard_couples"),
    "temperature": ("temperatures", "steps"),
    "similarity_bias": ("biases", "steps"),
}


class Contrastive:
    """Each query's own target among all candidates, in nats per query."""

    step_wide = True

    def __init__(self, config: ContrastiveConfig, *, negatives: int = 0) -> None:
        """`negatives`: hard negatives of each pair, K."""
        self.config, self.negatives = config, negatives
        self.directions = 2 if config.symmetric else 1
        start = None
        if config.learnable_temperature:
            bias = config.bias if config.loss == "sigmoid" else None
            start = SimilarityStart(1.0 / config.temperature, config.max_scale, bias)
        self.heads = HeadsConfig(embeddings=True, similarity=start)
        parts = config.matryoshka_weights or (1.0,) * len(config.matryoshka)
        self._dimensions = {f"{TERM}_{size}": size for size in config.matryoshka}
        self.weights: Mapping[str, float] = {TERM: 1.0}
        if self._dimensions:
            shares = zip(self._dimensions, parts, strict=True)
            self.weights = {name: part / sum(parts) for name, part in shares}
        if config.distillation_weight:
            self.weights = {**self.weights, DISTILLATION: config.distillation_weight}
        self.measures = Measures(
            *_ALWAYS,
            *BRIDGE_MEASURES,
            *(("missing", "wanted", "hard_couples", "hard_left_out") if negatives else ()),
            *(("temperatures", "biases", "steps") if start else ()),
            *(("scored",) if config.distillation_weight else ()),
        )
        # Embeds packs by a frozen model, where `config.guide` names one; given before training.
        self.guide: Callable[[PackedBatch], Tensor] | None = None
        self._told = False  # that a step had no scores

    def counts(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Usable queries, once for each direction; for the teacher's term those it has scored."""
        usable = sum(float(pack.pair_weights[pack.sides == QUERY].sum()) for pack in packs)
        counts = dict.fromkeys(self.weights, self.directions * usable)
        if DISTILLATION in counts:
            targets = [(pack, pack.sides == TARGET) for pack in packs]
            scored = [p.pair_weights[at] * ~p.scores[at].isnan() for p, at in targets]
            counts[DISTILLATION] = sum(float(part.sum()) for part in scored)
        return counts

    def sums(
        self, outputs: Sequence[ModelOutput], packs: Sequence[PackedBatch]
    ) -> dict[str, Tensor]:
        """Sum over this rank's queries. Collective: call on all ranks, with equal B."""
        config = self.config
        pairs = pairs_of(
            outputs, packs, negatives=self.negatives, scored=DISTILLATION in self.weights
        )
        gathered = gather(
            pairs,
            mask_false_negatives=config.mask_false_negatives,
            margin=config.false_negative_margin,
            guided=self._guided(packs),
            guide_margin=config.guide_margin,
        )
        temperature, bias = self._scale(outputs)
        sums = {}
        for name in self.weights:
            size = self._dimensions.get(name)
            if name != DISTILLATION:
                sums[name] = self._term(pairs, gathered, size, temperature=temperature, bias=bias)
        if DISTILLATION in self.weights:
            sums[DISTILLATION] = self._distilled(pairs, temperature=temperature)
        self._measure(pairs, gathered)
        for output, pack in zip(outputs, packs, strict=True):
            measure_bridge(self.measures, output, pack)
        return sums

    def _guided(self, packs: Sequence[PackedBatch]) -> Pairs | None:
        """Return the pairs as the guide embeds them, one pack after the other."""
        if self.config.guide is None:
            return None
        assert self.guide is not None, "build_engine gives it"
        outputs = [ModelOutput(embeddings_ED=self.guide(pack)) for pack in packs]
        return pairs_of(outputs, packs, negatives=self.negatives)

    def _scale(self, outputs: Sequence[ModelOutput]) -> tuple[Tensor | float, Tensor | float]:
        """Return temperature and bias; a trained one is in every output, so that each is used."""
        trained = [output.similarity for output in outputs if output.similarity is not None]
        if not trained:
            return self.config.temperature, self.config.bias
        scale, bias = torch.stack(trained).mean(dim=0)
        self.measures.add(temperatures=1.0 / scale, biases=bias, steps=1.0)
        return 1.0 / scale, bias

    def _term(
        self,
        pairs: Pairs,
        gathered: Gathered,
        size: int | None,
        *,
        temperature: Tensor | float,
        bias: Tensor | float,
    ) -> Tensor:
        """Sum over both directions, if there are two, by the first `size` dimensions."""

        def one_way(from_BD: Tensor, candidates: Candidates) -> Tensor:
            if size is not None:
                from_BD, candidates = first(from_BD, size), candidates.cut(size)
            if self.config.loss == "sigmoid":
                return sigmoid_sum(
                    from_BD,
                    candidates,
                    temperature=temperature,
                    bias=bias,
                    weight_B=pairs.weight_B,
                )
            return info_nce_sum(
                from_BD, candidates, temperature=temperature, weight_B=pairs.weight_B
            )

        total = one_way(pairs.query_BD, gathered.to_targets)
        if self.directions == 2:
            total = total + one_way(pairs.target_BD, gathered.to_queries)
        return total

    def _distilled(self, pairs: Pairs, *, temperature: Tensor | float) -> Tensor:
        """Compare the model's view of a query's own target and negatives with the teacher's."""
        sides_BSD = torch.cat([pairs.target_BD[:, None], pairs.negative_BKD], dim=1)
        return distillation_sum(
            own_similarities(pairs.query_BD, sides_BSD),
            pairs.score_BS,
            temperature=temperature,
            teacher_temperature=self.config.teacher_temperature,
            weight_B=pairs.weight_B,
        )

    @torch.no_grad()
    def _measure(self, pairs: Pairs, gathered: Gathered) -> None:
        """Add up how the unit vectors of usable pairs lie to each other, and what is left out.

        Several vectors of an embedding count as one, end to end.
        """
        weight_N, own_B = gathered.weight_N, gathered.to_targets.own_B
        weight_B, count = pairs.weight_B, len(weight_N)
        target_BD = end_to_end(pairs.target_BD.detach())
        cosine_BN = target_BD @ end_to_end(gathered.to_targets.rows_CD[:count].detach()).T
        weight_BN = weight_B[:, None] * weight_N[None, :]
        other_BN = weight_BN.scatter(1, own_B[:, None], 0.0)
        distance_B = (end_to_end(pairs.query_BD.detach()) - target_BD).square().sum(dim=1)
        hidden_BC = gathered.to_targets.hidden_BC
        self.measures.add(
            distances=(distance_B * weight_B).sum(),
            pairs=weight_B.sum(),
            closeness=((4.0 * cosine_BN - 4.0).exp() * other_BN).sum(),
            couples=other_BN.sum(),
            squares=(cosine_BN.square() * weight_BN).sum(),
            left_out=(hidden_BC[:, :count] * other_BN).sum(),
        )
        if self.negatives:
            hard_BH = weight_B[:, None] * gathered.hard_weight_H[None, :]
            self.measures.add(
                missing=((1.0 - pairs.weight_BK) * weight_B[:, None]).sum(),
                wanted=self.negatives * weight_B.sum(),
                hard_couples=hard_BH.sum(),
                hard_left_out=(hidden_BC[:, count:] * hard_BH).sum(),
            )
        if DISTILLATION in self.weights:
            self.measures.add(scored=(weight_B * ~pairs.score_BS[:, 0].isnan()).sum())

    def health(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Give alignment, uniformity, effective rank of the targets, and shares of candidates.

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
        if measured["couples"] and measured["closeness"] > 0:
            health["uniformity"] = math.log(measured["closeness"] / measured["couples"])
        for name, (part, whole) in _SHARES.items():
            if measured.get(whole):
                health[name] = measured[part] / measured[whole]
        if measured.get("scored") == 0.0 and not self._told:
            self._told = True
            log.warning(
                "no record of this step has a teacher's scores (meta.scores), and its distillation "
                "loss is 0: mine the data again (tools/mine_hard_negatives.py), or set "
                "objective.distillation_weight=0"
            )
        return health
