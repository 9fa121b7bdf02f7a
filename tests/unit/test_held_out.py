"""Held-out sets are tried before the first step, and give way to a stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cocoa_dist.config import ASSET_DIR, load_recipe
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.shards import ShardReader, write_shards
from cocoa_dist.train.build import load_vocabulary
from cocoa_dist.train.evaluate import (
    Embedder,
    evaluate_sets,
    load_embedder,
    read_records,
    recall,
    record_sides,
    similarity_matrix,
)
from cocoa_dist.train.held_out import HeldOut

GEOMETRY = ImageGeometry(patch_size=8)


def held_out(path: Path) -> HeldOut:
    config = load_recipe("debug", [f"evaluation.sets={{one: {{path: {path}, limit: 40}}}}"])
    return HeldOut(config, vocabulary=load_vocabulary(config.model), geometry=GEOMETRY)


@pytest.mark.parametrize("fault", ["no picture", "cut picture", "no text"])
def test_a_record_that_cannot_be_embedded_is_named_before_the_first_step(tmp_path, fault) -> None:
    whole = ShardReader(ASSET_DIR / "emoji" / "validation").record(0)
    images = {"no picture": (), "cut picture": (whole.images[0][:200],)}.get(fault, whole.images)
    text = (text_part("" if fault == "no text" else "a fox"),)
    sides = ((image_part(0),),) if images else ()
    bad = Record("the bad one", "t", text, positives=sides, images=images)
    write_shards([whole, bad], tmp_path / "set", info={})
    with pytest.raises(ValueError, match=r"evaluation\.sets\.one: record 'the bad one'"):
        held_out(tmp_path / "set")


class CountingEngine:
    """Embeds everything as noise, and counts the packs."""

    packs = 0

    @contextmanager
    def embedding(self) -> Iterator[Any]:
        yield self._embed

    def _embed(self, pack: Any) -> torch.Tensor:
        self.packs += 1
        return torch.randn(len(pack.pair_ids), 4)


def test_an_evaluation_gives_way_to_a_stop() -> None:
    sets = held_out(ASSET_DIR / "emoji" / "validation")
    sets.settings = sets.settings.model_copy(update={"batch_size": 16})
    engine: Any = CountingEngine()
    whole = sets.scores(engine, beat=lambda: None, stop=lambda: False)
    assert set(whole) == {"held_out_recall/one", "held_out_tied/one"}
    assert engine.packs == 6
    engine.packs = 0
    assert sets.scores(engine, beat=lambda: None, stop=lambda: engine.packs == 2) == {}
    assert engine.packs == 2


class EmbeddersEngine:
    """Embeds packs with the model of an embedder."""

    def __init__(self, embedder: Embedder) -> None:
        self.model = embedder.model

    @contextmanager
    def embedding(self) -> Iterator[Any]:
        with torch.no_grad():
            yield lambda pack: self.model(pack).embeddings_ED


def test_embeddings_of_several_vectors_are_scored_by_late_interaction() -> None:
    config = load_recipe(
        "debug",
        [
            f"evaluation.sets={{one: {{path: {ASSET_DIR / 'emoji' / 'validation'}, limit: 21}}}}",
            "model.num_bridge_tokens=3",
            "stages.contrastive.pooling=late_interaction",
            "evaluation.batch_size=8",
        ],
    )
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    records = read_records(config.evaluation.sets["one"])
    sides = [record_sides(record, embedder) for record in records]
    texts = embedder.embed([text for text, _ in sides])
    pictures = embedder.embed([picture for _, picture in sides])
    assert texts.shape == pictures.shape == (21, 3, 64)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1.0, atol=1e-5)

    def slow(asks, answers):
        return np.array([[(q @ a.T).max(axis=1).mean() for a in answers] for q in asks])

    ways = slow(texts, pictures), slow(pictures, texts)
    np.testing.assert_allclose(similarity_matrix(texts, pictures), ways[0], atol=1e-6)
    sets = HeldOut(config, vocabulary=embedder.vocabulary, geometry=embedder.geometry)
    engine: Any = EmbeddersEngine(embedder)
    found = sets.scores(engine, beat=lambda: None, stop=lambda: False)["held_out_recall/one"]
    expected = sum(recall(way)["r10"] for way in ways) / 200
    assert found == pytest.approx(expected, abs=1.01 / 21)  # a tie in float32 may fall apart
    whole = evaluate_sets(config, embedder)["one"]
    assert whole["t2i"]["r10"] == pytest.approx(recall(ways[0])["r10"], abs=101 / 21)
