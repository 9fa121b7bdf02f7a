"""emoji-MMEB: built alike each time, from held-out concepts, and scored as it has to be."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_exports import collapse, tiny_export

from cocoa_dist.data.shards import ShardReader
from cocoa_dist.evaluation import read_sets, read_vectors, write_vectors
from cocoa_dist.evaluation.rows import RowRules, find_sets, image_paths, images_root, read_set

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "cocoa_dist" / "assets" / "emoji"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builder():
    return load("build_emoji_mmeb")


@pytest.fixture(scope="module")
def evaluator():
    return load("evaluate_mmeb")


@pytest.fixture(scope="module")
def data(builder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji") / "emoji-MMEB"
    builder.build(folder)
    return folder


@pytest.fixture(scope="module")
def table(data):
    return read_sets(data / "sets.yaml")


@pytest.fixture(scope="module")
def sets(data, table):
    files = find_sets(data)
    return {n: read_set(n, files[n], info=table[n], rules=RowRules()) for n in files}


def metas(split: str) -> list[dict]:
    reader = ShardReader(EMOJI / split)
    try:
        return [reader.record(number).meta for number in range(len(reader))]
    finally:
        reader.close()


def rows(data: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def test_all_four_groups_are_there_with_counts_and_chance(data, table, sets):
    assert {info.group for info in table.values()} == {
        "classification",
        "vqa",
        "retrieval",
        "grounding",
    }
    assert sets.keys() == table.keys()
    readme = (data / "README.md").read_text()
    for name, one in sets.items():
        counts = {len(listed) for listed in one.candidates_N}
        assert table[name].rows == len(one.query_N)
        assert counts == {table[name].candidates} or table[name].candidates is None
        assert min(counts) >= 3
        assert f"| {name} | {table[name].group} | {len(one.query_N)} |" in readme


def test_every_picture_is_there_and_opens(data, sets):
    paths = image_paths(list(sets.values()), images_root(data))
    assert len(paths) > 1000
    for path in paths.values():
        with Image.open(path) as picture:
            assert picture.size in {(64, 64), (160, 160)} or path.parent.name == "crops"


def test_no_concept_of_it_is_trained_or_tuned_on(sets):
    used = {Path(i.image).stem for one in sets.values() for i in one.items if "emoji/" in i.image}
    held_out = {meta["hexcode"] for meta in metas("unseen_concept")}
    assert used <= held_out
    for split in ("train", "validation", "unseen_picture"):
        assert not used & {meta["hexcode"] for meta in metas(split)}


def test_the_same_data_gives_the_same_bytes(data, builder, tmp_path):
    builder.build(tmp_path / "again")
    one, other = ({p.relative_to(f): p for p in f.rglob("*")} for f in (data, tmp_path / "again"))
    assert one.keys() == other.keys()
    for name, path in one.items():
        assert path.is_dir() or path.read_bytes() == other[name].read_bytes(), name


def test_an_existing_folder_is_left_alone(data, builder, capsys):
    assert builder.main([str(data)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_right_answers_are_right(data):
    known = {meta["hexcode"]: meta for meta in metas("unseen_concept")}
    for row in rows(data, "emoji-group"):
        meta = known[Path(row["qry_img_path"]).stem]
        assert row["tgt_text"][0] == meta["group"].replace("-", " and ")
    for row in rows(data, "emoji-i2t-de"):
        meta = known[Path(row["qry_img_path"]).stem]
        assert row["tgt_text"][0] == meta["names"]["de"]
    for row in rows(data, "emoji-words-t2i"):
        meta = known[Path(row["tgt_img_path"][0]).stem]
        words = row["qry_text"].split(": ", 1)[1].strip().split(", ")
        assert set(words) <= set(meta["keywords"])
    for row in rows(data, "emoji-vqa-keyword"):
        meta = known[Path(row["qry_img_path"]).stem]
        assert row["tgt_text"][0] in meta["keywords"]
        assert not set(row["tgt_text"][1:]) & set(meta["keywords"])
    for row in rows(data, "emoji-vqa-person"):
        meta = known[Path(row["qry_img_path"]).stem]
        assert row["tgt_text"][0].removeprefix("a ") in meta["name"]


def test_a_crop_is_the_part_of_its_scene_that_the_name_stands_for(data):
    known = {meta["hexcode"]: meta for meta in metas("unseen_concept")}
    for row in rows(data, "emoji-crop")[::20]:
        code = Path(row["qry_img_path"]).stem
        assert f'"{known[code]["name"]}"' in row["qry_text"]
        scene = np.asarray(Image.open(data / "images" / row["qry_img_path"]))
        crop = np.asarray(Image.open(data / "images" / row["tgt_img_path"][0]))
        side = len(crop)
        places = np.lib.stride_tricks.sliding_window_view(scene, (side, side, 3))[:, :, 0]
        assert (places == crop).all(axis=(2, 3, 4)).any()
        with Image.open(data / "images" / "emoji" / f"{code}.webp") as drawing:
            resized = drawing.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(resized), crop)


def test_matching_candidates_share_pictures_and_differ_in_text(data, sets):
    one = sets["emoji-matching"]
    first = [one.items[i] for i in one.candidates_N[0]]
    assert len({item.image for item in first}) < len(first) == len(set(first))


def test_no_answer_stands_at_one_place_of_a_hidden_order(data):
    """The wrong ones are in an order that does not tell the right one."""
    listed = [tuple(sorted(row["tgt_text"])) for row in rows(data, "emoji-group")]
    assert len(set(listed)) == 1
    assert len({tuple(row["tgt_text"]) for row in rows(data, "emoji-group")}) > 9


def score(evaluator, capsys, *arguments: object) -> dict:
    capsys.readouterr()  # what making a model has printed
    assert evaluator.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_collapsed_shuffled_and_perfect_vectors(evaluator, sets, table, data, tmp_path, capsys):
    """Vectors made by hand for the real rows; the next test sends a model through."""
    draw = np.random.default_rng(0)
    folders = {kind: tmp_path / kind for kind in ("collapsed", "shuffled", "perfect")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "sets.yaml").write_text((data / "sets.yaml").read_text())
    for name, one in sets.items():
        base = vectors_of(name, one, draw)
        write_vectors(base, folders["perfect"])
        order = draw.permutation(len(base.query_ND))
        write_vectors(replaced(base, query_ND=base.query_ND[order]), folders["shuffled"])
        flat = {f: np.ones_like(getattr(base, f)) for f in ("query_ND", "candidates_MD")}
        write_vectors(replaced(base, **flat), folders["collapsed"])
    perfect, flat, shuffled = (
        score(evaluator, capsys, "--embeddings", folders[k])
        for k in ("perfect", "collapsed", "shuffled")
    )
    assert perfect["overall"] == perfect["ind"] == perfect["ood"] == 100.0
    assert set(perfect["groups"].values()) == {100.0}
    for entry in flat["sets"].values():
        assert entry["precision_at_1"] == pytest.approx(entry["chance"], abs=1e-9)
    for name, entry in shuffled["sets"].items():
        share = entry["chance"] / 100
        # A shuffled row still has its own class now and then, and every row is one draw.
        spread = 100 * np.sqrt(share * (1 - share) / entry["rows"])
        if table[name].group != "classification":
            assert abs(entry["precision_at_1"] - entry["chance"]) < 4.5 * spread + 1, name


def vectors_of(name: str, one, draw):
    """Random directions, one for each candidate; a query is its right one."""
    from cocoa_dist.evaluation.scores import SetVectors
    from cocoa_dist.evaluation.vector_files import ragged

    used = {item: number for number, item in enumerate(dict.fromkeys(sum(one.candidates_N, ())))}
    index, count = ragged([[used[item] for item in listed] for listed in one.candidates_N])
    candidates = draw.normal(size=(len(used), 64)).astype(np.float32)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    return SetVectors(name, candidates[index[:, 0]], candidates, index, count)


def replaced(vectors, **changes):
    from dataclasses import replace

    return replace(vectors, **changes)


@pytest.mark.slow
def test_a_model_goes_through_and_a_collapsed_one_scores_chance(data, evaluator, tmp_path, capsys):
    folder = tiny_export(tmp_path / "collapsed", change=collapse)
    save = ("--save-embeddings", tmp_path / "vectors")
    found = score(
        evaluator, capsys, "--data", data, "--model", folder, "--cache", tmp_path / "cache", *save
    )
    assert len(found["sets"]) == len(yaml.safe_load((data / "sets.yaml").read_text())["sets"])
    for entry in found["sets"].values():
        assert entry["precision_at_1"] == pytest.approx(entry["chance"], abs=1e-9)
        assert entry["collapsed"]
    again = score(evaluator, capsys, "--embeddings", tmp_path / "vectors")
    assert again["sets"] == found["sets"]
    assert len(read_vectors(tmp_path / "vectors" / "emoji-t2i.npz", name="x").query_ND) == 197


@pytest.mark.slow
def test_a_random_model_and_its_shuffled_vectors_score_about_chance(
    data, evaluator, tmp_path, capsys
):
    folder = tiny_export(tmp_path / "random")
    save = ("--save-embeddings", tmp_path / "vectors", "--no-instructions", "--cache", "none")
    score(evaluator, capsys, "--data", data, "--model", folder, *save)
    for path in sorted((tmp_path / "vectors").glob("*.npz")):
        vectors = read_vectors(path, name=path.stem)
        order = np.random.default_rng(1).permutation(len(vectors.query_ND))
        write_vectors(replaced(vectors, query_ND=vectors.query_ND[order]), tmp_path / "vectors")
    found = score(evaluator, capsys, "--embeddings", tmp_path / "vectors")
    # 18 sets of about 180 rows: the mean's standard error is below 0.7 points
    assert found["overall"] == pytest.approx(found["chance"]["overall"], abs=3)
    assert found["groups"]["retrieval"] == pytest.approx(0.52, abs=0.8)
