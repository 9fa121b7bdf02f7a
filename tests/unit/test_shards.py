"""Data sets on disk: what is written comes back, in any order and process."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_shards import (
    BATCH,
    NUM_RECORDS,
    SHARD,
    count_words,
    files_of,
    make_record,
    make_records,
    png,
    write,
)

from cocoa_dist.data.records import Record, from_row
from cocoa_dist.data.shard_format import SCHEMA
from cocoa_dist.data.shards import (
    Location,
    ShardReader,
    check_dataset,
    remove_dataset,
    write_shards,
)
from cocoa_dist.data.store import LocalStore
from cocoa_dist.data.writing import dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    write(path)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "set"))


@pytest.fixture
def reader(written: Path) -> Iterator[ShardReader]:
    reader = ShardReader(written)
    yield reader
    reader.close()


def test_every_record_comes_back_in_any_order(reader: ShardReader) -> None:
    assert len(reader) == NUM_RECORDS
    order = np.random.default_rng(0).permutation(NUM_RECORDS)
    for number in map(int, order):
        assert reader.record(number) == make_record(number)
        assert reader.key(number) == f"record-{number:03d}"


def test_batches_and_shards_are_uniform(written: Path) -> None:
    counts = []
    for file in sorted(written.glob("shard-*.arrow")):
        with pa.ipc.open_file(file) as arrow:
            assert arrow.schema == SCHEMA
            counts.append([arrow.get_batch(i).num_rows for i in range(arrow.num_record_batches)])
    assert counts == [[4, 4], [4, 4], [4, 3]]


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 16])
def test_counts_at_the_borders(count: int, tmp_path: Path) -> None:
    info = write(tmp_path / "set", count)
    reader = ShardReader(tmp_path / "set")
    assert [reader.record(i) for i in range(count)] == list(make_records(count))
    assert info.count == count
    assert (info.num_batches, info.num_shards) == (-(-count // BATCH), -(-count // SHARD))


def test_the_index_finds_each_batch_as_arrow_does(written: Path, reader: ShardReader) -> None:
    with pa.ipc.open_file(written / "index" / "batches.arrow") as arrow:
        rows = arrow.read_all().to_pylist()
    seen: dict[int, int] = {}
    for row in rows:
        file = written / f"shard-{row['shard']:05d}.arrow"
        message = file.read_bytes()[row["offset"] : row["offset"] + row["length"]]
        decoded = pa.ipc.read_record_batch(pa.py_buffer(message), SCHEMA)
        in_shard = seen.get(row["shard"], 0)
        seen[row["shard"]] = in_shard + 1
        with pa.ipc.open_file(file) as arrow:
            assert decoded.equals(arrow.get_batch(in_shard))
        assert decoded.num_rows == row["num_rows"]
    assert len(rows) == reader.info.num_batches


def test_shards_are_not_compressed(written: Path) -> None:
    assert b"word word word" in (written / "shard-00000.arrow").read_bytes()


def test_text_tokens_are_the_most_one_sample_can_hold(reader: ShardReader) -> None:
    expected = []
    for record in make_records():
        query = sum(count_words(part.text) for part in record.query)
        target = sum(count_words(part.text) for part in record.target)
        sides = [count_words(side[0].text) for side in (*record.positives, *record.negatives)]
        expected.append(max([query + target, *sides]))
    assert reader.num_text_tokens.tolist() == expected
    assert len(set(expected)) > 1


def test_without_a_tokenizer_the_counts_are_unknown(tmp_path: Path) -> None:
    write(tmp_path / "set", count_tokens=None, tokenizer_sha256="")
    assert (ShardReader(tmp_path / "set").num_text_tokens == -1).all()


def test_image_sizes_come_from_the_index(reader: ShardReader) -> None:
    assert reader.image_sizes(5) == ((15, 20), (15, 21))
    assert reader.image_sizes(6) == ()
    assert reader.image_sizes(7) == ((0, 0),)  # no picture


def test_location_is_file_and_row(reader: ShardReader) -> None:
    assert reader.location(0) == Location("shard-00000.arrow", 0)
    assert reader.location(NUM_RECORDS - 1) == Location("shard-00002.arrow", 6)


@pytest.mark.parametrize("number", [-1, NUM_RECORDS])
def test_numbers_out_of_range_are_refused(number: int, reader: ShardReader) -> None:
    with pytest.raises(IndexError, match=f"records 0 to 22, not {number}"):
        reader.record(number)
    with pytest.raises(IndexError):
        reader.image_sizes(number)


def test_the_same_records_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(written)


def test_the_fingerprint_depends_on_content_and_order(written: Path, tmp_path: Path) -> None:
    records = list(make_records())
    options: dict[str, Any] = {"info": {}, "records_per_batch": 8, "records_per_shard": 8}
    same = write_shards(records, tmp_path / "other_batches", **options)
    swapped = write_shards([records[1], records[0], *records[2:]], tmp_path / "swapped", **options)
    assert same.fingerprint == ShardReader(written).fingerprint
    assert swapped.fingerprint != same.fingerprint


def test_the_manifest_lists_every_file(written: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_bytes())
    assert {entry["path"] for entry in manifest["files"]} == set(files_of(written)) - {
        "manifest.json"
    }
    assert manifest["tokenizer_sha256"] == "f" * 64
    assert manifest["info"] == {"name": "test"}
    assert manifest["count"] == NUM_RECORDS


def test_energon_accepts_the_folder(written: Path) -> None:
    from megatron.energon.epathlib import EPath
    from megatron.energon.eyaml import load_yaml_json
    from megatron.energon.flavors.webdataset import metadata

    path = EPath(str(written))
    assert metadata.get_dataset_type(path) == metadata.EnergonDatasetType.WEBDATASET
    for part in ("train", "val"):
        meta = metadata.WebdatasetMeta.from_config(path=path, split_part=part)
        assert [(shard.name, shard.count) for shard in meta.shards] == [
            ("shard-00000.arrow", 8),
            ("shard-00001.arrow", 8),
            ("shard-00002.arrow", 7),
        ]
    assert load_yaml_json(path / ".nv-meta" / "dataset.yaml") == {
        "__module__": "cocoa_dist.data.loader",
        "__class__": "ArrowDatasetFactory",
    }


def test_a_duplicate_key_is_named(tmp_path: Path) -> None:
    records = [make_record(0), make_record(1), make_record(2), make_record(1)]
    with pytest.raises(ValueError, match=r"key 'record-001' occurs twice, in records 1 and 3"):
        write_shards(records, tmp_path / "set", info={})
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        ShardReader(tmp_path / "set")


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records to write"):
        write_shards([], tmp_path / "set", info={})


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records_per_shard 10 must be a positive multiple"):
        write(tmp_path / "set", records_per_shard=10)


def test_a_data_set_is_not_overwritten(copy: Path) -> None:
    before = files_of(copy)
    with pytest.raises(ValueError, match="already holds a data set"):
        write(copy)
    assert files_of(copy) == before


def test_an_interrupted_write_leaves_no_data_set_and_can_be_repeated(
    written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "set"

    def failing() -> Iterator[Record]:
        yield from make_records(20)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_shards(failing(), path, info={}, records_per_batch=4, records_per_shard=4)
    assert (path / "shard-00003.arrow").exists()
    assert not list(path.rglob("*.tmp"))
    (path / ".shard-00000.arrow.99.tmp").write_bytes(b"left by a killed process")
    with pytest.raises(ValueError, match="Writing it was interrupted"):
        ShardReader(path)
    write(path)
    assert files_of(path) == files_of(written)


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(dataset, "_write_energon_metadata", fail)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_remove_leaves_other_files(copy: Path) -> None:
    (copy / "NOTES").write_text("mine")
    remove_dataset(copy)
    assert list(files_of(copy)) == ["NOTES"]
    assert not (copy / "index").exists()


def test_files_are_opened_when_they_are_needed(written: Path) -> None:
    def opened() -> list[str]:
        links = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        return [link for link in links if link.startswith(f"{written}/")]

    reader = ShardReader(written)
    assert not opened()
    reader.record(0)
    assert opened() == [f"{written}/shard-00000.arrow"]
    reader.close()
    assert not opened()
    assert reader.record(22) == make_record(22)
    reader.close()


def test_the_cache_is_bounded_in_bytes(written: Path) -> None:
    probe = ShardReader(written)
    probe.record(0)
    probe.record(NUM_RECORDS - 1)
    two_batches = probe._state.cached_bytes
    reader = ShardReader(written, cache_bytes=two_batches)
    for number in [*range(NUM_RECORDS), *range(NUM_RECORDS)]:
        assert reader.record(number) == make_record(number)
        assert reader._state.cached_bytes <= two_batches
    assert reader._state.cached_bytes == sum(
        batch.num_bytes for batch in reader._state.batches.values()
    )
    reader.close()


def test_a_cached_batch_is_not_read_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(written)
    reader.record(0)
    monkeypatch.setattr(reader, "_read_batch", None)
    assert reader.record(3) == make_record(3)
    reader.close()


def test_a_record_is_read_alone_and_the_rest_of_its_batch_expected(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(written)
    sizes: list[int] = []
    expected: list[tuple[str, int]] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        sizes.append(length)
        return pread(descriptor, length, offset)

    def expect(_: object, name: str, *, offset: int, length: int) -> None:
        expected.append((name, length))

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(LocalStore, "expect", expect)
    one = len(png(11, 20))
    for number in (5, 4, 5, 7):  # one batch: two pictures, one, two, one that is none
        reader.record(number)
    assert sizes[1:] == [2 * one, one, 2 * one, len(b"not a picture")]
    assert sizes[0] < reader._batch_length[1]
    assert expected == [("shard-00000.arrow", 3 * one + len(b"not a picture"))]
    reader.close()


def test_a_store_that_is_far_is_asked_once_for_a_batch(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "is_far", True)
    reader = ShardReader(written)
    asked: list[tuple[str, int]] = []
    read_range = LocalStore.read_range

    def counted(store: LocalStore, name: str, *, offset: int, length: int) -> bytes:
        asked.append((name, length))
        return read_range(store, name, offset=offset, length=length)

    monkeypatch.setattr(LocalStore, "read_range", counted)
    assert [reader.record(n) for n in range(NUM_RECORDS)] == list(make_records())
    assert len(asked) == reader.info.num_batches
    assert sum(length for _, length in asked) == sum(
        batch.num_bytes for batch in reader._state.batches.values()
    )
    reader.close()


def test_a_check_leaves_the_index_of_a_far_store_to_the_reader(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "is_far", True)
    read: list[str] = []
    original = LocalStore.read
    monkeypatch.setattr(
        LocalStore, "read", lambda store, name: read.append(name) or original(store, name)
    )
    assert check_dataset(copy).count == NUM_RECORDS
    assert read == ["manifest.json"]
    (copy / "shard-00001.arrow").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.arrow: found no file"):
        check_dataset(copy)


def test_an_outline_is_the_record_without_its_pictures(written: Path) -> None:
    reader = ShardReader(written)
    for number, record in enumerate(make_records()):
        outline = reader.outline(number)
        assert outline.images == (b"",) * len(record.images)
        assert replace(outline, images=record.images) == record
    reader.close()


def test_columns_for_other_programs_say_what_the_header_says(reader: ShardReader) -> None:
    for number, record in enumerate(make_records()):
        batch, row = reader.columns_of(number)
        assert from_row(batch.slice(row, 1).to_pylist()[0]) == record


def read_all(reader: ShardReader, start: int, output: Any) -> None:
    numbers = [(start + i) % NUM_RECORDS for i in range(NUM_RECORDS)]
    output.put(all(reader.record(i) == make_record(i) for i in numbers) and os.getpid())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_read_through_a_reader_of_the_parent(method: str, written: Path) -> None:
    context: Any = multiprocessing.get_context(method)
    reader = ShardReader(written)
    reader.record(0)
    output = context.Queue()
    children = [context.Process(target=read_all, args=(reader, start, output)) for start in (0, 9)]
    for child in children:
        child.start()
    results = {output.get(timeout=60) for _ in children}
    for child in children:
        child.join(timeout=60)
    assert results == {child.pid for child in children}
    assert reader.record(22) == make_record(22)
    reader.close()


def test_a_fork_during_a_read_does_not_block_the_child(written: Path) -> None:
    """The parent's lock, held at the moment of the fork, must not be the child's."""
    context = multiprocessing.get_context("fork")
    reader = ShardReader(written)
    output = context.Queue()
    with reader._state.lock:
        child = context.Process(target=read_all, args=(reader, 0, output))
        child.start()
    assert output.get(timeout=60) == child.pid
    child.join(timeout=60)


def test_threads_share_a_reader(written: Path) -> None:
    reader = ShardReader(written, cache_bytes=1)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for number in map(int, np.random.default_rng(seed).integers(0, NUM_RECORDS, 100)):
            if reader.record(number) != make_record(number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    reader.close()


def test_a_reader_can_be_pickled(written: Path) -> None:
    reader = ShardReader(written)
    reader.record(0)
    again = pickle.loads(pickle.dumps(reader))
    assert again.record(11) == make_record(11)
    again.close()
    reader.close()


def test_reading_needs_no_torch(written: Path) -> None:
    program = (
        "import sys; from cocoa_dist.data.shards import ShardReader; "
        f"ShardReader({str(written)!r}).record(0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
