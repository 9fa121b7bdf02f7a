"""Retrieval scores against a slow obvious version, and the embedder's promises."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cocoa_dist.config import load_recipe
from cocoa_dist.manifest import Manifest, step_folder, write_manifest
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.train.checkpoint import WEIGHTS_NAME
from cocoa_dist.train.evaluate import (
    Item,
    evaluate_sets,
    load_embedder,
    read_records,
    recall,
    record_sides,
    retrieval_scores,
    stage_weights,
    tied_share,
)
from cocoa_dist.train.held_out import _batches, _scored

ROUNDING = 2e-6  # float32 sums in another order; embeddings have unit length


@pytest.fixture(scope="module")
def config():
    return load_recipe("debug", ["evaluation.sets.unseen_concept.limit=24"])


@pytest.fixture(scope="module")
def embedder(config):
    return load_embedder(config, run_dir=None, after_stage="model")


@pytest.fixture(scope="module")
def sides(config, embedder):
    records = read_records(config.evaluation.sets["unseen_concept"])
    return [record_sides(record, embedder) for record in records]


def slow_recall(scores, k):
    """Share of queries with the right candidate among the first k, over many random tie breaks."""
    draw = np.random.default_rng(0)
    hits, rounds = 0, 400
    for _ in range(rounds):
        noise = draw.random(scores.shape)
        for row in range(len(scores)):
            order = np.lexsort((noise[row], -scores[row]))
            hits += row in order[:k]
    return 100.0 * hits / (rounds * len(scores))


def test_recall_counts_ties_at_their_expected_value():
    draw = np.random.default_rng(1)
    scores = draw.integers(0, 4, size=(12, 12)).astype(np.float32)
    found = recall(scores)
    for k in (1, 5, 10):
        # 4800 draws of a share: standard error at most 0.72 points
        assert found[f"r{k}"] == pytest.approx(slow_recall(scores, k), abs=3.0)


def test_recall_without_ties_is_exact():
    scores = np.random.default_rng(2).permutation(400).reshape(20, 20).astype(np.float32)
    for k in (1, 5, 10):
        hits = [row in np.argsort(-scores[row])[:k] for row in range(20)]
        assert recall(scores)[f"r{k}"] == pytest.approx(100.0 * np.mean(hits))


def test_collapsed_model_scores_chance():
    same = np.ones((30, 4), dtype=np.float32) / 2
    scores = retrieval_scores(same, same)
    assert scores["t2i"] == pytest.approx(scores["chance"])
    assert scores["i2t"] == pytest.approx(scores["chance"])


def test_perfect_model_scores_a_hundred_both_ways():
    unit = np.eye(12, dtype=np.float32)
    scores = retrieval_scores(unit, unit)
    assert scores["n"] == 12
    assert scores["t2i"] == scores["i2t"] == {"r1": 100.0, "r5": 100.0, "r10": 100.0}


def test_directions_are_not_mixed_up():
    text = np.eye(3, dtype=np.float32)
    image = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0.5]], dtype=np.float32)
    scores = retrieval_scores(text, image)
    # text 0 ties with picture 2 for picture 0; picture 2 prefers text 0 to its own
    assert scores["t2i"]["r1"] == pytest.approx(100 * 2.5 / 3)
    assert scores["i2t"]["r1"] == pytest.approx(100 * 2 / 3)


def test_chance_never_exceeds_a_hundred():
    unit = np.eye(4, dtype=np.float32)
    assert retrieval_scores(unit, unit)["chance"] == {"r1": 25.0, "r5": 100.0, "r10": 100.0}


def test_nan_is_an_error_that_names_the_query():
    scores = np.zeros((3, 3), dtype=np.float32)
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="query 1"):
        recall(scores)


def test_embeddings_have_unit_length(embedder, sides):
    vectors = embedder.embed([text for text, _ in sides])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_embeddings_do_not_depend_on_the_batch(embedder, sides):
    items = [item for pair in sides[:6] for item in pair]
    together = embedder.embed(items)
    alone = np.concatenate([embedder.embed([item]) for item in items])
    assert np.abs(together - alone).max() < ROUNDING


def test_embeddings_keep_the_order_of_the_items(embedder, sides):
    items = [text for text, _ in sides[:8]]
    forward, backward = embedder.embed(items), embedder.embed(items[::-1])
    assert np.abs(forward - backward[::-1]).max() < ROUNDING


def test_instruction_changes_the_embedding(embedder):
    plain, instructed = embedder.embed(
        [Item(text="a red apple"), Item(text="a red apple", instruction="Find the picture:")]
    )
    assert np.abs(plain - instructed).max() > 1e-3


def test_evaluate_sets_scores_every_set_of_the_recipe(config, embedder, sides):
    scores = evaluate_sets(config, embedder)
    assert list(scores) == ["unseen_concept"]
    texts = np.concatenate([embedder.embed([text]) for text, _ in sides])
    images = np.concatenate([embedder.embed([image]) for _, image in sides])
    assert scores["unseen_concept"] == retrieval_scores(texts, images)


def test_text_item_holds_name_and_keywords(config, sides):
    record = read_records(config.evaluation.sets["unseen_concept"])[0]
    assert sides[0][0].text.startswith(record.meta["name"])
    assert all(word in sides[0][0].text for word in record.meta["keywords"])


def test_base_model_is_the_same_every_time(config, embedder, sides):
    again = load_embedder(config, run_dir=None, after_stage="model")
    items = [image for _, image in sides[:4]]
    assert np.array_equal(embedder.embed(items), again.embed(items))


def test_unfinished_stage_is_refused(config, tmp_path):
    write_checkpoint(tmp_path, config, complete=False)
    with pytest.raises(ValueError, match="'joint_reconstruction' has no complete checkpoint"):
        stage_weights(tmp_path, "joint_reconstruction")


def test_weights_of_a_stage_are_loaded(config, embedder, sides, tmp_path):
    write_checkpoint(tmp_path, config, complete=True)
    trained = load_embedder(config, run_dir=tmp_path, after_stage="joint_reconstruction")
    items = [text for text, _ in sides[:4]]
    assert np.abs(trained.embed(items) - embedder.embed(items)).max() > 1e-3


def write_checkpoint(run_dir, config, *, complete: bool) -> None:
    """Write a checkpoint of stage 1 whose weights are the base model's, disturbed."""
    base = load_embedder(config, run_dir=None, after_stage="model")
    model = EmbeddingModel(base.model.backbone, HeadsConfig(embeddings=True))
    draw = torch.Generator().manual_seed(5)
    weights = {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=draw)
        for name, value in model.named_parameters()
    }
    folder = step_folder(run_dir, stage="joint_reconstruction", step=8)
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS_NAME)
    manifest = Manifest(
        run="debug",
        recipe_fingerprint="f",
        stage="joint_reconstruction",
        step=8,
        target_step=8 if complete else 9,
        complete=complete,
        epoch="local-1-test",
        parent=None,
        world_size=1,
        engine="test",
        versions={},
        base_model="b",
        data_state={},
        samples=1,
        tokens=1,
        skipped_steps=0,
        wall_seconds=1.0,
        productive_seconds=1.0,
        train_cpu_seconds=1.0,
        loss={},
        files=(),
    )
    write_manifest(folder, manifest)


def test_the_tied_share_is_that_of_queries_whose_right_candidate_ties() -> None:
    scores = np.array([[0.5, 0.5, 0.1], [0.2, 0.9, 0.9], [0.3, 0.3, 0.8]], dtype=np.float32)
    assert tied_share(scores) == pytest.approx(2 / 3)
    assert tied_share(np.ones((4, 4), dtype=np.float32)) == 1.0
    assert tied_share(np.eye(4, dtype=np.float32)) == 0.0


@pytest.mark.parametrize("count", [1, 2, 37, 64, 65])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_batches_of_held_out_records_are_small_enough_and_whole(count: int, ranks: int) -> None:
    found = _batches(count, most=16, ranks=ranks)
    assert [i for batch in found for i in batch] == list(range(count))
    assert max(map(len, found)) <= 16
    assert min(count, ranks) <= len(found) or count < ranks


def test_embeddings_that_are_not_finite_give_no_recall_and_end_no_run(caplog) -> None:
    whole = np.eye(3, dtype=np.float32)
    broken = whole.copy()
    broken[1, 1] = np.nan
    found = _scored("set", whole, broken)
    assert all(np.isnan(value) for value in found.values())
    assert "held-out set set: embeddings are not finite" in caplog.text
    assert _scored("set", whole, whole) == {"held_out_recall/set": 1.0, "held_out_tied/set": 0.0}
