"""Held-out retrieval: embed both sides of a data set, score every query against all candidates.

Float32 scores; candidates that tie with the right one count at the expected value under random
order, so a collapsed model scores chance; NaN is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import FROM_MODEL, RunConfig, SourceConfig, StageConfig, resolve_path
from cocoa_dist.data.corruption import uncorrupted
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.images import Pixels
from cocoa_dist.data.packing import EmbeddingInfo, build_pack
from cocoa_dist.data.records import Record, side_texts
from cocoa_dist.data.samples import (
    Sample,
    ViewSettings,
    Vocabulary,
    embedding_sample,
    view_settings,
)
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.manifest import stage_best, stage_end
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.objectives.matching import similarities
from cocoa_dist.segments import AttentionRule, attention_rule
from cocoa_dist.train.build import (
    image_geometry,
    load_vocabulary,
    load_weights,
    special_token_ids,
)
from cocoa_dist.train.checkpoint import WEIGHTS_NAME

CUTOFFS = (1, 5, 10)
_SCORED_TOGETHER = 256  # queries of several vectors each: memory
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """One thing to embed."""

    text: str | None = None
    image: Pixels | None = None  # decoded RGB of any size
    instruction: str = ""


@dataclass(frozen=True)
class Embedder:
    """A trained model with everything it takes to embed items in this process."""

    model: EmbeddingModel
    vocabulary: Vocabulary
    geometry: ImageGeometry
    settings: ViewSettings
    stage: StageConfig  # whose rule and pooling the embeddings are read with
    batch_size: int

    def embed(self, items: Sequence[Item]) -> Vectors:
        """Return unit vectors (N, D), float32, in the order of the items; (N, K, D) if several."""
        samples = [self.sample(item) for item in items]
        parts = [
            self._batch(samples[begin : begin + self.batch_size])
            for begin in range(0, len(samples), self.batch_size)
        ]
        return np.concatenate(parts)

    def sample(self, item: Item) -> Sample:
        """Serialise one item as in training."""
        return item_sample(item, vocabulary=self.vocabulary, settings=self.settings)

    @property
    def rule(self) -> AttentionRule:
        """The attention rule the embeddings are read with."""
        return stage_rule(self.stage)

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """Pack samples whose embeddings are wanted, in order."""
        return embedding_pack(
            samples, stage=self.stage, geometry=self.geometry, vocabulary=self.vocabulary
        )

    def _batch(self, samples: Sequence[Sample]) -> Vectors:
        with torch.inference_mode():
            found = self.model(self.pack(samples)).embeddings_ED
        vectors: Vectors = found.numpy()
        return vectors


def stage_rule(stage: StageConfig) -> AttentionRule:
    """Return the attention rule of a stage."""
    return attention_rule(stage.attention.rule, **stage.attention.options())


def item_sample(item: Item, *, vocabulary: Vocabulary, settings: ViewSettings) -> Sample:
    """Serialise one item as in training."""
    return embedding_sample(
        text=item.text,
        image=item.image,
        instruction=item.instruction,
        vocabulary=vocabulary,
        settings=settings,
    )


def embedding_pack(
    samples: Sequence[Sample],
    *,
    stage: StageConfig,
    geometry: ImageGeometry,
    vocabulary: Vocabulary,
) -> PackedBatch:
    """Pack samples whose embeddings are wanted, in order; nothing of them is hidden."""
    return build_pack(
        [uncorrupted(sample, geometry=geometry) for sample in samples],
        rule=stage_rule(stage),
        geometry=geometry,
        vocabulary=vocabulary,
        embeddings=[EmbeddingInfo(i, 0, i) for i in range(len(samples))],
        pooling=stage.pooling,
    )


def load_embedder(
    config: RunConfig,
    *,
    run_dir: Path | None,
    after_stage: str | None = None,
    best: bool = False,
    weights: bool = True,
) -> Embedder:
    """Load the model as it stood after a stage (default: the last), or the base model.

    `after_stage="model"` is the base model, `best` takes the stage's best checkpoint, which
    evaluation.keep_best has kept, in place of its end. Embeddings are read with the rule and
    pooling of the recipe's last stage. `weights=False`: parameters are on the meta device, for a
    caller that has them elsewhere; learnt tokens are rows of the embedding then. Raises ValueError
    if there is no such checkpoint.
    """
    name = after_stage or list(config.stages)[-1]
    vocabulary = load_vocabulary(config.model)
    torch.manual_seed(config.seed)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=vocabulary.size,
        weights=weights,
    )
    model = EmbeddingModel(backbone, HeadsConfig(embeddings=True))
    if vocabulary.learnt and weights:
        model.add_compression_tokens(ids=vocabulary.learnt, known=vocabulary.learnt_before)
    if name != FROM_MODEL and weights:
        load_weights(model, stage_weights(run_dir, name, best=best))
    geometry = image_geometry(backbone)
    return Embedder(
        model=model.eval(),
        vocabulary=vocabulary,
        geometry=geometry,
        settings=view_settings(config.data, geometry=geometry),
        stage=list(config.stages.values())[-1],
        batch_size=config.evaluation.batch_size,
    )


def stage_weights(run_dir: Path | None, stage: str, *, best: bool = False) -> Path:
    """Return the weights file at the end of a stage, or of its best checkpoint.

    Raises ValueError if the stage is not finished, or keeps no best checkpoint.
    """
    if run_dir is None:
        raise ValueError(f"stage '{stage}' needs the folder of a run that finished it")
    if best:
        return stage_best(run_dir, stage=stage, only={WEIGHTS_NAME})[0] / WEIGHTS_NAME
    return stage_end(run_dir, stage=stage)[0] / WEIGHTS_NAME


def read_records(source: SourceConfig) -> list[Record]:
    """Read a data set whole; held-out sets are small."""
    reader = ShardReader(resolve_path(source.path))
    try:
        return [reader.record(i) for i in range(min(len(reader), source.limit or len(reader)))]
    finally:
        reader.close()


def retrieval_scores(text_ND: Vectors, image_ND: Vectors) -> dict[str, object]:
    """Score row i of one side against row i of the other, both ways, with chance beside it.

    Shares in per cent. Raises ValueError on NaN.
    """
    count = len(text_ND)
    return {
        "n": count,
        "chance": {f"r{k}": 100.0 * min(k, count) / count for k in CUTOFFS},
        "t2i": recall(similarity_matrix(text_ND, image_ND)),
        "i2t": recall(similarity_matrix(image_ND, text_ND)),
    }


def similarity_matrix(from_ND: Vectors, to_MD: Vectors) -> Vectors:
    """Return how similar embeddings of one side are to those of the other, (N, M).

    Single vectors (N, D): cosines. Several (N, K, D): late interaction, see objectives/matching.py.
    """
    if from_ND.ndim == 2:
        return from_ND @ to_MD.T
    from_NKD, to_MKD = torch.from_numpy(from_ND), torch.from_numpy(to_MD)
    blocks = torch.split(from_NKD, _SCORED_TOGETHER)
    matrix: Vectors = torch.cat([similarities(block, to_MKD) for block in blocks]).numpy()
    return matrix


def recall(scores_NN: Vectors) -> dict[str, float]:
    """Recall at 1, 5 and 10 in per cent; the right candidate of row i is column i."""
    if np.isnan(scores_NN).any():
        row = int(np.isnan(scores_NN).any(axis=1).argmax())
        raise ValueError(f"scores of query {row} hold NaN; a NaN is never a hit")
    right_N1 = np.diagonal(scores_NN)[:, None]
    above_N = (scores_NN > right_N1).sum(axis=1)
    tied_N = (scores_NN == right_N1).sum(axis=1)  # the right one included
    return {
        f"r{k}": float(100.0 * np.clip((k - above_N) / tied_N, 0.0, 1.0).mean()) for k in CUTOFFS
    }


def tied_share(scores_NN: Vectors) -> float:
    """Return the share of queries whose right candidate ties with another; 1 is a collapse."""
    right_N1 = np.diagonal(scores_NN)[:, None]
    return float(((scores_NN == right_N1).sum(axis=1) > 1).mean())


def record_sides(record: Record, embedder: Embedder) -> tuple[Item, Item]:
    """Return the text item (name and all keywords) and the picture item of a held-out record."""
    return text_item(record), picture_item(record, embedder.settings)


def text_item(record: Record) -> Item:
    """Return the words of a held-out record."""
    return Item(text=" ".join(side_texts(record.target)) or " ".join(side_texts(record.query)))


def picture_item(record: Record, settings: ViewSettings) -> Item:
    """Return the picture of a held-out record. Raises ValueError if it has none that is one."""
    if not record.images:
        raise ValueError("the record has no picture, expected one")
    return Item(image=settings.pictures.load(record.images[0]))


def evaluate_sets(config: RunConfig, embedder: Embedder) -> dict[str, dict[str, object]]:
    """Score every held-out set of the recipe."""
    scores = {}
    for name, source in config.evaluation.sets.items():
        sides = [record_sides(record, embedder) for record in read_records(source)]
        texts = embedder.embed([text for text, _ in sides])
        images = embedder.embed([image for _, image in sides])
        scores[name] = retrieval_scores(texts, images)
    return scores
