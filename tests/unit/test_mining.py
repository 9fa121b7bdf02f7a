"""Mined hard negatives: the right ones, the same after any kill, and none of another revision."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pair_records import pair_record, picture, write_pairs
from PIL import Image
from tiny_exports import MAX_TEXT_TOKENS, tiny_export

from cocoa_dist.config import StageDataConfig, load_recipe
from cocoa_dist.data.blend import blend_file
from cocoa_dist.data.negatives import NEGATIVE_IDENTITIES
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.revision import check_origin
from cocoa_dist.data.samples import draw_for, view_samples
from cocoa_dist.data.shards import ShardReader, write_shards
from cocoa_dist.data.writing.verify import verify_dataset
from cocoa_dist.mining.mine import MiningOptions, mine
from cocoa_dist.mining.search import NOTHING, Neighbours, Pool, Queries, brute_force, exact, recall
from cocoa_dist.mining.source import MinedSource
from cocoa_dist.mining.vectors import ExportedModel, GivenVectors, _parts
from cocoa_dist.mining.work import WorkFolder
from cocoa_dist.train.evaluate import embedding_pack, load_embedder

TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
COUNT, WIDTH = 60, 16


def problem(count: int, *, seed: int = 0) -> tuple[Queries, Pool]:
    """Clustered vectors; some candidates share an identity, some a content."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(count // 4 + 1, WIDTH))
    target = centre[random.integers(0, len(centre), count)] + 0.5 * random.normal(
        size=(count, WIDTH)
    )
    query = target + 0.4 * random.normal(size=(count, WIDTH))
    target, query = ((v / np.linalg.norm(v, axis=1)[:, None]) for v in (target, query))
    identity, content = random.integers(0, count // 2, count), np.arange(count)
    content[5], target[5] = content[3], target[3]
    pool = Pool.of(target.astype(np.float32), identity, content)
    own = (query * target).sum(axis=1).astype(np.float32)
    own[:10] = -0.3  # few candidates lie that low
    return Queries(query.astype(np.float32), identity, content, own - 0.05), pool


@pytest.mark.parametrize("block", [7, 100, 32768])
def test_streamed_search_is_brute_force(block, monkeypatch) -> None:
    monkeypatch.setattr("cocoa_dist.mining.search._CANDIDATES", block)
    queries, pool = problem(200)
    found, right = exact(queries, pool, count=6), brute_force(queries, pool, count=6)
    assert (found.number_QK == right.number_QK).all()
    assert np.allclose(found.score_QK, right.score_QK, atol=1e-6)
    assert recall(found, right) == 1.0
    assert (found.number_QK == NOTHING).any()  # some have fewer than six below their ceiling
    for row, numbers in enumerate(found.number_QK):
        chosen = numbers[numbers != NOTHING]
        assert (pool.identity_N[chosen] != queries.identity_Q[row]).all()
        assert 5 not in chosen  # its content has come before
        assert len(set(chosen.tolist())) == len(chosen)
        assert (found.score_QK[row][: len(chosen)] <= queries.ceiling_Q[row]).all()


def test_recall_counts_what_is_missing() -> None:
    right = Neighbours(np.array([[3, 1], [2, NOTHING]]), np.array([[0.9, 0.8], [0.5, -np.inf]]))
    found = Neighbours(np.array([[3, 7], [9, NOTHING]]), np.array([[0.9, 0.1], [0.2, -np.inf]]))
    assert recall(right, right) == 1.0
    assert recall(found, right) == pytest.approx(1 / 3)


def test_faiss_finds_most_of_it() -> None:
    pytest.importorskip("faiss")
    from cocoa_dist.mining.search import FaissSearch

    queries, pool = problem(2000)
    right = brute_force(queries, pool, count=5)
    few = FaissSearch(pool, probes=4).search(queries, count=5)
    all_cells = FaissSearch(pool, probes=10**6).search(queries, count=5)
    assert 0.5 < recall(few, right) <= 1.0
    assert recall(all_cells, right) == 1.0


def records() -> list[Record]:
    made = [pair_record(n, identity=f"kind{n % 20}") for n in range(COUNT)]
    made[7] = pair_record(7, shown=3, identity="other")  # the picture of record 3
    made[9] = replace(made[9], negatives=((made[9].query[0],),))
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data", records())


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    folder = tmp_path / "vectors"
    folder.mkdir()
    target = random.normal(size=(COUNT, WIDTH)).astype(np.float32)
    np.save(folder / "targets.npy", target)
    np.save(folder / "queries.npy", target + random.normal(size=target.shape).astype(np.float32))
    return folder


def mined(data: Path, vectors: Path, out: Path, **options: object):
    chosen = MiningOptions(**{"count": 3, "block": 16, **options})
    given = GivenVectors(vectors, count=COUNT)
    return mine(data, out, given, work=out.with_name(f"{out.name}.mining"), options=chosen)


def test_a_mined_data_set_holds_the_nearest_allowed_targets(data, vectors, tmp_path) -> None:
    out = tmp_path / "out"
    report = mined(data, vectors, out)
    assert not (tmp_path / "out.mining").exists()
    assert report.measured.recall == 1.0
    assert report.measured.checked == COUNT
    assert verify_dataset(out, tokenizer=None, processes=1).num_problems == 0
    plain, reader, before = records(), ShardReader(out), ShardReader(data)
    query, target = (np.load(vectors / f"{name}.npy") for name in ("queries", "targets"))
    query, target = (v / np.linalg.norm(v, axis=1)[:, None] for v in (query, target))
    for number, old in enumerate(plain):
        new = reader.record(number)
        assert (new.key, new.query, new.identity) == (old.key, old.query, old.identity)
        assert new.images[0] == old.images[0]
        ceiling = query[number] @ target[number] - 0.05
        order = np.argsort(-(target @ query[number]), kind="stable")
        expected = [
            int(n)
            for n in order
            if query[number] @ target[n] <= ceiling
            and plain[n].identity != old.identity
            and plain[n].images[0] != old.images[0]
            and n != 7  # the same picture as 3
        ][:3]
        assert new.meta["negative_identities"] == [plain[n].identity for n in expected]
        shown = [new.images[side[0].image] for side in new.negatives]
        assert shown == [plain[n].images[0] for n in expected]
        assert new.meta["mined"]["data"] == before.fingerprint
        scores = new.meta["scores"]
        assert scores["positives"] == [pytest.approx(query[number] @ target[number], abs=1e-5)]
        assert len(scores["negatives"]) == len(expected)
    said = reader.info.info["mined"]
    assert said["data"] == before.fingerprint
    assert said["location"] == str(data)
    assert said["recall"] == 1.0


def test_a_second_positive_is_no_negative(tmp_path: Path) -> None:
    """A stage would refuse the whole record, in every pass."""
    sides = [(text_part(word),) for word in ("cat", "kitten", "dog")]
    query = (text_part("a small cat"),)
    write_shards(
        [
            Record("a", "t", query, positives=(sides[0], sides[1])),
            Record("b", "t", query, positives=(sides[1],)),
            Record("c", "t", query, positives=(sides[2],)),
        ],
        tmp_path / "data",
        info={},
    )
    found = {"number": np.array([[1, 2]] * 3), "score": np.zeros((3, 2)), "own": np.ones(3)}
    np.savez(tmp_path / "found.npz", **found)
    source = MinedSource(str(tmp_path / "data"), tmp_path / "found.npz", {}, {})
    record = next(iter(source.rows(0, 1)))
    assert isinstance(record, Record)
    assert record.negatives == (sides[2],)
    assert len(record.meta[NEGATIVE_IDENTITIES]) == 1


def test_own_negatives_stay_if_asked_for(data, vectors, tmp_path) -> None:
    mined(data, vectors, tmp_path / "out", append=True)
    record = ShardReader(tmp_path / "out").record(9)
    assert record.negatives[0] == records()[9].negatives[0]
    assert len(record.negatives) == len(record.meta["negative_identities"]) > 1
    assert "scores" not in record.meta  # nobody has scored the first


def test_finished_work_is_not_done_again_and_changed_work_is_refused(
    data, vectors, tmp_path
) -> None:
    first = mined(data, vectors, tmp_path / "out")
    again = mined(data, vectors, tmp_path / "out")
    assert again.built.info == first.built.info
    assert again.measured == first.measured
    assert not (tmp_path / "out.mining").exists()
    work = tmp_path / "work"
    WorkFolder(work, {"data": "a", "count": 3})
    with pytest.raises(ValueError, match=r"another mining \(count: 3 -> 4\).*--restart"):
        WorkFolder(work, {"data": "a", "count": 4})
    WorkFolder(work, {"data": "a", "count": 4}, restart=True)


def test_a_damaged_block_is_named(tmp_path) -> None:
    work = WorkFolder(tmp_path / "work", {"data": "a"})
    work.write("vectors", 0, {"a": np.zeros(3)})
    file = work.file("vectors", 0)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"vectors-000000.npz cannot be read"):
        work.read("vectors", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v[:-1], r"expected floats of shape \(60, width\)"),
        (lambda v: np.where(np.arange(60)[:, None] == 4, 0.0, v), "record 'pair4' has length 0.0"),
        (lambda v: np.where(np.arange(60)[:, None] == 4, np.nan, v), "'pair4' has length nan"),
        (lambda v: v[:, :5], "queries have 5 dimensions"),
        (lambda v: v.astype(np.int64), "holds int64"),
    ],
)
def test_vectors_that_are_none_are_named(change, words, data, vectors, tmp_path) -> None:
    file = vectors / "queries.npy"
    np.save(file, change(np.load(file)))
    with pytest.raises(ValueError, match=words):
        mined(data, vectors, tmp_path / "out")


def test_negatives_of_another_revision_are_refused(data, vectors, tmp_path) -> None:
    mined(data, vectors, tmp_path / "out")
    info = ShardReader(tmp_path / "out").info
    check_origin(info, "out")
    changed = [*records()[:-1], pair_record(99)]
    shutil.rmtree(data)
    check_origin(info, "out")  # gone: it says nothing
    write_pairs(data, changed)
    words = r"out: its hard negatives were mined from revision .* mine them again"
    with pytest.raises(ValueError, match=words):
        check_origin(info, "out")
    tree = {"view": "pair", "sources": {"a": {"path": str(tmp_path / "out")}}, "negatives": 2}
    with pytest.raises(ValueError, match=words):
        blend_file(StageDataConfig.model_validate(tree), "contrastive", tmp_path / "blend")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, TOOLS)
    import mine_hard_negatives

    sys.path.remove(TOOLS)
    return mine_hard_negatives


def test_the_command_says_what_it_found(tool, data, vectors, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = [str(out), "--data", str(data), "--vectors", str(vectors), "--processes", "1"]
    assert tool.main([*arguments, "--count", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "60 records with up to 2 negatives" in said
    assert "recall 100.0 % of brute force over 60 queries" in said
    assert tool.main([*arguments, "--count", "0"]) == 2
    assert "count is 0, expected 1 or more" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "b"), "--data", str(data), "--model", str(vectors)]) == 2
    assert "has no weights (*.safetensors)" in capsys.readouterr().err
    missing = [str(tmp_path / "c"), "--data", str(tmp_path / "no"), "--vectors", str(vectors)]
    assert tool.main(missing) == 2
    assert "is not a data set" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_again_and_again_it_writes_what_one_call_would(vectors, data, tmp_path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    mined(data, vectors, undisturbed, block=4, count=4)
    command = [sys.executable, f"{TOOLS}/mine_hard_negatives.py", str(out), "--data", str(data)]
    command += ["--vectors", str(vectors), "--block", "4", "--count", "4", "--processes", "1"]
    work, seen, deaths = tmp_path / "out.mining", 0, 0
    for _ in range(40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None:
            done = len(list(work.glob("*-*.npz"))) if work.exists() else 0
            if done > seen + 4:  # it has got on: kill it
                seen = done
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        said = process.communicate()[0].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
        deaths += 1
    assert deaths >= 3
    assert process.returncode == 0
    one, other = (ShardReader(path).info for path in (undisturbed, out))
    assert one.fingerprint == other.fingerprint
    assert one.info["mined"] == other.info["mined"]
    assert not work.exists()


def test_a_model_without_weights_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="has no weights"):
        ExportedModel(tmp_path)


def test_the_help_names_the_options(tool, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    said = capsys.readouterr().out
    for word in ("--vectors", "--margin", "data.negatives=4", "goes on"):
        assert word in said


def test_pictures_are_decoded_as_in_training() -> None:
    clear, turned = Image.new("RGBA", (40, 30), (9, 9, 9, 0)), Image.new("RGB", (40, 30))
    exif = turned.getexif()
    exif[0x0112] = 6  # on its side
    images = tuple(encoded(one, exif=e) for one, e in ((clear, None), (turned, exif)))
    side = (image_part(0), image_part(1))
    found = _parts(Record("r", "t", side, positives=(side,), images=images), side).pictures
    assert np.asarray(found[0]).min() == 255  # what nobody sees is white, whatever is below
    assert [one.size for one in found] == [(40, 30), (30, 40)]


def encoded(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def test_sides_of_several_pictures_are_embedded_as_in_training(tmp_path) -> None:
    """Their tokens are more than the folder's limit, which is for one picture and its text."""
    folder = tiny_export(tmp_path / "model")
    texts = ["which of them is a red fox", " ".join(["one and two"] * 11), ""]
    sides = [(image_part(0), image_part(1), *((text_part(t),) if t else ())) for t in texts]
    sides.append((image_part(1), text_part("alone")))
    pictures = (picture(1), picture(2))
    records = [
        Record(f"r{n}", "t", side, positives=((text_part("fox"),),), images=pictures)
        for n, side in enumerate(sides)
    ]
    found, _ = ExportedModel(folder, instruction="Find").vectors(range(4), records)
    config = load_recipe("debug", [f"data.max_text_tokens={MAX_TEXT_TOKENS}"])
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    settings = replace(embedder.settings, negatives=0, instruction="Find")
    samples = [
        view_samples(
            "pair",
            record,
            draw=draw_for(0, "s", 0, 0),
            vocabulary=embedder.vocabulary,
            settings=settings,
        ).samples[0]
        for record in records
    ]
    longest = max(len(sample.input_ids) for sample in samples)
    limit = ExportedModel(folder)._encoder.tokenizer.model_max_length
    assert longest > limit
    pack = embedding_pack(
        samples, stage=embedder.stage, geometry=embedder.geometry, vocabulary=embedder.vocabulary
    )
    with torch.inference_mode():
        expected = embedder.model(pack).embeddings_ED
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
