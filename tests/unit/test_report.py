"""The report: its figures and numbers piece by piece, and a whole one of a small finished run."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cocoa_dist.config import dump_yaml, load_recipe
from cocoa_dist.data.corruption import corrupt
from cocoa_dist.data.packing import build_pack
from cocoa_dist.data.samples import draw_for, view_samples, view_settings
from cocoa_dist.manifest import Best, Manifest, step_folder, write_manifest
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.report import facts
from cocoa_dist.report.__main__ import main
from cocoa_dist.report.arms import SetVectors, embed_sets, read_held_out
from cocoa_dist.report.examples import (
    found_pictures,
    hash_order,
    project,
    ranks_of,
    stage_visibility,
    token_labels,
)
from cocoa_dist.report.filling import fill_in, rebuild_picture
from cocoa_dist.segments import Role, attention_rule
from cocoa_dist.train.build import build_objective, load_vocabulary
from cocoa_dist.train.checkpoint import WEIGHTS_NAME
from cocoa_dist.train.evaluate import evaluate_sets, load_embedder, retrieval_scores

LIMIT = "evaluation.sets.unseen_concept.limit=32"
CONTROL = ["name=other", "method=contrastive"]


def finished_run(folder, overrides=(), *, cpu=4.0, complete=True, with_best=False):
    """Write a debug run with random weights at the end of each stage, and at its best step."""
    config = load_recipe("debug", [LIMIT, *overrides])
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(dump_yaml(config))
    base = load_embedder(config, run_dir=None, after_stage="model")
    draw = torch.Generator().manual_seed(3)
    lines = []
    for name, stage in config.stages.items():
        heads = build_objective(stage, geometry=base.geometry).heads
        model = EmbeddingModel(base.model.backbone, heads)
        best = Best(measure="held_out_recall/unseen_concept", step=2, value=0.5)
        for step in (2, stage.steps) if with_best else (stage.steps,):
            weights = {
                key: value.detach() + 0.02 * torch.randn(value.shape, generator=draw)
                for key, value in model.named_parameters()
            }
            where = step_folder(folder, stage=name, step=step)
            where.mkdir(parents=True)
            save_file(weights, where / WEIGHTS_NAME)
            written = manifest_of(name, step, cpu=cpu, complete=complete and step == stage.steps)
            write_manifest(where, written.model_copy(update={"best": best if with_best else None}))
        terms = {"contrastive": ["contrastive"], "reconstruction": ["text"]}[stage.objective.kind]
        terms = [*terms, "image"] if heads.patch_values else terms
        lines += [
            {"stage": name, "step": step, "loss": 3.0, **{f"loss/{t}": 3.0 / step for t in terms}}
            for step in range(1, stage.steps + 1)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def manifest_of(stage, steps, *, cpu, complete):
    return Manifest(
        run="debug",
        recipe_fingerprint="f" * 64,
        stage=stage,
        step=steps,
        target_step=steps if complete else steps + 1,
        complete=complete,
        epoch="local-1-test",
        parent=None,
        world_size=2,
        engine="test",
        versions={"torch": "2.13.0"},
        base_model="b" * 64,
        data_state={},
        samples=192,
        tokens=4000,
        skipped_steps=0,
        wall_seconds=9.0,
        productive_seconds=5.0,
        train_cpu_seconds=cpu,
        loss={},
        files=(),
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def config():
    return load_recipe("debug", [LIMIT])


@pytest.fixture(scope="module")
def embedder(config):
    return load_embedder(config, run_dir=None, after_stage="model")


@pytest.fixture(scope="module")
def held_out(config, embedder):
    return read_held_out(config, embedder)[0]


# ---- what a run folder says


def test_train_cpu_seconds_is_the_sum_over_stages(run_dir):
    assert facts.read_run(run_dir).train_cpu_seconds == pytest.approx(12.0)


def test_unfinished_run_is_refused(tmp_path):
    unfinished = finished_run(tmp_path / "run", complete=False)
    with pytest.raises(ValueError, match="is not finished: stage 'joint_reconstruction'"):
        facts.read_run(unfinished)


def test_restarts_are_counted_by_what_came_before():
    lines = [
        {"epoch": "1", "verdict": None},
        {"epoch": "1", "verdict": "preempted"},
        {"epoch": "2", "verdict": None},  # killed: its end was never written
        {"epoch": "3", "verdict": None},
        {"epoch": "3", "verdict": "finished"},
        {"epoch": "4", "verdict": None},
        {"epoch": "4", "verdict": "given_up"},
        {"epoch": "5", "verdict": None},
    ]
    assert facts.count_restarts(lines) == {"preempted": 1, "lost": 1, "crash": 1}


def test_fingerprint_follows_what_the_report_is_made_from(tmp_path):
    folder = finished_run(tmp_path / "run")
    run = facts.read_run(folder)
    before = facts.input_fingerprint(run, None)
    assert facts.input_fingerprint(facts.read_run(folder), None) == before
    assert facts.input_fingerprint(run, run) != before
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "contrastive", "step": 9, "loss": 1.0}\n')
    assert facts.input_fingerprint(facts.read_run(folder), None) != before


def test_unequal_compute_is_said(tmp_path, run_dir):
    run = facts.read_run(run_dir)
    cheap = facts.read_run(finished_run(tmp_path / "control", CONTROL, cpu=1.0))
    equal = facts.read_run(finished_run(tmp_path / "equal", CONTROL, cpu=4.1))
    assert any("equal compute" in note for note in facts.comparison_notes(run, cheap))
    assert facts.comparison_notes(run, equal) == []


def test_two_arms_of_one_name_are_refused(tmp_path, run_dir):
    control = facts.read_run(finished_run(tmp_path / "control", CONTROL))
    assert facts.arm_names(facts.read_run(run_dir), control) == (
        "untrained",
        "cocoa",
        "contrastive",
    )
    with pytest.raises(ValueError, match="method 'contrastive'"):
        facts.arm_names(control, control)


# ---- what the models do


def test_scores_are_those_of_evaluate_sets(config, embedder, held_out):
    vectors = embed_sets([held_out], embedder)["unseen_concept"]
    expected = evaluate_sets(config, embedder)["unseen_concept"]
    assert retrieval_scores(vectors.text_ND, vectors.image_ND) == expected


def test_examples_are_in_hash_order_whatever_the_order_of_records(held_out):
    keys = [held_out.records[i].key for i in hash_order(held_out.records)]
    backwards = held_out.records[::-1]
    assert keys == [backwards[i].key for i in hash_order(backwards)]
    assert keys != sorted(keys)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_rank_and_top_pictures_follow_the_scores(held_out):
    draw = np.random.default_rng(0)
    vectors = SetVectors(*(unit(draw.normal(size=(32, 8))) for _ in range(2)))
    for found in found_pictures(held_out, vectors=vectors, others={"x": vectors}, count=5, top=5):
        scores = vectors.text_ND[found.right] @ vectors.image_ND.T
        order = sorted(range(32), key=lambda i: -scores[i])
        assert list(found.top) == order[:5]
        assert found.rank == 1 + order.index(found.right)
        assert found.other_ranks == {"x": found.rank}


def test_a_collapsed_model_ranks_in_the_middle():
    same = np.ones((31, 4), dtype=np.float32) / 2
    assert ranks_of(SetVectors(same, same), [0, 7]) == [16, 16]


def test_projection_keeps_the_two_largest_variances():
    draw = np.random.default_rng(1)
    spread = np.array([9.0, 4.0, 0.5, 0.1], dtype=np.float32)
    text, image = (draw.normal(size=(200, 4)).astype(np.float32) * spread for _ in range(2))
    space = project("x", vectors={"a": SetVectors(text, image)}, shown=range(200))
    both = np.concatenate([text, image])
    values = np.linalg.svd(both - both.mean(axis=0), compute_uv=False) ** 2
    assert space.explained == pytest.approx(values[:2].sum() / values.sum(), rel=1e-4)
    drawn = np.concatenate([space.text_N2, space.image_N2])
    assert np.square(drawn).sum(axis=0) == pytest.approx(values[:2], rel=1e-3)


@pytest.mark.parametrize("normalised", [False, True])
def test_true_pixels_rebuild_the_picture(config, embedder, held_out, normalised):
    """The targets of a pack, put back in their places, are the picture: no patch is turned."""
    stage = config.stages["joint_reconstruction"]
    settings = view_settings(config.data, geometry=embedder.geometry, stage=stage.data)
    draw = draw_for(0, "test", 0, 0)
    shared = {"draw": draw, "vocabulary": embedder.vocabulary}
    made = view_samples("caption", held_out.records[0], settings=settings, **shared)
    objective = stage.objective.model_copy(update={"image_mask_ratio": 0.6})
    hidden = corrupt(made.samples[0], objective, geometry=embedder.geometry, **shared)
    pack = build_pack(
        [hidden],
        rule=attention_rule("bidirectional"),
        geometry=embedder.geometry,
        vocabulary=embedder.vocabulary,
        noise=[draw],
        normalise_patches=normalised,
    )
    image, mask = hidden.sample.images[0], hidden.image_masks[0]
    assert 0 < mask.sum() < len(mask)
    rebuilt = rebuild_picture(
        image,
        mask=mask,
        predicted=pack.patch_targets.numpy(),
        geometry=embedder.geometry,
        normalised=normalised,
    )
    assert np.abs(rebuilt.rebuilt.astype(int) - image).max() <= 1  # rounding
    assert rebuilt.hidden.mean() == pytest.approx(mask.mean())


def test_a_wrong_guess_changes_hidden_pixels_alone(embedder, held_out):
    image = held_out.images[0].image
    mask = np.array([False, True, False, False])
    predicted = np.zeros((1, 3 * embedder.geometry.factor**2), dtype=np.float32)
    rebuilt = rebuild_picture(image, mask=mask, predicted=predicted, geometry=embedder.geometry)
    assert np.array_equal(rebuilt.rebuilt[~rebuilt.hidden], image[~rebuilt.hidden])
    assert rebuilt.hidden[:16, 16:].all()
    assert rebuilt.hidden.sum() == 16 * 16


def test_filling_in_shows_the_text_as_it_is(config, run_dir, held_out):
    name = "eos_bridged_reconstruction"
    embedder = load_embedder(config, run_dir=run_dir, after_stage=name)
    weights = step_folder(run_dir, stage=name, step=8) / WEIGHTS_NAME
    filled = fill_in(
        config, name, embedder=embedder, weights=weights, records=held_out.records, count=4
    )
    assert len(filled.examples) == 4
    names = {record.meta["name"] for record in held_out.records}
    for example in filled.examples:
        text = "".join(piece.text for piece in example.pieces)
        known = f"{example.context} {text}"
        assert any(name in known for name in names) or example.picture is not None
        assert any(piece.guess is not None for piece in example.pieces)
        assert example.rebuilt is None
    assert filled.num_tokens > 50
    assert filled.num_patches == 0


def test_filling_in_pictures_counts_hidden_parts(config, run_dir, held_out):
    name = "joint_reconstruction"
    embedder = load_embedder(config, run_dir=run_dir, after_stage=name)
    weights = step_folder(run_dir, stage=name, step=8) / WEIGHTS_NAME
    filled = fill_in(
        config, name, embedder=embedder, weights=weights, records=held_out.records, count=3
    )
    assert all(example.rebuilt is not None for example in filled.examples)
    assert 0.3 * 4 * 32 < filled.num_patches < 0.7 * 4 * 32  # half of 4 tokens of 32 pictures
    assert np.isfinite(filled.explained)


def test_mask_picture_hides_the_context_from_the_target(config, embedder, held_out):
    view = stage_visibility(
        config, "eos_bridged_reconstruction", embedder=embedder, record=held_out.records[0]
    )
    roles = np.array([role.name for role in view.roles])
    seen = {
        (a.name, b.name): view.visible_TT[np.ix_(roles == a.name, roles == b.name)].all()
        for a in Role
        for b in Role
    }
    assert not seen["TARGET", "CONTEXT"]
    assert not seen["CONTEXT", "TARGET"]
    assert seen["BRIDGE", "CONTEXT"]
    assert seen["TARGET", "BRIDGE"]


def test_mask_picture_of_a_pair_keeps_its_sides_apart(config, embedder, held_out):
    view = stage_visibility(config, "contrastive", embedder=embedder, record=held_out.records[0])
    first = view.labels.index("EOS") + 1
    assert not view.visible_TT[:first, first:].any()
    assert view.visible_TT[:first, :first].all()


def test_token_labels_name_special_tokens(config):
    vocabulary = load_vocabulary(config.model)
    from cocoa_dist.report.examples import load_tokenizer

    ids = np.array([vocabulary.vision_start, vocabulary.image_pad, vocabulary.eos])
    labels = token_labels(ids, tokenizer=load_tokenizer(config), vocabulary=vocabulary)
    assert labels == ["image start", "image", "EOS"]


# ---- a whole report


class Page(HTMLParser):
    """Collects what a page would fetch, and whether its tags close."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.images, self.scripts, self.ids = [], [], 0, 0, set()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag in ("script", "link", "iframe")
        self.images += tag == "img"
        self.ids.add(values.get("id"))
        if tag == "a" and values["href"].startswith("#"):
            self.links.append(values["href"][1:])
        if "src" in values:
            self.fetched.append(values["src"])

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report of a run with a control, made once, in a process of its own as people do it."""
    root = tmp_path_factory.mktemp("whole")
    run = finished_run(root / "run", with_best=True)
    control = finished_run(root / "control", CONTROL, cpu=3.9)
    first = report(run, "--control", control)
    assert first.returncode == 0, first.stderr
    return run, control, first.stdout


def report(*arguments):
    command = [sys.executable, "-m", "cocoa_dist.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_scores_of_all_arms_are_written(whole):
    run, _, said = whole
    content = json.loads((run / "report" / "retrieval.json").read_text())
    assert list(content["arms"]) == ["untrained", "cocoa", "contrastive"]
    seconds = [arm["train_cpu_seconds"] for arm in content["arms"].values()]
    assert seconds == pytest.approx([0.0, 12.0, 11.7])
    for arm in content["arms"].values():
        split = arm["splits"]["unseen_concept"]
        assert split["n"] == 32
        assert {"r1", "r10"} <= set(split["chance"])
        for way in ("t2i", "i2t"):
            assert set(split[way]) == {"r1", "r5", "r10"}
            assert all(0.0 <= value <= 100.0 for value in split[way].values())
    assert "ratio to the control: 1.026" in said
    assert "index.html" in said


@pytest.mark.slow
def test_page_is_whole_and_fetches_nothing(whole):
    text = (whole[0] / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.scripts == 0
    assert page.images > 60
    assert all(source.startswith("data:image/") for source in page.fetched)
    assert not re.search(r"url\(|@import", text)
    assert set(page.links) <= page.ids
    assert "prefers-color-scheme: dark" in text
    assert "Twemoji" in text


@pytest.mark.slow
def test_all_models_are_exported_and_pass_their_self_test(whole):
    from cocoa_dist.export import check_self_test

    names = ["debug", "debug_best", "other"]
    for name in names:
        found = check_self_test(whole[0] / "export" / name)
        assert found.passed, found.describe()
        assert len(found.differences) >= 6
    assert sorted(path.name for path in (whole[0] / "export").iterdir()) == names


@pytest.mark.slow
def test_the_best_checkpoint_is_exported_beside_the_end(whole):
    folders = [whole[0] / "export" / name for name in ("debug", "debug_best")]
    end, best = (load_file(folder / "model.safetensors") for folder in folders)
    assert not all(torch.equal(end[name], best[name]) for name in end)
    end, best = ((folder / "README.md").read_text() for folder in folders)
    assert "the best by held_out_recall/unseen_concept, 0.5" in best
    assert "the best by" not in end
    assert "cocoa, step 2" in best


@pytest.mark.slow
def test_second_call_is_up_to_date_and_says_the_same(whole):
    run, control, said = whole
    before = (run / "report" / "index.html").stat().st_mtime_ns
    again = report(run, "--control", control)
    assert "up to date" in again.stdout
    assert again.stdout.endswith(said[said.index("\nunseen_concept") :])
    assert (run / "report" / "index.html").stat().st_mtime_ns == before


@pytest.mark.slow
def test_up_to_date_call_does_not_import_torch(whole):
    run, control, _ = whole
    code = (
        "import sys; from cocoa_dist.report.__main__ import main; "
        f"code = main([{str(run)!r}, '--control', {str(control)!r}]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.slow
def test_a_lost_file_is_made_again(whole):
    run, control, _ = whole
    page = run / "report" / "index.html"
    page.unlink()
    assert "up to date" not in report(run, "--control", control).stdout
    assert page.is_file()


def test_bad_input_is_said_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
