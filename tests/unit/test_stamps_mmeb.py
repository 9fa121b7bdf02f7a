"""The transfer set of Tux Paint's stamps, from a folder laid out as its package is unpacked."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_exports import tiny_export

from cocoa_dist.evaluation import read_sets
from cocoa_dist.evaluation.rows import RowRules, find_sets, image_paths, images_root, read_set

ROOT = Path(__file__).resolve().parents[2]
THINGS = {
    "animals/birds": ["owl", "duck", "robin", "swan", "crane"],
    "animals/mammals": ["fox", "bear", "lion", "wolf", "seal"],
    "food/fruit": ["apple", "pear", "plum"],
    "vehicles": ["tram", "lorry", "glider"],
    "military": ["helmet"],  # too few for a class
    "symbols/alphabets": ["a", "b", "c"],
}


@pytest.fixture(scope="module")
def builder():
    name = "build_stamps_mmeb"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fetched")
    below = folder / "tuxpaint-stamps-default" / "usr" / "share" / "tuxpaint" / "stamps"
    draw = np.random.default_rng(0)
    for place, names in THINGS.items():
        (below / place).mkdir(parents=True)
        for name in names:
            pixels = draw.integers(0, 256, (400, 500, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(below / place / f"{name}.png")
            said = f"A {name}.\nde.utf8=Ein {name}.\nfr.utf8=\nja.utf8={name} desu\n"
            (below / place / f"{name}.txt").write_text(said)
    birds = below / "animals" / "birds"
    (birds / "owl2.png").write_bytes((birds / "owl.png").read_bytes())
    (birds / "owl2.txt").write_text("Another owl.\n")
    Image.new("RGB", (9, 9)).save(birds / "duck2.png")
    (birds / "duck2.txt").write_text("A duck.\n")  # one sentence, two pictures
    (birds / "cut.png").write_bytes((birds / "owl.png").read_bytes()[:1000])
    (birds / "cut.txt").write_text("A cut one.\n")
    (birds / "silent.png").write_bytes((birds / "duck.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(builder, fetched, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "stamps"
    builder.build(folder, fetched=fetched)
    return folder


@pytest.fixture(scope="module")
def sets(data):
    table, files = read_sets(data / "sets.yaml"), find_sets(data)
    return {n: read_set(n, files[n], info=table[n], rules=RowRules()) for n in files}


def rows(data: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def test_every_set_can_be_read_and_every_picture_is_there(data, sets):
    assert sets.keys() == read_sets(data / "sets.yaml").keys()
    assert len(sets) == 8  # nothing is said in French or Russian
    paths = image_paths(list(sets.values()), images_root(data))
    assert len(paths) == 18  # 5 birds and a second duck, 5 mammals, 3 fruit, 3 vehicles, a helmet
    for path in paths.values():
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert max(picture.size) <= 336


def test_classes_are_folders_with_enough_stamps(data):
    assert {tuple(sorted(row["tgt_text"])) for row in rows(data, "stamps-group")} == {
        ("animals", "food", "vehicles")
    }
    assert {row["tgt_text"][0] for row in rows(data, "stamps-kind")} == {"birds", "mammals"}


def test_a_sentence_of_two_pictures_is_not_asked_for(data):
    asked = [row["qry_text"] for row in rows(data, "stamps-t2i")]
    assert "Find the picture of this sentence: A owl.\n" in asked
    assert not any("duck" in text for text in asked)


def test_right_answers_come_first_and_are_right(data):
    for row in rows(data, "stamps-i2t"):
        assert row["tgt_text"][0] == f"A {Path(row['qry_img_path']).stem}."
    for row in rows(data, "stamps-t2i-de"):
        name = Path(row["tgt_img_path"][0]).stem
        assert row["qry_text"].endswith(f": Ein {name}.\n")
        assert len(set(row["tgt_img_path"])) == len(row["tgt_img_path"])
    for row in rows(data, "stamps-de2en"):
        assert row["qry_text"].split("Ein ")[1].strip() == row["tgt_text"][0].split("A ")[1]


@pytest.mark.slow
def test_it_is_scored_as_any_other_set(data, tmp_path):
    model = tiny_export(tmp_path / "model")
    command = [sys.executable, ROOT / "tools" / "evaluate_mmeb.py", "--data", data]
    command += ["--model", model, "--cache", "none", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sets"].keys() == find_sets(data).keys()
    assert found["groups"].keys() == {"classification", "retrieval", "vqa"}


def test_what_is_left_out_is_named(data):
    readme = (data / "README.md").read_text()
    assert "- animals/birds/cut.png: " in readme
    assert "- animals/birds/owl2.png: another stamp has the same picture" in readme
    assert "GPL-2" in readme


def test_the_same_package_gives_the_same_bytes(builder, data, fetched, tmp_path):
    builder.build(tmp_path / "again", fetched=fetched)
    one, other = ({p.relative_to(f): p for p in f.rglob("*")} for f in (data, tmp_path / "again"))
    assert one.keys() == other.keys()
    for name, path in one.items():
        assert path.is_dir() or path.read_bytes() == other[name].read_bytes(), name


def test_a_folder_without_stamps_and_one_that_is_there_are_refused(builder, data, tmp_path, capsys):
    assert builder.main([str(tmp_path / "out"), "--fetched", str(tmp_path)]) == 2
    assert "has no stamps" in capsys.readouterr().err
    assert builder.main([str(data)]) == 2  # and nothing is downloaded
    assert "already exists" in capsys.readouterr().err


def test_a_package_that_cannot_be_had_is_said(builder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder.main([str(tmp_path / "out")]) == 2
    assert "tuxpaint-stamps-default cannot be had here: apt-get is missing" in (
        capsys.readouterr().err
    )
