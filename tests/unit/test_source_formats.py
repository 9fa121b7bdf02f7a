"""Reading other people's files: every format gives its rows, any range of them, and says what is
wrong with a row or a file."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sources import png

from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.writing.layouts import Layout, LayoutSource
from cocoa_dist.data.writing.open import open_table
from cocoa_dist.data.writing.source import Rejected, SourceRow, Table

COUNT = 600  # more than two of the places that a scan remembers


def row(number: int) -> dict[str, Any]:
    return {"id": f"r{number}", "text": f'line one of {number}\nline "two", ü', "number": number}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(one) + "\n" + "\n" * (i % 3 == 0) for i, one in enumerate(rows)]
    path.write_text("".join(lines))
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_csv(path, rows, "\t")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    return path


def write_arrow_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


def write_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


WRITERS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], Path]]] = {
    "jsonl": ("a.jsonl", write_jsonl),
    "json": ("a.json", write_json),
    "csv": ("a.csv", write_csv),
    "tsv": ("a.tsv", write_tsv),
    "parquet": ("a.parquet", write_parquet),
    "arrow file": ("a.arrow", write_arrow_file),
    "arrow stream": ("a.arrow", write_arrow_stream),
}


def numbers(table: Table, start: int, stop: int) -> list[int]:
    found = list(table.rows(start, stop))
    assert all(isinstance(one, SourceRow) for one in found)
    return [int(one.values["number"]) for one in found if isinstance(one, SourceRow)]


@pytest.mark.parametrize("kind", WRITERS)
def test_any_range_of_rows_comes_back(kind: str, tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    table = open_table([write(tmp_path / name, [row(n) for n in range(COUNT)])])
    assert len(table) == COUNT
    for start, stop in ((0, COUNT), (0, 1), (69, 71), (255, 257), (599, 600), (130, 520), (9, 9)):
        assert numbers(table, start, stop) == list(range(start, stop))
    (first,) = table.rows(300, 301)
    assert isinstance(first, SourceRow)
    assert first.values["text"] == row(300)["text"]
    assert first.where == table.where(300) == f"{tmp_path / name} row 300"


def test_files_are_joined_in_order_and_a_row_is_named_by_its_file(tmp_path: Path) -> None:
    files = []
    for place, (name, count) in enumerate((("b.jsonl", 3), ("a.csv", 2), ("c.parquet", 4))):
        rows = [{**row(n), "number": 10 * place + n} for n in range(count)]
        files.append(WRITERS[name.split(".")[1]][1](tmp_path / name, rows))
    table = open_table(files)
    assert numbers(table, 0, 9) == [0, 1, 2, 10, 11, 20, 21, 22, 23]
    assert numbers(table, 2, 6) == [2, 10, 11, 20]
    assert table.where(4) == f"{tmp_path / 'a.csv'} row 1"
    keys = [one.key for one in table.rows(0, 9) if isinstance(one, SourceRow)]
    assert keys[3:6] == ["a.csv:0", "a.csv:1", "c.parquet:0"]


def test_a_tar_gives_samples_with_texts_decoded_and_json_as_columns(tmp_path: Path) -> None:
    samples = [
        (
            f"part/{n:04d}",
            {"png": png(n), "txt": f"picture {n}".encode(), "json": b'{"author": "me"}'},
        )
        for n in range(200)
    ]
    table = open_table([write_tar(tmp_path / "s.tar", samples)])
    assert len(table) == 200
    for start, stop in ((0, 200), (63, 66), (199, 200)):
        found = [one for one in table.rows(start, stop) if isinstance(one, SourceRow)]
        assert [one.key for one in found] == [f"part/{n:04d}" for n in range(start, stop)]
        assert found[0].values == {
            "__key__": f"part/{start:04d}",
            "png": png(start),
            "txt": f"picture {start}",
            "author": "me",
        }


def test_a_folder_gives_pictures_with_the_texts_beside_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.PNG").write_bytes(png(1))
    (tmp_path / "a.png").write_bytes(png(2))
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "b.json").write_text('{"text": "second", "licence": "CC0-1.0"}')
    (tmp_path / "sound.ogg").write_bytes(b"")
    source = LayoutSource.of(open_table([tmp_path]), Layout("captions"))
    one, two = source.rows(0, 2)
    assert isinstance(one, Record)
    assert isinstance(two, Record)
    assert (one.key, one.query, one.images) == ("a.png", (text_part("first"),), (png(2),))
    assert (two.key, two.meta) == ("deep/b.PNG", {"licence": "CC0-1.0"})


def test_a_folder_with_a_metadata_table_is_read_through_it(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "not_named.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,text\nx.png,a thing\n")
    (record,) = LayoutSource.of(open_table([tmp_path]), Layout("captions")).rows(0, 1)
    assert isinstance(record, Record)
    assert record.query == (text_part("a thing"),)


def read(layout: Layout, values: dict[str, Any], folder: Path = Path("/nowhere")) -> Record:
    return layout.record(SourceRow("file row 0", "file:0", "set", folder, values))


def test_captions_are_text_to_picture_pairs_with_the_text_as_target() -> None:
    values = {
        "image": {"bytes": png(), "path": "a.png"},  # Hugging Face's Image
        "caption": ["one", "two"],
        "license": "CC0-1.0",
        "source": "a shelf",
        "width": 3,
    }
    record = read(Layout("captions", task="t"), values)
    assert record.query == record.target == (text_part("one"),)
    assert record.positives == ((image_part(0),),)
    assert record.images == (png(),)
    assert record.task == "t"
    assert record.meta == {
        "captions": ["one", "two"],
        "license": "CC0-1.0",
        "source": "a shelf",
    }


def test_mmeb_rows_have_query_positive_and_negatives_and_each_picture_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    values = {
        "qry": "<|image_1|>\nFind a caption for it.",
        "qry_image_path": "a.png",
        "pos_text": "a thing",
        "pos_image_path": "",
        "neg_text": ["another", ""],
        "neg_image_path": ["a.png", "b.png"],
    }
    record = read(Layout("mmeb", images=tmp_path), values)
    assert record.query == (image_part(0), text_part("Find a caption for it."))
    assert record.positives == ((text_part("a thing"),),)
    assert record.negatives == ((image_part(0), text_part("another")), (image_part(1),))
    assert record.target == (text_part("a thing"),)
    assert record.images == (png(1), png(2))
    assert record.task == "set"  # the folder of the file


def test_interleaved_documents_keep_the_order_of_texts_and_pictures() -> None:
    wrapped = "<|vision_start|><|image_pad|><|vision_end|>"
    inline = {"text": f"before {wrapped} between <image> after", "images": [png(1), png(2)]}
    expected = (
        text_part("before"),
        image_part(0),
        text_part("between"),
        image_part(1),
        text_part("after"),
    )
    assert read(Layout("interleaved"), inline).query == expected
    lists = {
        "texts": ["before", None, "between", None, "after"],
        "images": [None, png(1), None, png(2), None],
    }
    assert read(Layout("interleaved"), lists).query == expected
    for wordless in ("", None, "<image><image>"):
        alone = read(Layout("interleaved"), {"text": wordless, "images": [png(1), png(2)]})
        assert alone.query == (image_part(0), image_part(1))
    numbered = {"text": "<|image_2|> then <|image_1|>", "images": [png(1), png(2)]}
    assert read(Layout("interleaved"), numbered).query == (
        image_part(1),
        text_part("then"),
        image_part(0),
    )


@pytest.mark.parametrize("style", ["llava", "openai"])
def test_dialogues_are_pictures_and_turns(style: str) -> None:
    spoken = [("system", "Be kind."), ("user", "<image>\nWhat?"), ("assistant", "A cat.")]
    if style == "llava":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns: list[Any] = [{"from": names[who], "value": said} for who, said in spoken]
    else:
        turns = [
            {"role": who, "content": [{"type": "text", "text": said}, {"type": "image"}]}
            for who, said in spoken
        ]
    record = read(Layout("dialogues"), {"conversations": turns, "image": png()})
    assert record.query == (image_part(0),)
    assert record.target == (text_part("What?"), text_part("A cat."))
    assert record.meta == {"roles": ["user", "assistant"], "system": "Be kind."}


def test_a_dialogue_without_picture_asks_with_its_first_turn() -> None:
    turns = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    record = read(Layout("dialogues"), {"messages": turns})
    assert record.query == (text_part("Hello?"),)
    assert record.target == (text_part("Yes."), text_part("Why?"), text_part("So."))
    assert record.meta["roles"] == ["assistant", "user", "assistant"]


def test_columns_may_be_named_and_more_of_them_kept() -> None:
    layout = Layout("captions", columns={"text": "words", "image": "file"}, carried=("mood",))
    record = read(layout, {"words": "so", "text": "not this", "file": png(), "mood": "good"})
    assert record.query == (text_part("so"),)
    assert record.meta == {"mood": "good"}


PICTURE = {"image": png()}
TURNS = {"image": png()}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no text column": ("captions", PICTURE, "column of 'text' is missing: found image"),
    "empty text": ("captions", {**PICTURE, "text": " \n"}, "text is empty"),
    "text is None": ("captions", {**PICTURE, "text": None}, "text is empty"),
    "text is NaN": ("captions", {**PICTURE, "text": float("nan")}, "text is empty"),
    "text is a number": ("captions", {**PICTURE, "text": 7}, "text is no text: found int"),
    "no picture": ("captions", {"image": None, "text": "a"}, "image is empty"),
    "picture is a number": ("captions", {"image": 3, "text": "a"}, "neither bytes nor a path"),
    "picture missing": ("captions", {"image": "no.png", "text": "a"}, "picture is missing: "),
    "path upwards": ("captions", {"image": "../a.png", "text": "a"}, "leads out of its folder"),
    "absolute path": ("captions", {"image": "/etc/passwd", "text": "a"}, "leads out of its folder"),
    "not a picture": (
        "captions",
        {"image": b"<html>", "text": "a"},
        "picture cannot be used: image of 6 bytes",
    ),
    "absurd aspect": (
        "captions",
        {"image": png(height=1, width=20000), "text": "a"},
        "picture cannot be used: image has an absurd aspect",
    ),
    "bomb": (
        "captions",
        {"image": png(height=11000, width=10000), "text": "a"},
        "picture cannot be used: image is too large",
    ),
    "empty positive": ("mmeb", {"qry": "a", "pos_text": "", "pos_image_path": ""}, "positive is"),
    "unknown picture": ("mmeb", {"qry": "<|image_1|>", "pos_text": "a"}, "named but not there"),
    "picture not named": (
        "interleaved",
        {"text": "<image> a", "images": [png(1), png(2)]},
        "there but not named: 1 of 2",
    ),
    "nothing": ("interleaved", {"texts": [None], "images": [None]}, "neither words nor pictures"),
    "no text, no pictures": ("interleaved", {"text": "", "images": []}, "text is empty"),
    "picture unreadable": (
        "captions",
        {"image": "x" * 300, "text": "a"},  # no file system takes that name
        "picture cannot be read: .*File name too long",
    ),
    "long key": (
        "captions",
        {**PICTURE, "text": "a", "id": "k" * 2000},
        "record is refused: record .* key has 2000 bytes",
    ),
    "meta with NaN": (
        "captions",
        {**PICTURE, "text": "a", "keywords": [float("nan")]},
        "record is refused: .* meta is not JSON",
    ),
    "half a turn": (
        "dialogues",
        {**TURNS, "turns": [{"from": "human", "value": "Hello?"}]},
        "end without an answer",
    ),
    "same speaker": (
        "dialogues",
        {**TURNS, "turns": [{"from": "human", "value": "a"}, {"from": "user", "value": "b"}]},
        "do not alternate: turn 1 is of user",
    ),
    "stranger": (
        "dialogues",
        {**TURNS, "turns": [{"from": "narrator", "value": "a"}]},
        "turn is of nobody: 'narrator'",
    ),
    "turns are a text": ("dialogues", {**TURNS, "turns": "a"}, "no list of objects: found str"),
}


@pytest.mark.parametrize(("layout", "values", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_is_no_record_says_why(
    layout: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read(Layout(layout), values, tmp_path)


def test_a_bad_row_is_rejected_with_its_place_and_the_next_one_is_read(tmp_path: Path) -> None:
    good = json.dumps({"qry": "a", "pos_text": "b"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{{broken\n[1]\n{good}\n")
    source = LayoutSource.of(open_table([tmp_path / "a.jsonl"]), Layout("mmeb"))
    one, two, three, four = source.rows(0, 4)
    assert isinstance(one, Record)
    assert isinstance(four, Record)
    assert isinstance(two, Rejected)
    assert isinstance(three, Rejected)
    assert two.where == f"{tmp_path / 'a.jsonl'} row 1"
    assert two.reason.startswith("line is no JSON: ")
    assert three.reason == "row is no object: found list"


def test_a_csv_row_with_other_fields_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("qry,pos_text\na,b\na,b,c\n\na,b\n")
    one, two, three = open_table([tmp_path / "a.csv"]).rows(0, 3)
    assert isinstance(two, Rejected)
    assert two.reason == "number of fields: found 3, expected 2"
    assert isinstance(one, SourceRow)
    assert isinstance(three, SourceRow)


def truncated(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-50])
    return file


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    rows = [row(n) for n in range(5)]
    (folder / "a.jsonl.gz").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "latin.csv").write_bytes("a,b\nü,2\n".encode("latin-1"))
    (folder / "empty.csv").write_bytes(b"")
    (folder / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (folder / "object.json").write_text('{"a": 1}')
    (folder / "mixed").mkdir()
    write_parquet(folder / "mixed" / "a.parquet", rows)
    write_arrow_file(folder / "mixed" / "a.arrow", rows)
    tar = write_tar(folder / "a.tar", [("a", {"bin": bytes(20000)})])
    tar.write_bytes(tar.read_bytes()[:9000])
    with tarfile.open(folder / "packed.tar", "w:gz") as archive:
        archive.add(folder / "object.json", "a.json")
    return {
        "unknown": (folder / "a.jsonl.gz", "format '.gz' is unknown, .* decompress it first"),
        "missing": (folder / "nothing", "is not there"),
        "empty folder": (folder / "empty", "holds neither tables .* nor pictures"),
        "mixed folder": (folder / "mixed", "holds .arrow and .parquet files"),
        "latin": (folder / "latin.csv", "the line at byte 4 is not UTF-8"),
        "empty csv": (folder / "empty.csv", "is empty, expected a first line"),
        "json lines": (folder / "lines.json", "one object a line belongs into a .jsonl"),
        "json object": (folder / "object.json", "holds dict, expected an array"),
        "parquet": (truncated(write_parquet(folder / "b.parquet", rows)), "not a whole Parquet"),
        "arrow": (truncated(write_arrow_file(folder / "b.arrow", rows)), "not a whole Arrow"),
        "tar": (tar, "not a whole tar file"),
        "compressed tar": (folder / "packed.tar", "not a whole tar file .* decompress it"),
    }


DAMAGED = (
    *("unknown", "missing", "empty folder", "mixed folder", "latin", "empty csv", "json lines"),
    *("json object", "parquet", "arrow", "tar", "compressed tar"),
)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    path, message = damaged_files(tmp_path)[kind]
    with pytest.raises(ValueError, match=message) as caught:
        open_table([path])
    assert str(path) in str(caught.value)


def test_a_missing_column_is_named_before_anything_is_written(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"a\.jsonl row 0: column of 'query' is missing: found an"):
        LayoutSource.of(open_table([file]), Layout("mmeb"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "films"}, "layout 'films' is unknown"),
        ({"name": "mmeb", "columns": {"picture": "a"}}, "has no role 'picture'"),
    ],
)
def test_an_impossible_layout_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)
