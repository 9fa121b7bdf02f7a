"""From rows and pictures to scores: what is read, what is embedded once, and what is refused."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_rows import WORDS, noise, rows_of_pictures, rows_of_texts, write_rows
from tiny_exports import MAX_TEXT_TOKENS, collapse, tiny_export

from cocoa_dist.evaluation import embed as embed_module
from cocoa_dist.evaluation import read_vectors
from cocoa_dist.evaluation.embed import EmbedSettings, batches
from cocoa_dist.evaluation.encoder import Encoder, Job
from cocoa_dist.evaluation.rows import RowRules, find_sets, plain_text, read_set
from cocoa_dist.evaluation.run import Evaluation, evaluate
from cocoa_dist.evaluation.scores import score_set
from cocoa_dist.evaluation.sets import SetInfo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_mmeb", ROOT / "tools/evaluate_mmeb.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("export") / "collapsed", change=collapse)


@pytest.fixture
def data(tmp_path) -> Path:
    """One set as published, in Parquet below a folder, one as JSON lines."""
    folder = tmp_path / "data"
    (folder / "images" / "noise").mkdir(parents=True)
    for seed in range(10):
        noise(seed).save(folder / "images" / "noise" / f"{seed}.png")
    (folder / "VOC2007").mkdir()
    table = pa.Table.from_pylist(rows_of_texts())
    pq.write_table(table, folder / "VOC2007" / "test-00000-of-00001.parquet")
    write_rows(folder / "OVEN.jsonl", rows_of_pictures())
    return folder


def run(data: Path, model: Path, *, progress=lambda done, total: None, embed=None, **changes):
    settings = EmbedSettings(model=model, batch_size=4, **(embed or {}))
    return evaluate(Evaluation(data=data, embed=settings, **changes), progress=progress)


# --------------------------------------------------------------------------------------- rows


def test_published_files_are_found_and_read(data):
    found = find_sets(data)
    assert found.keys() == {"OVEN", "VOC2007"}
    one = read_set("VOC2007", found["VOC2007"], info=None, rules=RowRules())
    assert len(one.items) == 20
    assert one.items[one.query_N[3]].text == "Identify the object shown in the image"
    assert one.items[one.query_N[3]].image == "noise/3.png"
    assert [one.items[i].text for i in one.candidates_N[3][:2]] == ["tree", "house"]


def test_candidates_are_known_by_text_and_picture(data):
    one = read_set("OVEN", find_sets(data)["OVEN"], info=None, rules=RowRules())
    assert len({item.image for item in one.items if item.image}) == 5
    assert len({i for row in one.candidates_N for i in row}) == 10


def test_files_of_the_successor_put_instruction_and_text_together(tmp_path):
    row = {"qry_inst": "<|image_1|> Which?", "qry_text": "a cat", "tgt_inst": "<|image_1|> Show."}
    row |= {"qry_img_path": "a.png", "tgt_text": ["", "b"], "tgt_img_path": ["x.png", "y.png"]}
    write_rows(tmp_path / "S.jsonl", [row])
    one = read_set("S", [tmp_path / "S.jsonl"], info=None, rules=RowRules())
    assert [item.text for item in one.items] == ["Which? a cat", "Show.", "Show. b"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<|image_1|>\nFind it: a cat\n", "Find it: a cat"),
        ("look <|image_1|> here", "look here"),
        ("<|vision_start|><|image_pad|><|vision_end|> what?", "what?"),
        ("Q:a\nA:b\n", "Q:a\nA:b"),
        ("<|image_1|>\n", ""),
    ],
)
def test_texts_are_read_as_in_training(text, plain):
    assert plain_text(text) == plain


def changed(**cells) -> list[dict]:
    rows = rows_of_texts(3)
    rows[1] = {**rows[1], **cells}
    return [{k: v for k, v in row.items() if v is not ...} for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(tgt_text=...), "row 1: .* has no column tgt_text"),
        (changed(tgt_text=[], tgt_img_path=[]), "row 1: the list of candidates is empty"),
        (changed(tgt_text=["cat", "dog"]), "row 1: 2 tgt_text and 3 tgt_img_path"),
        (changed(tgt_text=["cat", "", "dog"]), "row 1 candidate 1 is empty: it has neither"),
        (changed(tgt_text=["a", "b", "a"]), "row 1: candidate 2 is there already, as candidate 0"),
        (changed(tgt_text="cat"), "row 1: tgt_text is str, expected a list"),
        (changed(tgt_text=[1, 2, 3]), r"row 1: tgt_text\[0\] is int, expected a text"),
        (changed(qry_text="<|image_1|>", qry_img_path=""), "row 1 is empty"),
        ([], "hold no rows"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path, rows, message):
    write_rows(tmp_path / "S.jsonl", rows)
    with pytest.raises(ValueError, match=f"set 'S'.*{message}|{message}"):
        read_set("S", [tmp_path / "S.jsonl"], info=None, rules=RowRules())


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no set"):
        find_sets(tmp_path)
    (tmp_path / "S.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"set 'S': .* cannot be read as Parquet"):
        read_set("S", find_sets(tmp_path)["S"], info=None, rules=RowRules())
    (tmp_path / "T.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"set 'T' row 0: .* is no JSON"):
        read_set("T", find_sets(tmp_path)["T"], info=None, rules=RowRules())


def test_instructions_are_left_out_only_where_they_are(tmp_path):
    write_rows(tmp_path / "S.jsonl", rows_of_texts(3))
    info = SetInfo("S", "vqa", None, query_instruction="Identify the object shown in the image.")
    rules = RowRules(instructions=False)
    one = read_set("S", [tmp_path / "S.jsonl"], info=info, rules=rules)
    assert one.items[one.query_N[0]].text == ""
    write_rows(tmp_path / "S.jsonl", changed(qry_text="<|image_1|>\nName it\n"))
    with pytest.raises(ValueError, match="row 1: the text begins with 'Name it'"):
        read_set("S", [tmp_path / "S.jsonl"], info=info, rules=rules)


# --------------------------------------------------------------------------- batches and cache


def test_batches_do_not_depend_on_the_order_of_jobs():
    jobs = [
        Job(bytes([i]), "x" * (i % 7) or "y", Path("p") if i % 3 == 0 else None, "")
        for i in range(50)
    ]
    sizes = [(i % 5 + 1) * 100 if job.image else 0 for i, job in enumerate(jobs)]
    plan = batches(jobs, sizes, batch_size=8)
    order = np.random.default_rng(0).permutation(50)
    again = batches([jobs[i] for i in order], [sizes[i] for i in order], batch_size=8)
    assert plan == again
    assert sorted(job.key for batch in plan for job in batch) == sorted(job.key for job in jobs)
    assert all(len({job.image for job in batch}) == 1 for batch in plan)


def test_scores_are_those_of_plain_encode_and_a_plain_loop(data, model, tmp_path):
    from sentence_transformers import SentenceTransformer

    result = run(data, model, save_vectors=tmp_path / "vectors")
    encoder = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    for name, rows in (("VOC2007", rows_of_texts()), ("OVEN", rows_of_pictures())):
        hits = 0
        for row in rows:
            query = one_vector(encoder, row["qry_text"], row["qry_img_path"], data)
            pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
            scores = [one_vector(encoder, *pair, data) @ query for pair in pairs]
            hits += int(np.argmax(scores)) == 0
        assert result["sets"][name]["precision_at_1"] == pytest.approx(100 * hits / len(rows))
        vectors = read_vectors(tmp_path / "vectors" / f"{name}.npz", name=name)
        found = vectors.query_ND[-1]
        np.testing.assert_allclose(found, query, atol=1e-5)  # padded beside others, or alone
        assert vectors.candidate_index_NC.shape == (10, 10)
        assert len(vectors.candidates_MD) == 10
    assert result["embedded"]["items"] == 40


def test_embeddings_of_several_vectors_are_scored_by_late_interaction(data, tmp_path):
    from sentence_transformers import MultiVectorEncoder

    model = tiny_export(tmp_path / "late", vectors=3)
    kept = tmp_path / "vectors"
    result = run(data, model, save_vectors=kept, cache=tmp_path / "cache")
    encoder = MultiVectorEncoder(str(model), device="cpu", local_files_only=True)
    for name, rows in (("VOC2007", rows_of_texts()), ("OVEN", rows_of_pictures())):
        hits = 0
        for row in rows:
            query = one_vector(encoder, row["qry_text"], row["qry_img_path"], data)
            pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
            listed = [one_vector(encoder, *pair, data) for pair in pairs]
            hits += int(encoder.similarity([query], listed).argmax()) == 0
        assert result["sets"][name]["precision_at_1"] == pytest.approx(100 * hits / len(rows))
        vectors = read_vectors(kept / f"{name}.npz", name=name)
        assert vectors.vectors_each == len(query) == 3
        np.testing.assert_allclose(vectors.query_ND[-1], query.reshape(-1), atol=1e-5)
        assert score_set(vectors).precision_at_1 == result["sets"][name]["precision_at_1"]
    again = run(data, model, cache=tmp_path / "cache")  # nothing is embedded, and K is known
    assert again["sets"] == result["sets"]
    (model / "selftest.json").unlink()
    with pytest.raises(ValueError, match=r"one vector or several is told by selftest\.json"):
        run(data, model)


def one_vector(encoder, text: str, image: str, data: Path) -> np.ndarray:
    parts = {}
    if image:
        parts["image"] = Image.open(data / "images" / image)
    if text.replace("<|image_1|>", "").strip():
        parts["text"] = text.replace("<|image_1|>", "").strip()
    return np.asarray(encoder.encode([parts])[0])  # (D,), or several (K, D)


class StoppedError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_and_scores_the_same(data, model, tmp_path):
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        if done >= 12:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(data, model, cache=tmp_path / "cache", progress=stop)
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    result = run(data, model, cache=tmp_path / "cache", progress=progress)
    assert told[-1] == (28, 28)
    assert result == run(data, model)
    told.clear()
    assert run(data, model, cache=tmp_path / "cache", progress=progress) == result
    assert told == []


def test_another_set_embeds_only_what_is_new(data, model, tmp_path):
    told: list[tuple[int, int]] = []
    run(data, model, cache=tmp_path / "cache", only=("VOC2007",))
    write_rows(data / "GQA.jsonl", rows_of_texts(5))  # the same texts and pictures
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    run(data, model, cache=tmp_path / "cache", only=("GQA",), progress=progress)
    assert told == []


def test_a_collapsed_model_scores_chance(data, collapsed):
    result = run(data, collapsed)
    for entry in result["sets"].values():
        assert entry["precision_at_1"] == pytest.approx(10.0, abs=1e-12)
        assert entry["tied_rows"] == 10
        assert entry["argmax_precision_at_1"] == 100.0
    assert result["overall"] == pytest.approx(result["chance"]["overall"])
    assert result["warnings"][0].startswith("collapsed, one vector for everything: VOC2007, OVEN")


def test_a_query_that_is_its_answer_scores_100(data, model):
    for row in (rows := rows_of_texts()):
        row["qry_text"], row["qry_img_path"] = row["tgt_text"][0], ""
    write_rows(data / "TextVQA.jsonl", rows)
    result = run(data, model, only=("TextVQA",))
    assert result["sets"]["TextVQA"]["precision_at_1"] == 100.0
    assert result["sets"]["TextVQA"]["tied_rows"] == 0


def test_missing_pictures_are_named_before_anything_is_embedded(data, model, tmp_path):
    for number in (3, 4):
        (data / "images" / "noise" / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=r"2 pictures are missing .*row 3: noise/3.png"):
        run(data, model, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_picture_outside_the_folder_is_refused(data, model):
    write_rows(data / "OVEN.jsonl", [{**rows_of_texts()[0], "qry_img_path": "../../secret.png"}])
    with pytest.raises(
        ValueError, match=r"set 'OVEN' row 0: picture '../../secret.png' is outside"
    ):
        run(data, model)


def test_a_picture_that_cannot_be_decoded_is_named(data, model):
    (data / "images" / "noise" / "7.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"row 7: .*7\.png cannot be read"):
        run(data, model, only=("VOC2007",))


def test_two_files_of_one_content_are_one_candidate(data, model):
    (data / "images" / "noise" / "4.png").write_bytes(
        (data / "images" / "noise" / "1.png").read_bytes()
    )
    with pytest.raises(ValueError, match=r"set 'OVEN' row 0: candidates .*the same picture"):
        run(data, model)
    result = run(data, model, rules=RowRules(drop_duplicates=True))
    assert result["sets"]["OVEN"]["candidates"] == [8, 8]


def test_cut_texts_are_counted(data, model):
    rows = rows_of_texts()
    rows[2]["tgt_text"][4] = " ".join(WORDS * 20)
    write_rows(data / "GQA.jsonl", rows)
    result = run(data, model, only=("GQA",))
    assert result["embedded"]["truncated"] == 1
    assert any("1 of 21 texts are longer" in warning for warning in result["warnings"])


@pytest.fixture
def copied(model, tmp_path) -> Path:
    copy = tmp_path / "copied"
    for path in sorted(model.rglob("*")):
        target = copy / path.relative_to(model)
        if path.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy


def test_a_text_whose_pooled_token_would_be_cut_is_refused(data, copied):
    """EOS in the template and not from the tokenizer: truncation takes it away."""
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    settings["model_max_length"] = MAX_TEXT_TOKENS
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").write_text(template.rstrip() + settings["eos_token"])
    config = json.loads((copied / "sentence_bert_config.json").read_text())
    config["processing_kwargs"] = {
        "chat_template": {"restore_suffix": False}
    }  # else it is put back
    (copied / "sentence_bert_config.json").write_text(json.dumps(config))
    encoder = Encoder(copied, device="cpu")
    encoder.encode([Job(b"", "a short text", None, "set 'S' row 0")])
    long = Job(b"", " ".join(WORDS * 20), None, "set 'S' row 1 candidate 2")
    with pytest.raises(ValueError, match=r"set 'S' row 1 candidate 2: .* it was cut"):
        encoder.encode([long])


def test_batches_are_prepared_ahead_and_a_bad_one_costs_those_before_it_nothing(copied, tmp_path):
    encoder, prepared, ahead = Encoder(copied, device="cpu"), [], threading.Event()
    prepare = encoder.prepare

    def counted(jobs):
        prepared.append(jobs)
        if len(prepared) == 3:
            ahead.set()
        return prepare(jobs)

    encoder.prepare = counted
    texts = [[Job(b"", f"{word} {number}", None, "here")] for number, word in enumerate(WORDS[:4])]
    picture = tmp_path / "torn.png"
    picture.write_bytes(b"no picture")
    bad = [Job(b"", "", picture, "set 'S' row 4")]
    coming = encoder.encode_all([*texts, bad, *texts])
    made = [next(coming).vectors_ND]
    assert ahead.wait(60)  # nobody has asked for the second and the third yet
    made += [next(coming).vectors_ND for _ in texts[1:]]
    with pytest.raises(ValueError, match=r"^set 'S' row 4: .*torn\.png cannot be read"):
        next(coming)
    assert all(np.array_equal(*pair) for pair in zip(made, alone(copied, texts), strict=True))
    assert len(prepared) < 9  # what came after it was left


def alone(folder: Path, batches: list[list[Job]]) -> list[np.ndarray]:
    encoder = Encoder(folder, device="cpu")
    return [encoder.encode(jobs).vectors_ND for jobs in batches]


def test_all_tokens_that_a_model_pools_must_be_there(tmp_path):
    bridge = ("<|mask|>", "<|im_end|>")
    folder = tiny_export(tmp_path / "compressed", bridge=bridge)
    encoder = Encoder(folder, device="cpu")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocabulary}
    assert encoder._tail == tuple(ids[token] for token in bridge)
    jobs = [Job(b"", text, None, "set 'S' row 0") for text in ("cat", " ".join(WORDS * 20))]
    assert encoder.encode(jobs).truncated == (False, True)
    features = encoder.model.preprocess([{"text": "cat"}])
    features["input_ids"][0, -2] = 9
    with pytest.raises(ValueError, match=r"ends on tokens \[9, \d+\], not on"):
        encoder._check_tokens(features, [{"text": "cat"}], jobs[:1])


def test_a_model_that_fails_its_self_test_is_refused(data, copied):
    entries = json.loads((copied / "selftest.json").read_text())
    entries[0]["vector"] = entries[0]["vector"][::-1]
    (copied / "selftest.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="is not the one that was exported"):
        run(data, copied)


def test_a_model_that_gives_nan_is_refused_by_row(data, copied):
    weights = load_file(copied / "model.safetensors")
    weights = {name: np.full_like(value, np.nan) for name, value in weights.items()}
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    (copied / "selftest.json").unlink()
    with pytest.raises(ValueError, match=r"set '\w+' row \d.*not finite"):
        run(data, copied)


def test_a_process_that_dies_is_told_and_the_rest_is_kept():
    processes = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-9)]
    reports = embed_module.multiprocessing.get_context("spawn").Queue()
    with pytest.raises(RuntimeError, match="process 1 died with exit code -9"):
        embed_module._follow(processes, reports, lambda count: None)


def test_a_set_of_many_rows_in_one_order_is_questioned(data, model):
    rows = [{**row, "tgt_text": WORDS} for row in rows_of_texts()] * 2
    write_rows(data / "GQA.jsonl", rows)
    result = run(data, model, only=("GQA",))
    assert any("in the same order" in warning for warning in result["warnings"])


def test_the_tool_evaluates_a_folder(data, model, tmp_path, tool, capsys):
    arguments = ["--data", data, "--model", model, "--cache", tmp_path / "c", "--limit", 5]
    arguments += ["--save-embeddings", tmp_path / "vectors", "--json"]
    assert tool.main([str(one) for one in arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sets"]["OVEN"]["rows"] == 5
    assert any("first 5 rows" in warning for warning in result["warnings"])
    assert tool.main(["--embeddings", str(tmp_path / "vectors"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["sets"] == result["sets"]


def test_the_tool_wants_one_thing_or_the_other(data, model, tool, capsys):
    for arguments in ([], ["--data", "x"], ["--embeddings", "x", "--model", "y"]):
        with pytest.raises(SystemExit) as left:
            tool.main(arguments)
        assert left.value.code == 2
    assert tool.main(["--data", str(data), "--model", str(data / "none"), "--cache", "none"]) == 2
    assert "expected an exported model" in capsys.readouterr().err


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_result(data, model, tmp_path):
    """Compared to the last digit; 40 items in batches of 4 are no multiple of 3."""
    results = []
    for nproc in (1, 2, 3):
        vectors = tmp_path / f"vectors{nproc}"
        results.append(run(data, model, embed={"nproc": nproc}, save_vectors=vectors))
    assert results[0] == results[1] == results[2]
    for name in ("VOC2007", "OVEN"):
        files = {(tmp_path / f"vectors{n}" / f"{name}.npz").read_bytes() for n in (1, 2, 3)}
        assert len(files) == 1


@pytest.mark.slow
def test_killed_while_it_embeds_it_goes_on_and_writes_the_same_bytes(model, tmp_path):
    rows = []
    for row in range(60):
        texts = [f"{WORDS[i % 10]} {row} {i} " + " ".join(WORDS) for i in range(25)]
        rows.append({"qry_text": f"which {row}", "qry_img_path": "", "tgt_text": texts})
        rows[-1]["tgt_img_path"] = [""] * 25
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "GQA.jsonl", rows)
    command = [sys.executable, ROOT / "tools/evaluate_mmeb.py", "--data", tmp_path / "data"]
    command += ["--model", model, "--batch-size", "2", "--json", "--sets", "GQA"]
    cached = [*command, "--nproc", "2", "--cache", tmp_path / "cache"]
    process = subprocess.Popen(cached, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        files = [*(tmp_path / "cache").rglob("*.vectors")] if (tmp_path / "cache").exists() else []
        if sum(file.stat().st_size for file in files) > 20_000:
            process.kill()
            break
        time.sleep(0.05)
    assert process.wait(timeout=30) == -9
    for name, whole in (("one", cached), ("two", [*command, "--cache", "none"])):
        done = subprocess.run(
            [*whole, "--save-embeddings", tmp_path / name],
            capture_output=True,
            timeout=240,
            check=True,
        )
        (tmp_path / f"{name}.json").write_bytes(done.stdout)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    saved = [(tmp_path / name / "GQA.npz").read_bytes() for name in ("one", "two")]
    assert saved[0] == saved[1]


@pytest.mark.slow
def test_a_bad_picture_in_another_process_is_named(data, model):
    (data / "images" / "noise" / "7.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"7\.png cannot be read"):
        run(data, model, embed={"nproc": 2}, only=("VOC2007",))
