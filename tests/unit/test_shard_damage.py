"""Damage of data sets on disk is found and named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from small_shards import BATCH, flip_byte, make_record, make_records, write

from cocoa_dist.data.records import record_crc32
from cocoa_dist.data.shards import ShardReader, verify


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    write(path)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "set"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a data set"):
        ShardReader(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (b"{}", "is damaged"),
        (b'{"schema_version": 99}', "schema_version 99, expected 2"),
        (b'{"schema_version": 2}', r"lacks \['bytes'"),
    ],
)
def test_a_bad_manifest_is_named(content: bytes, message: str, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ShardReader(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    expected = (copy / "shard-00001.arrow").stat().st_size
    (copy / "shard-00001.arrow").unlink()
    with pytest.raises(
        ValueError,
        match=rf"shard-00001\.arrow: found no file, expected {expected} bytes; "
        "rebuild the data set or restore the file",
    ):
        ShardReader(copy)


def test_a_truncated_shard_is_named(copy: Path) -> None:
    file = copy / "shard-00002.arrow"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(
        ValueError, match=rf"shard-00002\.arrow: found {size - 1} bytes, expected {size} bytes"
    ):
        ShardReader(copy)


def test_a_shard_cut_after_opening_is_named(copy: Path) -> None:
    reader = ShardReader(copy)
    os.truncate(copy / "shard-00000.arrow", 1000)
    with pytest.raises(ValueError, match=r"shard-00000\.arrow: batch 1 .* the file was cut"):
        reader.record(5)


def test_a_flipped_byte_names_shard_row_and_key(copy: Path) -> None:
    file = copy / "shard-00001.arrow"
    flip_byte(file, file.read_bytes().index(b"query 13"))
    reader = ShardReader(copy)
    with pytest.raises(
        ValueError, match=r"shard-00001\.arrow: row 5 \(record 13, key 'record-013'\): crc32 is 0x"
    ):
        reader.record(13)
    assert reader.record(12) == make_record(12)
    assert reader.record(14) == make_record(14)


def test_no_flipped_byte_goes_unseen(copy: Path) -> None:
    """Every byte of a batch, in turn: a ValueError, or the very record that was written."""
    reader = ShardReader(copy)
    offset, length = int(reader._batch_offset[0]), int(reader._batch_length[0])
    file = copy / "shard-00000.arrow"
    original = file.read_bytes()
    messages = []
    num_unharmed = 0
    for position in range(offset, offset + length, 7):
        damaged = bytearray(original)
        damaged[position] ^= 0x41
        file.write_bytes(damaged)
        reader.close()
        try:
            assert [reader.record(i) for i in range(BATCH)] == list(make_records(BATCH))
            num_unharmed += 1  # padding, or a column that is for other programs
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert num_unharmed > 0
    assert all("shard-00000.arrow" in message for message in messages)


def test_a_damaged_index_is_found(copy: Path) -> None:
    file = copy / "index" / "records.arrow"
    crc32 = record_crc32(make_record(3)).to_bytes(4, "little")
    flip_byte(file, file.read_bytes().index(crc32))
    with pytest.raises(ValueError, match=r"index/records\.arrow: fingerprint is"):
        ShardReader(copy)


def test_an_index_of_another_data_set_is_found(copy: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", 8)
    shutil.copy(tmp_path / "other" / "index" / "records.arrow", copy / "index")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    for entry in manifest["files"]:
        entry["bytes"] = (copy / entry["path"]).stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the index has 8 records"):
        ShardReader(copy)


def test_verify_reads_every_byte(copy: Path) -> None:
    verify(copy)
    flip_byte(copy / "shard-00002.arrow", 900)
    flip_byte(copy / ".nv-meta" / "split.yaml", 3)
    with pytest.raises(ValueError, match=r"2 damaged files: shard-00002\.arrow .*split\.yaml"):
        verify(copy)


def test_no_outline_is_given_of_headers_that_changed(copy: Path) -> None:
    file = copy / "shard-00001.arrow"
    flip_byte(file, file.read_bytes().index(b"query 13"))
    reader = ShardReader(copy)
    for number in (12, 13):  # which of the batch it is, nobody can say without the pictures
        with pytest.raises(ValueError, match="the headers of its batch are not those written"):
            reader.outline(number)
    assert reader.outline(11).key == "record-011"


def test_a_shard_cut_between_two_records_of_a_batch_is_named(copy: Path) -> None:
    reader = ShardReader(copy)
    reader.record(4)
    last = reader._state.batches[1].first_picture
    os.truncate(copy / "shard-00000.arrow", last + 10)
    with pytest.raises(ValueError, match=r"shard-00000\.arrow: batch 1 .* the file was cut"):
        reader.record(5)
    reader.close()
