"""What a trained model does, as plain values to draw: found pictures, its space, who sees whom.

Examples are the first in the order of a hash of their keys: never chosen by how well they went.
Everything is made on held-out records, in batches.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cocoa_dist.config import RunConfig
from cocoa_dist.data.records import Record, side_texts
from cocoa_dist.data.samples import (
    Vocabulary,
    draw_for,
    view_samples,
    view_settings,
)
from cocoa_dist.inputs import tokenizer_folder
from cocoa_dist.report.arms import HeldOut, SetVectors
from cocoa_dist.segments import Role, Segment, attention_rule, dense_visibility
from cocoa_dist.train.evaluate import Embedder, Vectors, recall, similarity_matrix

_VARIANCE_FLOOR = 1e-6  # of normalised patches, as in packing
_MASKED_RECORDS = 192  # held-out records that the shares of right guesses are counted on
_RECORDS_PER_PACK = 32

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """One text query and the pictures that came out on top."""

    name: str
    keywords: str
    top: tuple[int, ...]  # records of the set, best first
    right: int  # the record that was asked for
    rank: int  # of the right one, 1 is best
    other_ranks: Mapping[str, int]  # the same query in the other arms


@dataclass(frozen=True)
class Space:
    """Held-out embeddings on the two main axes of their own variance (PCA)."""

    title: str
    text_N2: Floats
    image_N2: Floats
    explained: float  # share of variance on the two axes
    recall_at_1: float  # text to picture over all sets, per cent


@dataclass(frozen=True)
class Visibility:
    """The attention of one stage on one small sample: row t sees column s where True."""

    stage: str
    rule: str
    labels: tuple[str, ...]  # one for each token
    roles: tuple[Role, ...]
    visible_TT: Bools


def hash_order(records: Sequence[Record]) -> list[int]:
    """Order of records by the sha256 of their keys: arbitrary, and the same on any day."""
    return sorted(
        range(len(records)), key=lambda i: hashlib.sha256(records[i].key.encode()).hexdigest()
    )


def found_pictures(
    held_out: HeldOut,
    *,
    vectors: SetVectors,
    others: Mapping[str, SetVectors],
    count: int,
    top: int,
) -> list[Found]:
    """Answer the first `count` text queries in hash order among all pictures of the set."""
    chosen = hash_order(held_out.records)[:count]
    scores_BN = similarity_matrix(vectors.text_ND[chosen], vectors.image_ND)
    order_BN = np.argsort(-scores_BN, axis=1, kind="stable")
    ranks = ranks_of(vectors, chosen)
    other_ranks = {name: ranks_of(found, chosen) for name, found in others.items()}
    found = []
    for row, index in enumerate(chosen):
        name, keywords = _name_and_rest(held_out.records[index])
        found.append(
            Found(
                name=name,
                keywords=keywords,
                top=tuple(int(i) for i in order_BN[row, :top]),
                right=index,
                rank=ranks[row],
                other_ranks={arm: values[row] for arm, values in other_ranks.items()},
            )
        )
    return found


def ranks_of(vectors: SetVectors, queries: Sequence[int]) -> list[int]:
    """Rank of the right picture of each text query; 1 is best, ties count as their middle."""
    scores_BN = similarity_matrix(vectors.text_ND[queries], vectors.image_ND)
    right_B1 = scores_BN[np.arange(len(queries)), queries][:, None]
    above_B = (scores_BN > right_B1).sum(axis=1)
    tied_B = (scores_BN == right_B1).sum(axis=1)  # the right one included
    return [int(rank) for rank in above_B + (tied_B + 1) // 2]


def project(title: str, *, vectors: Mapping[str, SetVectors], shown: Sequence[int]) -> Space:
    """Project all sets together on their two main axes; return the rows of `shown`.

    Of an embedding of several vectors their mean is shown.
    """
    text_ND = np.concatenate([_single(found.text_ND) for found in vectors.values()])
    image_ND = np.concatenate([_single(found.image_ND) for found in vectors.values()])
    both = np.concatenate([text_ND, image_ND])
    centred = both - both.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    axes_D2 = axes[:, -2:][:, ::-1]
    axes_D2 = axes_D2 * np.sign(axes_D2[np.abs(axes_D2).argmax(axis=0), [0, 1]])
    points = (centred @ axes_D2).astype(np.float32)
    hits = [
        recall(similarity_matrix(found.text_ND, found.image_ND))["r1"] * len(found.text_ND)
        for found in vectors.values()
    ]
    rows = np.asarray(shown, dtype=np.int64)
    return Space(
        title=title,
        text_N2=points[: len(text_ND)][rows],
        image_N2=points[len(text_ND) :][rows],
        explained=float(variances[-2:].sum() / max(variances.sum(), 1e-12)),
        recall_at_1=sum(hits) / len(text_ND),
    )


def _single(vectors: Vectors) -> Vectors:
    """Return one vector an embedding, (N, D)."""
    return vectors if vectors.ndim == 2 else vectors.mean(axis=1)


def stage_visibility(
    config: RunConfig, stage_name: str, *, embedder: Embedder, record: Record
) -> Visibility:
    """Return who sees whom in one record of a stage, from the rule itself."""
    stage = config.stages[stage_name]
    data = stage.data.model_copy(update={"keywords": "none", "image_share": 1.0})
    settings = view_settings(config.data, geometry=embedder.geometry, stage=data)
    draw = draw_for(config.seed, f"report/{stage_name}", 0, 0)
    made = view_samples(
        stage.data.view, record, draw=draw, vocabulary=embedder.vocabulary, settings=settings
    )
    moved: list[list[Segment]] = []
    start = 0
    for sample in made.samples:
        moved.append([Segment(s.start + start, s.stop + start, s.role) for s in sample.segments])
        start += len(sample.input_ids)
    rule = attention_rule(stage.attention.rule, **stage.attention.options())
    names = token_labels(
        np.concatenate([sample.input_ids for sample in made.samples]),
        tokenizer=load_tokenizer(config),
        vocabulary=embedder.vocabulary,
    )
    roles = [s.role for sample in moved for s in sample for _ in range(s.stop - s.start)]
    return Visibility(
        stage=stage_name,
        rule=stage.attention.rule,
        labels=tuple(names),
        roles=tuple(roles),
        visible_TT=dense_visibility(moved, rule),
    )


def token_labels(
    input_ids: NDArray[np.int64], *, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> list[str]:
    """Short names of tokens: words as they are, special tokens by what they are for."""
    special = {
        vocabulary.eos: "EOS",
        vocabulary.bos: "BOS",
        vocabulary.image_pad: "image",
        vocabulary.vision_start: "image start",
        vocabulary.vision_end: "image end",
        vocabulary.mask: "mask",
    }
    return [special.get(int(i)) or tokenizer.decode([int(i)]).strip() or "_" for i in input_ids]


def _name_and_rest(record: Record) -> tuple[str, str]:
    """Return the record's name, and what its full text adds to it."""
    name = " ".join(side_texts(record.query))
    full = " ".join(side_texts(record.target))
    return name or full, full.removeprefix(name).lstrip(": ") if name else ""


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of a recipe, to turn ids back into text."""
    return Tokenizer.from_file(str(tokenizer_folder(config.model) / "tokenizer.json"))
