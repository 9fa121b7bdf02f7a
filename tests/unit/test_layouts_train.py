"""What every layout makes can be trained on: built to shards, read by the loader, none masked."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_sources import png
from test_loader import TOKENIZER, config, read

from cocoa_dist.data.samples import Vocabulary
from cocoa_dist.data.writing.build import BuildOptions, build_dataset
from cocoa_dist.data.writing.layouts import Layout, LayoutSource
from cocoa_dist.data.writing.open import open_table

NUM_ROWS = 12


def captions(number: int) -> dict[str, Any]:
    return {"image": f"{number}.png", "text": f"thing {number}"}


def mmeb(number: int) -> dict[str, Any]:
    return {
        "qry": "<|image_1|>\nWhat is it?",
        "qry_image_path": f"{number}.png",
        "pos_text": f"thing {number}",
        "pos_image_path": "",
        "neg_text": "something else",
    }


def mmeb_of_pictures(number: int) -> dict[str, Any]:
    positive = {"pos_text": "<|image_1|>", "pos_image_path": f"{number}.png"}
    return {"qry": f"find thing {number}", "qry_image_path": None, **positive}


def interleaved(number: int) -> dict[str, Any]:
    images = [f"{number}.png", f"{(number + 1) % NUM_ROWS}.png"]
    return {"text": f"first <image> then <image>, said {number}", "images": images}


def dialogues(number: int) -> dict[str, Any]:
    turns = [("human", "<image>\nWhat is it?"), ("gpt", f"thing {number}")]
    spoken = [{"from": who, "value": said} for who, said in turns]
    return {"image": f"{number}.png", "conversations": spoken}


def dialogues_of_words(number: int) -> dict[str, Any]:
    return {"conversations": dialogues(number)["conversations"]}


def words_alone(number: int) -> dict[str, Any]:
    return {"text": f"said {number} and no more", "images": []}


def pictures_alone(number: int) -> dict[str, Any]:
    return {"text": None, "images": interleaved(number)["images"]}


def bare_pictures(number: int) -> dict[str, Any]:
    return {"image": f"{number}.png"}


CASES = {
    "captions, caption": (captions, "captions", "caption"),
    "captions, bridged": (captions, "captions", "bridged"),
    "captions, language": (captions, "captions", "language"),
    "captions, pair": (captions, "captions", "pair"),
    "mmeb, caption": (mmeb, "mmeb", "caption"),
    "mmeb, bridged": (mmeb, "mmeb", "bridged"),
    "mmeb, pair": (mmeb, "mmeb", "pair"),
    "mmeb pictures, pair": (mmeb_of_pictures, "mmeb", "pair"),
    "interleaved, caption": (interleaved, "interleaved", "caption"),
    "interleaved, language": (interleaved, "interleaved", "language"),
    "pictures, caption": (captions, "pictures", "caption"),
    "pictures, bridged": (captions, "pictures", "bridged"),
    "dialogues, bridged": (dialogues, "dialogues", "bridged"),
    "dialogues, caption": (dialogues, "dialogues", "caption"),
    "dialogues, dialogue": (dialogues, "dialogues", "dialogue"),
    "dialogues without pictures, dialogue": (dialogues_of_words, "dialogues", "dialogue"),
    "dialogues, interleaved": (dialogues, "dialogues", "interleaved"),
    "captions, questions": (captions, "captions", "questions"),
    "captions, interleaved": (captions, "captions", "interleaved"),
    "mmeb, interleaved": (mmeb, "mmeb", "interleaved"),
    "mmeb pictures, interleaved": (mmeb_of_pictures, "mmeb", "interleaved"),
    "interleaved, interleaved": (interleaved, "interleaved", "interleaved"),
    "pictures, interleaved": (bare_pictures, "pictures", "interleaved"),
    "pictures alone, interleaved": (pictures_alone, "interleaved", "interleaved"),
    "words alone, interleaved": (words_alone, "interleaved", "interleaved"),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_layout_become_samples_of_a_view(case: str, tmp_path: Path) -> None:
    row, layout, view = CASES[case]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(NUM_ROWS):
        (pictures / f"{number}.png").write_bytes(png(number, height=32, width=40))
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(NUM_ROWS))
    (tmp_path / "rows.jsonl").write_text(lines)
    source = LayoutSource.of(open_table([tmp_path / "rows.jsonl"]), Layout(layout, images=pictures))
    built = build_dataset(
        source, tmp_path / "set", info={}, options=BuildOptions(tokenizer=TOKENIZER)
    )
    assert (built.info.count, built.rejected) == (NUM_ROWS, 0)
    run = config({"a": tmp_path / "set"}, view=view, data={"tokens_per_pack": 400})
    words = Vocabulary.load(TOKENIZER, run.model)
    for (batch,) in read(run, words, tmp_path / "blend", steps=2):
        assert batch.bad_records == ()
        assert batch.num_samples == NUM_ROWS * (2 if view == "pair" else 1)
