"""The contract of an objective: sums of named terms, and the counts to divide them by.

Counts come from the batch alone, so the engine can add them over ranks and packs before the first
forward pass. An objective never divides and never scales: the engine does, in one place, which is
why results do not depend on ranks, packing or accumulation.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.model.heads import HeadsConfig


class Measures:
    """Sums for the record that are no part of a loss: kept where they were made until asked for.

    They ride on the step's reduction, so a measure is a quotient of sums over all ranks.
    """

    def __init__(self, *names: str) -> None:
        """`names`, in the order of `take`; the same on all ranks."""
        self.names = names
        self._sums: list[tuple[str, Tensor]] = []
        self._host = dict.fromkeys(names, 0.0)

    def add(self, **sums: Tensor | float) -> None:
        """Add scalars; nothing waits for a device here."""
        for name, value in sums.items():
            if isinstance(value, Tensor):
                self._sums.append((name, value.detach()))
            else:
                self._host[name] += value

    def take(self) -> list[float]:
        """Return the sums since the last call, 0 for what was not added; waits for the device."""
        sums, found = self._sums, self._host
        self._sums, self._host = [], dict.fromkeys(self.names, 0.0)
        kinds = dict.fromkeys(value.dtype for _, value in sums)  # each is exact as float64
        sums = [one for kind in kinds for one in sums if one[1].dtype == kind]
        if sums:
            stacks = [torch.stack([v for _, v in sums if v.dtype == kind]) for kind in kinds]
            values = torch.cat([stack.double() for stack in stacks]).tolist()
            for (name, _), value in zip(sums, values, strict=True):
                found[name] += value
        return list(found.values())


BRIDGE_MEASURES = ("alike", "bridges")


def measure_bridge(measures: Measures, output: ModelOutput, pack: PackedBatch) -> None:
    """Add how alike the tokens of a bridge are, where it is several (CoMa, arXiv 2511.08480)."""
    if output.bridges_BKD is not None:
        alike_B = mean_pairwise_cosine(output.bridges_BKD)
        measures.add(alike=alike_B.sum(), bridges=len(pack.bridge_rows))


class Objective(Protocol):
    """What a stage minimises: sum over terms of weight x global sum / global count."""

    heads: HeadsConfig  # what it reads from the model
    weights: Mapping[str, float]  # term -> weight in the total
    step_wide: bool  # True: needs the embeddings of all packs of a step at once
    measures: Measures  # filled by `sums`

    def counts(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Return what each term is divided by, for these packs of this rank."""
        ...

    def sums(
        self, outputs: Sequence[ModelOutput], packs: Sequence[PackedBatch]
    ) -> dict[str, Tensor]:
        """Return the sum of each term over these packs of this rank; scalars with gradient."""
        ...

    def health(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Return what the record says of learning, from the measures of all ranks.

        Of what nothing was measured it says nothing.
        """
        ...


def weighted_total(sums: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
    """Return sum over terms of factor x sum: a scalar with gradient, in the terms' units."""
    return sum((factors[name] * sums[name] for name in factors), start=torch.zeros(()))


@torch.no_grad()
def mean_pairwise_cosine(tokens_BKD: Tensor) -> Tensor:
    """Return the mean cosine of a sample's K tokens to each other, (B,) float32; 1 is a collapse.

    Over the K (K - 1) ordered pairs: |sum of unit vectors|^2 counts each token with itself too.
    Raises ValueError for fewer than two tokens.
    """
    count = tokens_BKD.shape[-2]
    if count < 2:
        raise ValueError(f"{count} tokens a sample have no pairs, expected at least 2")
    units_BKD = torch.nn.functional.normalize(tokens_BKD.float(), dim=-1)
    total_B = units_BKD.sum(dim=-2).square().sum(dim=-1)
    alone_B = units_BKD.square().sum(dim=(-2, -1))  # K, without tokens that are all zero
    return (total_B - alone_B) / (count * (count - 1))
