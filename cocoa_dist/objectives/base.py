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


class Objective(Protocol):
    """What a stage minimises: sum over terms of weight x global sum / global count."""

    heads: HeadsConfig  # what it reads from the model
    weights: Mapping[str, float]  # term -> weight in the total
    step_wide: bool  # True: needs the embeddings of all packs of a step at once

    def counts(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Return what each term is divided by, for these packs of this rank."""
        ...

    def sums(
        self, outputs: Sequence[ModelOutput], packs: Sequence[PackedBatch]
    ) -> dict[str, Tensor]:
        """Return the sum of each term over these packs of this rank; scalars with gradient."""
        ...


def weighted_total(sums: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
    """Return sum over terms of factor x sum: a scalar with gradient, in the terms' units."""
    return sum((factors[name] * sums[name] for name in factors), start=torch.zeros(()))
