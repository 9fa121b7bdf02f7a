"""Retrieval on held-out sets while a stage trains: every rank embeds its share, all score.

Read as at the end of a run: whole records, the rule and pooling of the recipe's last stage, words
against pictures both ways. Training goes on as if it had not been.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import RunConfig
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.records import Record
from cocoa_dist.data.samples import Vocabulary, view_settings
from cocoa_dist.distributed import (
    gather_objects,
    gather_rows,
    raise_together,
    rank,
    sum_over_ranks,
    world_size,
)
from cocoa_dist.train.engine import TrainEngine
from cocoa_dist.train.evaluate import (
    Item,
    Vectors,
    embedding_pack,
    item_sample,
    picture_item,
    read_records,
    recall,
    similarity_matrix,
    text_item,
    tied_share,
)

log = logging.getLogger("cocoa_dist.train")

_CUTOFF = "r10"


class HeldOut:
    """The held-out sets of a recipe, ready to be embedded again and again."""

    def __init__(
        self, config: RunConfig, *, vocabulary: Vocabulary, geometry: ImageGeometry
    ) -> None:
        """Read the sets and try every record, each rank its share. Collective.

        Raises ValueError, on all ranks, for a set or record that cannot be used. Pictures are
        decoded anew at each evaluation, as far as the cache does not hold them.
        """
        self.settings = config.evaluation
        self.stage = list(config.stages.values())[-1]
        self.vocabulary, self.geometry = vocabulary, geometry
        self.view = view_settings(config.data, geometry=geometry)
        sources = config.evaluation.sets.items()
        self.sets = raise_together(lambda: {name: read_records(s) for name, s in sources})
        raise_together(self._try_all)

    def _try_all(self) -> None:
        """Raise ValueError for a record of this rank's share that cannot be embedded."""
        for name, records in self.sets.items():
            for record in records[rank() :: world_size()]:
                try:
                    for item in (text_item(record), picture_item(record, self.view)):
                        item_sample(item, vocabulary=self.vocabulary, settings=self.view)
                except ValueError as error:
                    raise ValueError(
                        f"evaluation.sets.{name}: record {record.key!r} is no text and picture: "
                        f"{error}"
                    ) from error

    def due(self, step: int, *, last: int) -> bool:
        """Say whether an evaluation follows a step: every `every_steps`, and at the stage's end."""
        every = self.settings.every_steps
        return bool(every) and (step % every == 0 or step == last)

    def kept_value(self, scores: Mapping[str, float]) -> float | None:
        """Return the measure that decides which checkpoint is best, rank 0's; None without one.

        Collective: call on all ranks, after `scores`.
        """
        if self.settings.keep_best is None:
            return None
        value: float | None = gather_objects(scores.get(self.settings.keep_best))[0]
        return value

    def scores(
        self, engine: TrainEngine, *, beat: Callable[[], None], stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Return fields of the record: recall at 10 of each set and its tied share, as ratios.

        Recall is the mean of words to pictures and pictures to words; NaN where an embedding is
        not finite. `beat` is called before every forward pass. Of sets that are not done when any
        rank is asked to `stop` there is nothing. Collective: call on all ranks.
        """
        found: dict[str, float] = {}
        with engine.embedding() as embed, contextlib.suppress(_AskedToStopError):
            for name, records in self.sets.items():
                texts = self._embed([*records], text_item, embed, beat, stop)
                pictures = self._embed(
                    [*records], lambda record: picture_item(record, self.view), embed, beat, stop
                )
                found |= _scored(name, texts, pictures)
        return found

    def _embed(
        self,
        records: Sequence[Record],
        item: Callable[[Record], Item],
        embed: Callable[[PackedBatch], Tensor],
        beat: Callable[[], None],
        stop: Callable[[], bool],
    ) -> Vectors:
        """Return an embedding a record, (N, D) or (N, K, D); ranks take turns. Collective."""
        batches = _batches(len(records), most=self.settings.batch_size, ranks=world_size())
        parts = []
        for begin in range(0, len(batches), world_size()):
            mine = batches[min(begin + rank(), len(batches) - 1)]  # one too many is dropped below
            beat()
            if sum_over_ranks(torch.tensor(float(stop()))).item():
                raise _AskedToStopError
            vectors = embed(raise_together(partial(self._pack, [records[i] for i in mine], item)))
            padded = vectors.new_zeros(len(batches[0]), *vectors.shape[1:])
            padded[: len(vectors)] = vectors
            together = torch.split(gather_rows(padded), len(batches[0]))
            for own, part in zip(batches[begin : begin + world_size()], together, strict=False):
                parts.append(part[: len(own)])
        return torch.cat(parts).numpy()

    def _pack(self, records: Sequence[Record], item: Callable[[Record], Item]) -> PackedBatch:
        samples = [
            item_sample(item(record), vocabulary=self.vocabulary, settings=self.view)
            for record in records
        ]
        return embedding_pack(
            samples, stage=self.stage, geometry=self.geometry, vocabulary=self.vocabulary
        )


class _AskedToStopError(Exception):
    """All ranks leave an evaluation: the seconds that are left are for the checkpoint."""


def _batches(count: int, *, most: int, ranks: int) -> list[range]:
    """Cut `count` items so that no batch has more than `most`, and every rank has work."""
    size = max(min(most, math.ceil(count / ranks)), 1)
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _scored(name: str, texts: Vectors, pictures: Vectors) -> Mapping[str, float]:
    if not (np.isfinite(texts).all() and np.isfinite(pictures).all()):
        if rank() == 0:
            log.warning("held-out set %s: embeddings are not finite, there is no recall", name)
        return {f"held_out_recall/{name}": math.nan, f"held_out_tied/{name}": math.nan}
    ways = (similarity_matrix(texts, pictures), similarity_matrix(pictures, texts))
    return {
        f"held_out_recall/{name}": sum(recall(way)[_CUTOFF] for way in ways) / 200.0,
        f"held_out_tied/{name}": sum(tied_share(way) for way in ways) / 2.0,
    }
