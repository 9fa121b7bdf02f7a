"""The scorer against a slow obvious one, the published rule, and everything it has to refuse."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cocoa_dist.evaluation import (
    SetVectors,
    mmeb_sets,
    read_sets,
    read_vectors,
    score_set,
    summarise,
    write_vectors,
)
from cocoa_dist.evaluation import scores as scores_module

ROOT = Path(__file__).resolve().parents[2]
OOD = (
    "Place365 ImageNet-A ImageNet-R ObjectNet Country211 ScienceQA VizWiz GQA TextVQA OVEN "
    "FashionIQ EDIS Wiki-SS-NQ Visual7W-Pointing RefCOCO RefCOCO-Matching"
).split()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_mmeb", ROOT / "tools/evaluate_mmeb.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_table(seed: int, *, each: int = 1) -> SetVectors:
    """Small whole numbers: every score is exact in float32, and ties are common."""
    draw = np.random.default_rng(seed)
    rows, width, dimensions = draw.integers(1, 9), draw.integers(1, 12), draw.integers(1, 5)
    pool = width + draw.integers(0, 20)
    ragged = draw.random() < 0.3
    dimensions *= each
    return SetVectors(
        name=f"table{seed}",
        vectors_each=each,
        query_ND=draw.integers(-2, 3, (rows, dimensions)).astype(np.float32),
        candidates_MD=draw.integers(-2, 3, (pool, dimensions)).astype(np.float32),
        candidate_index_NC=np.stack([draw.permutation(pool)[:width] for _ in range(rows)]),
        candidate_count_N=draw.integers(1, width + 1, rows) if ragged else None,
    )


def plain_precision(vectors: SetVectors) -> float:
    """Written out with Python numbers: the share of tie orders in which the right one is first."""
    total = 0.0
    for row, query in enumerate(vectors.query_ND.tolist()):
        count = int(vectors.counts[row])
        listed = vectors.candidate_index_NC[row, :count].tolist()
        scores = [
            plain_score(query, vectors.candidates_MD[one].tolist(), vectors.vectors_each)
            for one in listed
        ]
        if scores[0] == max(scores):
            total += 1 / scores.count(scores[0])
    return 100 * total / len(vectors.query_ND)


def plain_score(query: list[float], candidate: list[float], each: int) -> float:
    """The sum over the vectors of the query of the best product with one of the candidate."""
    width = len(query) // each
    cut = [[one[i : i + width] for i in range(0, len(one), width)] for one in (query, candidate)]
    return sum(
        max(sum(a * b for a, b in zip(asks, answer, strict=True)) for answer in cut[1])
        for asks in cut[0]
    )


@pytest.mark.parametrize("each", [1, 2, 4])
def test_a_thousand_random_tables_score_as_the_plain_implementation(each):
    for seed in range(1000 // each):
        vectors = random_table(seed, each=each)
        assert score_set(vectors).precision_at_1 == pytest.approx(
            plain_precision(vectors), abs=1e-9
        ), f"table {seed}"


def published_precision(vectors: SetVectors) -> float:
    """MMEB's own rule: the arg-max of a row's scores is its first candidate."""
    scores_NC = np.einsum(
        "nd,ncd->nc", vectors.query_ND, vectors.candidates_MD[vectors.candidate_index_NC]
    )
    return float(100.0 * (scores_NC.argmax(axis=1) == 0).mean())


def test_without_ties_the_published_scorer_agrees():
    for seed in range(50):
        draw = np.random.default_rng(seed)
        candidates = draw.normal(size=(60, 8)).astype(np.float32)
        index = np.stack([draw.permutation(60)[:20] for _ in range(40)])
        queries = candidates[index[:, 0]] + draw.normal(size=(40, 8)).astype(np.float32)
        vectors = SetVectors("normal", queries.astype(np.float32), candidates, index)
        score = score_set(vectors)
        assert score.tied_rows == 0
        assert score.precision_at_1 == pytest.approx(published_precision(vectors))
        assert score.precision_at_1 == score.argmax_precision_at_1


def test_the_expected_value_is_what_random_tie_breaks_give_on_average():
    draw = np.random.default_rng(3)
    vectors = random_table(17)
    hits, rounds = 0, 4000
    for row, query in enumerate(vectors.query_ND):
        listed = vectors.candidate_index_NC[row, : vectors.counts[row]]
        scores = vectors.candidates_MD[listed] @ query
        for _ in range(rounds):
            hits += np.lexsort((draw.random(len(scores)), -scores))[0] == 0
    # standard error of a share of 4000 draws: at most 0.8 points
    assert score_set(vectors).precision_at_1 == pytest.approx(
        100 * hits / (rounds * len(vectors.query_ND)), abs=3
    )


def normal_vectors(*, rows=40, pool=50, width=10, dimensions=16, seed=0, **changes) -> SetVectors:
    draw = np.random.default_rng(seed)
    parts = {
        "name": "made",
        "query_ND": draw.normal(size=(rows, dimensions)).astype(np.float32),
        "candidates_MD": draw.normal(size=(pool, dimensions)).astype(np.float32),
        "candidate_index_NC": np.stack([draw.permutation(pool)[:width] for _ in range(rows)]),
    }
    return SetVectors(**(parts | changes))


@pytest.mark.parametrize("dimensions", [3, 17, 64, 1031])
def test_a_collapsed_model_scores_chance_exactly(dimensions):
    """Equal vectors tie whatever a matrix product rounds in its columns."""
    one = np.random.default_rng(1).normal(size=dimensions).astype(np.float32)
    vectors = normal_vectors(
        query_ND=np.tile(one, (40, 1)), candidates_MD=np.tile(one, (50, 1)), width=7
    )
    score = score_set(vectors)
    assert score.precision_at_1 == pytest.approx(100 / 7, abs=1e-12)
    assert score.precision_at_1 == pytest.approx(score.chance, abs=1e-12)
    assert (score.tied_rows, score.distinct_candidates, score.collapsed) == (40, 1, True)
    assert score.argmax_precision_at_1 == 100


def test_random_vectors_score_chance_within_its_spread():
    score = score_set(normal_vectors(rows=4000, pool=100, width=10))
    # 4000 rows at 10 per cent: standard error 0.47 points
    assert score.precision_at_1 == pytest.approx(10, abs=4 * 0.48)
    assert score.chance == pytest.approx(10)
    assert not score.collapsed


def test_a_perfect_model_scores_100():
    index = np.stack([np.roll(np.arange(12), -row) for row in range(12)])
    eye = np.eye(12, dtype=np.float32)
    score = score_set(SetVectors("perfect", eye, eye, index))
    assert (score.precision_at_1, score.tied_rows) == (100.0, 0)


def test_blocks_change_nothing(monkeypatch):
    vectors = normal_vectors(rows=33, width=11)
    whole = score_set(vectors)
    monkeypatch.setattr(scores_module, "BLOCK_VALUES", 400)
    assert score_set(vectors) == whole


def test_mean_cosine_is_that_of_all_pairs():
    vectors = np.random.default_rng(2).normal(size=(30, 5)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[~np.eye(30, dtype=bool)]
    assert scores_module.mean_cosine(vectors) == pytest.approx(float(pairs.mean()), abs=1e-6)
    assert scores_module.mean_cosine(vectors[:1]) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["query_ND", "candidates_MD"])
def test_what_is_not_finite_is_refused_by_set_and_row(side, value):
    good = normal_vectors()
    bad = getattr(good, side).copy()
    bad[7, 3] = value
    with pytest.raises(ValueError, match=r"set 'made': (query|candidates) row 7 holds"):
        normal_vectors(**{side: bad})


def test_scores_that_overflow_are_refused():
    good = normal_vectors()
    with pytest.raises(ValueError, match="row 0: a score is not finite"):
        score_set(
            normal_vectors(
                query_ND=good.query_ND * np.float32(1e30),
                candidates_MD=good.candidates_MD * np.float32(1e30),
            )
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: {"candidate_index_NC": _set(index, 3, 4, 50)}, r"row 3.*\[4\] is 50, out"),
        (lambda index: {"candidate_index_NC": _set(index, 3, 4, -1)}, r"row 3.*\[4\] is -1, out"),
        (
            lambda index: {"candidate_index_NC": _set(index, 5, 2, index[5, 0])},
            r"row 5: candidate \d+ is listed more than once \(1 rows",
        ),
        (lambda index: {"candidate_index_NC": index[:, :0]}, "row 0: the list .* is empty"),
        (lambda index: {"candidate_count_N": np.arange(40)[::-1] % 11}, "row 6: the list .* empty"),
        (lambda index: {"candidate_count_N": np.full(40, 11)}, "at most the 10 columns"),
        (lambda index: {"candidate_index_NC": index[:-1]}, "39 rows, query 40"),
        (lambda index: {"candidate_index_NC": index.astype(float)}, "expected integers"),
        (lambda index: {"answer_N": _set(index[:, :1], 9, 0, 51)[:, 0]}, "row 9: the right candi"),
        (lambda index: {"query_ND": np.ones((40, 15), np.float32)}, "15 dimensions, candidates 16"),
        (lambda index: {"query_ND": np.ones((0, 16), np.float32)}, r"query has shape \(0, 16\)"),
        (lambda index: {"query_ND": np.ones(16, np.float32)}, r"query has shape \(16,\)"),
    ],
)
def test_malformed_input_is_named(change, message):
    index = normal_vectors().candidate_index_NC
    with pytest.raises(ValueError, match=f"set 'made'.*{message}|{message}"):
        normal_vectors(**change(index.copy()))


def _set(array, row, column, value):
    array = array.copy()
    array[row, column] = value
    return array


def test_means_are_over_sets_and_never_over_groups():
    eye = np.eye(4, dtype=np.float32)
    index = np.stack([np.roll(np.arange(4), -row) for row in range(4)])
    right = SetVectors("right", eye, eye, index)
    wrong = SetVectors("wrong", np.roll(eye, 1, axis=0), eye, index)
    names = ["ImageNet-1K", "VOC2007", "Country211", "GQA", "RefCOCO"]
    scores = {n: score_set(right if n in names[:3] else wrong) for n in names}
    result = summarise(scores, sets=mmeb_sets(), expected=names)
    assert result["groups"] == {"classification": 100.0, "vqa": 0.0, "grounding": 0.0}
    assert result["overall"] == pytest.approx(60.0)
    assert result["ind"] == 100.0
    assert result["ood"] == pytest.approx(100 / 3)
    assert result["missing"] == []
    assert result["sets"]["GQA"]["rows"] == 4


# ------------------------------------------------------------------------------------ the table


def test_the_36_sets_of_the_paper():
    sets = mmeb_sets()
    groups = {g: [n for n, s in sets.items() if s.group == g] for g in ("classification", "vqa")}
    assert len(sets) == 36
    assert [len(names) for names in groups.values()] == [10, 10]
    assert sum(info.group == "retrieval" for info in sets.values()) == 12
    assert sum(info.group == "grounding" for info in sets.values()) == 4
    assert sorted(n for n, info in sets.items() if not info.in_distribution) == sorted(OOD)
    assert all(info.rows == 1000 and info.confirmed for info in sets.values())
    assert sets["HatefulMemes"].chance == 50
    assert all(info.query_instruction == info.query_instruction.strip() for info in sets.values())


def test_targets_that_are_pictures_have_an_instruction_and_texts_have_none():
    for info in mmeb_sets().values():
        assert bool(info.target_instruction) == ("image" in info.target), info.name


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sets": {"a": {"group": "else"}}}, "group 'else' is unknown"),
        ({"sets": {"a": {"group": "vqa", "odd": 1}}}, "unknown keys"),
        ({"sets": {"a": {"group": "vqa", "query": ["sound"]}}}, "parts"),
        ({"sets": {"a": {"group": "vqa", "candidates": 1}}}, "expected 2 or more"),
        ({"sets": [1]}, "mapping with the key"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, table, message):
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match=message):
        read_sets(tmp_path / "sets.yaml")


# ----------------------------------------------------------------------------- files, the tool


def test_what_is_written_is_read_again(tmp_path):
    vectors = normal_vectors(candidate_count_N=np.arange(40) % 10 + 1)
    again = read_vectors(write_vectors(vectors, tmp_path), name="made")
    for field in ("query_ND", "candidates_MD", "candidate_index_NC", "candidate_count_N"):
        np.testing.assert_array_equal(getattr(again, field), getattr(vectors, field))
    assert [path.name for path in tmp_path.iterdir()] == ["made.npz"]


def save(folder: Path, name: str, **changes) -> Path:
    vectors = normal_vectors(name=name)
    arrays = {
        "query": vectors.query_ND,
        "candidates": vectors.candidates_MD,
        "candidate_index": vectors.candidate_index_NC,
    } | changes
    np.savez(folder / f"{name}.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder / f"{name}.npz"


def test_half_precision_vectors_are_scored_in_float32(tmp_path, tool):
    halves = {
        key: getattr(normal_vectors(), field).astype(np.float16)
        for key, field in (("query", "query_ND"), ("candidates", "candidates_MD"))
    }
    found = read_vectors(save(tmp_path, "GQA", **halves), name="GQA")
    assert found.query_ND.dtype == np.float32
    np.testing.assert_array_equal(found.query_ND, halves["query"].astype(np.float32))


def test_the_tool_prints_the_promised_json(tmp_path):
    save(tmp_path, "GQA")
    save(tmp_path, "my-own")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/evaluate_mmeb.py", "--embeddings", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    result = json.loads(done.stdout)
    expected = score_set(read_vectors(tmp_path / "GQA.npz", name="GQA"))
    assert result["sets"]["GQA"]["precision_at_1"] == expected.precision_at_1
    assert {"rows", "tied_rows"} <= result["sets"]["my-own"].keys()
    assert result["groups"].keys() == {"vqa", "other"}
    assert result["ood"] == expected.precision_at_1
    assert result["ind"] is None
    assert "35 of 36 sets are missing" in done.stderr
    assert "my-own: not in the table" in done.stderr


def test_the_tool_prints_a_table_and_writes_pages(tmp_path, tool, capsys):
    save(tmp_path, "GQA")
    for name in ("page.html", "page.md"):
        page = tmp_path / "out" / name
        assert tool.main(["--embeddings", str(tmp_path), "--page", str(page)]) == 0
        assert "GQA" in page.read_text()
        assert "are missing" in page.read_text()
    printed = capsys.readouterr().out
    assert "GQA" in printed
    assert "10.00" in printed  # chance


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "set 'GQA' has no query (have: candidate_index, candidates"),
        ({"query": np.full((40, 16), np.nan)}, "set 'GQA': query row 0 holds nan"),
        ({"candidates": np.full((50, 16), 1e300)}, "set 'GQA': candidates row 0 holds inf"),
        ({"candidate_index": np.zeros((40, 3), int)}, "set 'GQA' row 0: candidate 0 is listed"),
        ({"query": np.array(["x"] * 40)}, "query is <U1, expected numbers"),
        ({"query": np.array([None])}, "cannot be read"),
    ],
)
def test_the_tool_ends_with_2_and_names_set_and_row(tmp_path, tool, capsys, changes, message):
    save(tmp_path, "GQA", **changes)
    assert tool.main(["--embeddings", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_files_and_folders_that_are_none_are_named(tmp_path, tool, capsys):
    assert tool.main(["--embeddings", str(tmp_path)]) == 2
    (tmp_path / "GQA.npz").write_bytes(b"PK not an archive")
    assert tool.main(["--embeddings", str(tmp_path)]) == 2
    assert tool.main(["--embeddings", str(tmp_path / "none")]) == 2
    assert tool.main(["--embeddings", str(tmp_path), "--sets", "OVEN"]) == 2
    printed = capsys.readouterr().err
    for message in ("holds no .npz", "cannot be read", "is no folder", "no set OVEN (have: GQA)"):
        assert message in printed


def test_duplicates_count_once_where_that_is_asked_for(tmp_path, tool, capsys):
    index = normal_vectors().candidate_index_NC.copy()
    index[:, 5] = index[:, 0]  # the right one twice
    index[4, 6] = index[4, 7]
    save(tmp_path, "GQA", candidate_index=index)
    assert tool.main(["--embeddings", str(tmp_path)]) == 2
    assert tool.main(["--embeddings", str(tmp_path), "--drop-duplicates", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["sets"]["GQA"]
    assert entry["candidates"] == [8, 9]
    assert entry["tied_rows"] == 0


def test_a_folder_may_bring_its_own_table(tmp_path, tool, capsys):
    save(tmp_path, "mine")
    sets = {"mine": {"group": "vqa", "in_distribution": False, "candidates": 10}}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"sets": sets}))
    assert tool.main(["--embeddings", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["groups"]["vqa"] == result["ood"] == result["overall"]
    assert result["warnings"] == []


def test_the_scorer_imports_no_torch():
    code = "import sys, cocoa_dist.evaluation.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
