"""Records that an operator has listed as left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_loaders import NUM_RECORDS, TOKENIZER, config, read, record, write

from cocoa_dist.config import differences
from cocoa_dist.data.record_source import read_left_out
from cocoa_dist.data.samples import Vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TOKENIZER, config({"a": "x"}).model)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "a", [record(n) for n in range(NUM_RECORDS)])


def test_records_that_are_left_out_keep_their_place(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    run = config({"a": dataset}, view="pair", data={"tokens_per_pack": 400})
    ((whole,),) = read(run, vocabulary, tmp_path, steps=1)
    gone = whole.record_ids[2]
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"dataset": "a", "number": gone, "reason": "any"}) + "\n")
    data = {"tokens_per_pack": 400, "left_out": str(listed), "on_change": "continue"}
    changed = config({"a": dataset}, view="pair", data=data)
    ((without,),) = read(changed, vocabulary, tmp_path, steps=1)
    assert without.record_ids == whole.record_ids
    assert without.bad_records == ()
    weights = np.concatenate([pack.pair_weights.numpy() for pack in without.packs])
    assert (weights == 0).sum() == 2  # both sides of one pair
    assert differences(run, changed, free=False) == []
    stays = changed.model_copy(
        update={"data": changed.data.model_copy(update={"on_change": "refuse"})}
    )
    assert any(line.startswith("data.left_out") for line in differences(run, stays, free=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}\n", "line 1: expected JSON with dataset and number"), (None, "cannot be read")],
)
def test_a_list_that_is_none_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_left_out(str(path))


def test_a_list_for_a_data_set_that_no_stage_has_is_refused(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"dataset": "A", "number": 1}) + "\n")
    data = {"tokens_per_pack": 400, "left_out": str(listed)}
    run = config({"a": dataset}, view="pair", data=data)
    with pytest.raises(ValueError, match=r"names the data set 'A', no stage has .*\(have: a\)"):
        read(run, vocabulary, tmp_path, steps=1)
