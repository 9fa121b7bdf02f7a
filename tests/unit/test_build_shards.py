"""Building data sets: the same bytes whatever happens on the way, and every bad input by name."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_sources import INFO, NUM_ROWS, SMALL, TOKENIZER, ListSource, make_record, run

from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.writing import build, keys
from cocoa_dist.data.writing.build import BuildOptions, BuildProgress, build_dataset
from cocoa_dist.data.writing.dataset import write_shards
from cocoa_dist.data.writing.keys import find_duplicate
from cocoa_dist.data.writing.shard_file import read_part, write_shard
from cocoa_dist.data.writing.summary import summarise
from cocoa_dist.data.writing.verify import verify_dataset
from cocoa_dist.report.contact_sheet import render_sheet


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "set"
    run(ListSource(), path)
    return path


def test_every_good_row_is_a_record_in_order_and_every_bad_one_is_listed(built: Path) -> None:
    reader = ShardReader(built)
    good = [n for n in range(NUM_ROWS) if n not in ListSource().bad]
    assert [reader.record(i) for i in range(len(reader))] == [make_record(n) for n in good]
    assert (reader.info.count, reader.info.num_shards) == (87, 6)
    assert reader.info.info.items() > INFO.items()
    lines = [json.loads(line) for line in (built / "rejected.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == ["list row 3", "list row 40", "list row 41"]
    assert lines[0]["reason"] == "text is empty: column 'text'"
    assert not (built / ".build").exists()
    location = reader.location(15)  # the first of the second shard, as row 3 was left out
    assert (location.shard, location.row) == ("shard-00001.arrow", 0)


def test_the_builder_writes_what_write_shards_writes(tmp_path: Path) -> None:
    run(ListSource(bad=()), tmp_path / "one", tokenizer=None)
    records = (make_record(n) for n in range(NUM_ROWS))
    info = ShardReader(tmp_path / "one").info.info
    write_shards(records, tmp_path / "two", info=info, **SMALL)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    processes: int, built: Path, tmp_path: Path
) -> None:
    run(ListSource(), tmp_path / "set", processes=processes)
    assert files_of(tmp_path / "set") == files_of(built)


@pytest.mark.parametrize("shards_before", [1, 3, 6])
def test_whole_shards_are_kept_and_the_end_is_the_same(
    shards_before: int, built: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"

    def stop(progress: BuildProgress) -> None:
        if progress.shards == shards_before:
            raise KeyboardInterrupt

    source = ListSource(seen=seen)
    options = BuildOptions(**SMALL, tokenizer=TOKENIZER)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(source, tmp_path / "set", info=INFO, options=options, on_progress=stop)
    seen.unlink()
    report = run(source, tmp_path / "set")
    assert report.kept_shards == shards_before
    again = set(map(int, seen.read_text().split())) if seen.exists() else set()
    assert again == set(range(16 * shards_before, NUM_ROWS))
    assert files_of(tmp_path / "set") == files_of(built)


def test_a_half_shard_is_replaced(built: Path, tmp_path: Path) -> None:
    """A file cut after the crash of a machine, and a writer that died in the middle of one."""
    path = tmp_path / "set"

    def stop(progress: BuildProgress) -> None:
        if progress.shards == 3:
            raise KeyboardInterrupt

    options = BuildOptions(**SMALL, tokenizer=TOKENIZER)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(ListSource(), path, info=INFO, options=options, on_progress=stop)
    os.truncate(path / "shard-00001.arrow", 1000)
    (path / ".shard-00003.arrow.tmp").write_bytes(b"half a shard")
    assert run(ListSource(), path).kept_shards == 2
    assert files_of(path) == files_of(built)


def test_a_writer_that_died_before_the_last_rename_has_written_a_whole_shard(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "set"
    (folder / ".build").mkdir(parents=True)
    part = write_shard(ListSource().rows(0, 16), folder, shard=0, records_per_batch=4)
    (folder / "shard-00000.arrow").rename(folder / ".shard-00000.arrow.tmp")
    assert read_part(folder, 0) == part
    assert (folder / "shard-00000.arrow").stat().st_size == part.bytes


BUILDER = """
import sys
from pathlib import Path
from made_sources import ListSource, run
if __name__ == "__main__":
    run(ListSource(count=400, bad=(), pause=0.01), Path(sys.argv[1]), processes=2)
"""


def alive(marker: str) -> list[int]:
    """Processes that were started with `marker` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_kill_in_the_middle_costs_the_shards_that_were_begun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BUILDER)
    path = tmp_path / "set"
    marker = f"COCOA_TEST_BUILD={os.getpid()}-{time.time_ns()}"
    name, _, value = marker.partition("=")
    process = subprocess.Popen(
        [sys.executable, str(script), str(path)],
        env={**os.environ, name: value, "PYTHONPATH": str(Path(__file__).parent)},
    )
    deadline = time.monotonic() + 60
    while len(list(path.glob("shard-*.arrow"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=10)
    while alive(marker):  # writers must not go on alone
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = {f: f.stat().st_mtime_ns for f in path.glob("shard-*.arrow")}
    assert 3 <= len(before) < 25
    with pytest.raises(ValueError, match="still being built, or was interrupted"):
        summarise(path)
    report = run(ListSource(count=400, bad=()), path)
    assert report.kept_shards == len(before)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    run(ListSource(count=400, bad=()), tmp_path / "whole")
    assert files_of(path) == files_of(tmp_path / "whole")
    assert verify_dataset(path, tokenizer=TOKENIZER).num_problems == 0


@pytest.mark.parametrize(("one", "two"), [(5, 6), (5, 77)], ids=["one shard", "two shards"])
def test_a_key_that_occurs_twice_names_both_rows(one: int, two: int, tmp_path: Path) -> None:
    source = ListSource(keys={one: "same", two: "same"})
    places = f"in list row {one} and list row {two}"
    with pytest.raises(ValueError, match=rf"key 'same' occurs twice, {places}"):
        run(source, tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_duplicate_ends_the_build_when_its_shard_is_finished(tmp_path: Path) -> None:
    """Shards of 16 rows: the third one shows it, and three more are never written."""
    source = ListSource(keys={5: "same", 40: "same", 41: "other"}, bad=(), seen=tmp_path / "rows")
    places = "in list row 5 and list row 40"
    with pytest.raises(ValueError, match=rf"key 'same' occurs twice, {places}"):
        run(source, tmp_path / "set", processes=1)
    assert len((tmp_path / "rows").read_text().split()) == 48
    with pytest.raises(ValueError, match=rf"key 'same' occurs twice, {places}"):
        run(source, tmp_path / "set", processes=1)  # told at once, from the shards that are there
    assert len((tmp_path / "rows").read_text().split()) == 48


@pytest.mark.parametrize("kept", [0, 20, 1000])
def test_a_duplicate_is_found_in_the_end_where_memory_did_not_hold_all_keys(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys.SeenKeys.__init__, "__kwdefaults__", {"hashes_kept": kept})
    source = ListSource(keys={20: "same", 40: "same"}, bad=(), seen=tmp_path / "rows")
    with pytest.raises(ValueError, match="in list row 20 and list row 40"):
        run(source, tmp_path / "set", processes=1)
    rows = len((tmp_path / "rows").read_text().split())
    assert rows == (48 if kept == 1000 else NUM_ROWS)


def test_keys_that_only_share_a_hash_are_no_duplicates_while_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoa_dist.data.writing.shard_file.key_hash", lambda key: len(key))
    report = run(ListSource(), tmp_path / "set", processes=1)
    assert report.info.count == NUM_ROWS - 3


def test_duplicates_are_found_however_few_hashes_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    (folder / ".build").mkdir(parents=True)
    source = ListSource(keys={8: "same", 70: "same"}, bad=())
    parts = [
        write_shard(source.rows(start, start + 16), folder, shard=shard, records_per_batch=4)
        for shard, start in enumerate(range(0, 80, 16))
    ]
    for few in (1, 7, 1000):
        found = find_duplicate(folder, parts, hashes_at_a_time=few)
        assert found is not None
        assert (found.first, found.second) == (keys.Place(0, 8), keys.Place(4, 6))
    monkeypatch.setattr("cocoa_dist.data.writing.shard_file.key_hash", lambda key: 7)
    different = ListSource(bad=())  # other keys, all with one hash
    part = write_shard(different.rows(0, 16), folder, shard=0, records_per_batch=4)
    assert find_duplicate(folder, [part]) is None


def test_too_many_bad_rows_end_the_build_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 of 90 rows cannot become a record") as caught:
        run(ListSource(), tmp_path / "set", max_rejected=0.02)
    assert "3 x text is empty" in str(caught.value)
    assert "list row 40: text is empty: column 'text'" in str(caught.value)
    report = run(ListSource(), tmp_path / "set", max_rejected=0.04)
    assert (report.rejected, report.reasons) == (3, {"text is empty": 3})
    assert report.kept_shards >= 2


def test_a_source_without_a_single_record_is_refused(tmp_path: Path) -> None:
    everything = ListSource(bad=tuple(range(NUM_ROWS)))
    with pytest.raises(ValueError, match="there are no records to write"):
        run(everything, tmp_path / "set", max_rejected=1.0)
    with pytest.raises(ValueError, match="the source has no rows"):
        run(ListSource(count=0), tmp_path / "other")


def test_a_shard_without_a_record_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "set"
    run(ListSource(bad=tuple(range(16, 32))), path, max_rejected=0.5)
    reader = ShardReader(path)
    assert not (path / "shard-00001.arrow").exists()
    assert [reader.key(i) for i in (15, 16)] == ["k15", "k32"]
    assert reader.location(16).shard == "shard-00002.arrow"
    assert verify_dataset(path).num_problems == 0


def test_a_folder_that_holds_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty: it holds thesis\.txt; name an empty"):
        run(ListSource(), path)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        run(ListSource(), path / "thesis.txt")
    with pytest.raises(ValueError, match="cannot be written"):
        run(ListSource(), path / "thesis.txt" / "below")
    assert files_of(path) == {"thesis.txt": b"years of work"}


def test_a_whole_data_set_is_left_alone(built: Path) -> None:
    before = files_of(built)
    (built / ".build").mkdir()  # of a builder that was killed when all was done
    report = run(ListSource(), built)
    assert (report.kept_shards, report.rejected) == (6, 3)
    assert files_of(built) == before
    assert not (built / ".build").exists()
    with pytest.raises(ValueError, match="already holds a data set, of other files or settings"):
        run(ListSource(bad=()), built)
    assert files_of(built) == before


@pytest.mark.parametrize(
    ("source", "changes", "named"),
    [
        (ListSource(bad=()), {}, "source"),
        (ListSource(count=50), {}, "rows, source"),
        (ListSource(), {"records_per_batch": 8}, "records_per_batch"),
        (ListSource(), {"tokenizer": None}, "tokenizer"),
    ],
)
def test_shards_of_another_build_are_not_mixed_in(
    source: ListSource, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "set"
    with pytest.raises(ValueError, match="rows cannot become"):
        run(ListSource(), path, max_rejected=0.02)
    with pytest.raises(ValueError, match=f"shards of another build: {named} changed since"):
        run(source, path, **changes)
    report = run(source, path, **changes, restart=True, max_rejected=0.1)
    assert report.kept_shards == 0
    assert verify_dataset(path).num_problems == 0


def test_two_builders_do_not_work_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "set"
    (path / ".build").mkdir(parents=True)
    with (path / ".build" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is building there"):
            run(ListSource(), path)


def test_a_full_disk_is_named_and_the_build_goes_on_afterwards(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set"
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; whole shards stay, make room"):
        run(ListSource(), path)
    assert not list(path.glob(".shard*"))
    monkeypatch.setattr(os, "fsync", real)
    assert run(ListSource(), path).kept_shards > 0
    assert files_of(path) == files_of(built)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ListSource(dies_at=37), "a writer process died, perhaps for lack of memory"),
        (ListSource(damaged_at=37), "b.parquet is not a whole Parquet file"),
        (ListSource(keys={33: "same", 34: "same"}), "in list row 33 and list row 34"),
    ],
    ids=["killed", "damaged", "duplicate"],
)
def test_a_writer_that_fails_ends_the_build(
    source: ListSource, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "set", processes=2)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_batches_and_shards_are_cut_by_bytes(tmp_path: Path) -> None:
    options = BuildOptions()
    report = build_dataset(ListSource(), tmp_path / "set", info=INFO, options=options)
    assert report.info.records_per_batch == 256  # tiny records: the most that is allowed
    assert build._batch_records(100_000) == 16
    assert build._batch_records(9e9) == 1
    assert build._shard_records(10**6, 100_000, batch=16) == 5376  # 512 MiB
    assert build._shard_records(800, 100_000, batch=16) == 112  # eight shards


def test_huge_pictures_end_a_batch_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocoa_dist.data.writing.shard_file.MAX_BATCH_BYTES", 200)
    run(ListSource(), tmp_path / "set")
    reader = ShardReader(tmp_path / "set")
    assert reader.info.num_batches > 87 // 4 + 2
    assert [reader.key(i) for i in (0, 3, 86)] == ["k0", "k4", "k89"]
    assert verify_dataset(tmp_path / "set").num_problems == 0


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: name the folder of the model"):
        run(ListSource(), tmp_path / "set", tokenizer=tmp_path)


def test_a_build_is_not_finished_in_another_format(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(ValueError, match="is not a whole Parquet file"):
        run(ListSource(damaged_at=60), path)
    plan = path / ".build" / "plan.json"
    plan.write_text(plan.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ValueError, match="shards of another build: format changed since"):
        run(ListSource(), path)


def test_verify_passes_what_was_written(built: Path) -> None:
    report = verify_dataset(built, tokenizer=TOKENIZER)
    assert (report.num_problems, report.records, report.tokens_counted_again) == (0, 87, True)


def damage(path: Path, kind: str) -> None:
    if kind == "pixel":
        file = path / "shard-00002.arrow"
        data = bytearray(file.read_bytes())
        data[data.index(b"IDAT") + 6] ^= 1
        file.write_bytes(data)
    elif kind == "column":  # which training does not read
        file = path / "shard-00002.arrow"
        data = bytearray(file.read_bytes())
        data[data.rindex(b"thing number")] ^= 1
        file.write_bytes(data)
    elif kind in ("tokens", "size"):  # an index that does not fit, under a manifest that does
        import pyarrow as pa

        index = path / "index" / "records.arrow"
        table = pa.ipc.open_file(pa.py_buffer(index.read_bytes())).read_all()
        name = {"tokens": "num_text_tokens", "size": "image_heights"}[kind]
        values = table.column(name).to_pylist()
        values[10] = 99 if kind == "tokens" else [99]
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), name, column)
        with pa.ipc.new_file(index, table.schema) as writer:
            writer.write_table(table)
        manifest = json.loads((path / "manifest.json").read_text())
        for entry in manifest["files"]:
            entry["bytes"] = (path / entry["path"]).stat().st_size
        (path / "manifest.json").write_text(json.dumps(manifest))
    else:
        (path / "rejected.jsonl").write_text("{}" + " " * 10**6)


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("pixel", ["shard-00002.arrow has sha256", "crc32 is 0x"]),
        ("column", ["shard-00002.arrow has sha256", "its columns are not its header's"]),
        ("tokens", ["records.arrow has sha256", r"the index has 99"]),
        ("size", ["records.arrow has sha256", r"the index has ((99, 5),)"]),
    ],
)
def test_verify_names_what_is_wrong(kind: str, messages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "set"
    run(ListSource(), path)
    damage(path, kind)
    report = verify_dataset(path, tokenizer=TOKENIZER)
    assert report.num_problems == len(messages)
    for message, problem in zip(messages, report.problems, strict=True):
        assert message in problem


def test_verify_says_when_another_tokenizer_counted(tmp_path: Path) -> None:
    run(ListSource(), tmp_path / "set", tokenizer=None)
    report = verify_dataset(tmp_path / "set", tokenizer=TOKENIZER)
    assert "tokens were counted with no tokenizer" in report.problems[0]
    assert not report.tokens_counted_again


def test_a_summary_counts_and_its_page_shows(built: Path) -> None:
    summary = summarise(built, num_examples=10)
    assert summary.info.count == summary.sampled == summary.pictures == 87
    assert summary.licences == {"MIT": 44, "CC0-1.0": 43}
    assert summary.formats == {"PNG": 87}
    assert summary.rejected == {"text is empty": 3}
    assert len(summary.examples) == 10
    by_title = {histogram.title: histogram for histogram in summary.histograms}
    assert set(by_title) == {
        *(
            "Text of the largest sample",
            "Longer side of pictures",
            "Longer by shorter side",
            "Pictures of a record",
        ),
    }
    assert all(sum(one.counts) == 87 for one in by_title.values())
    page = render_sheet(summary)
    assert page.count("data:image/webp;base64,") == 10
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    "values", [[1, 1, 1], [1, 2, 3, 100000], [0.5, 0.7], list(range(1000)), [0, 5000]]
)
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    from cocoa_dist.data.writing.summary import histogram

    made = histogram(np.array(values), title="t", unit="u")
    assert sum(made.counts) == len(values)
    assert made.edges[0] <= min(values)
    assert made.edges[-1] >= max(values)
