"""An index that is damaged costs its records, by name, and never the run."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from cocoa_dist.config import ASSET_DIR
from cocoa_dist.data.record_source import RecordSource
from cocoa_dist.data.shard_format import BATCH_INDEX, MANIFEST_NAME, RECORD_INDEX
from cocoa_dist.data.shards import ShardReader

NUMBER = 5  # of the record that is read, in batch 0


def damaged(folder: Path, file: str, column: str, value: int) -> ShardReader:
    """Open a copy of a data set in which one number of an index is another."""
    shutil.copytree(ASSET_DIR / "emoji" / "validation", folder)
    table = pa.ipc.open_file(pa.py_buffer((folder / file).read_bytes())).read_all()
    place = table.schema.get_field_index(column)
    values = table.column(column).to_pylist()
    values[NUMBER if file == RECORD_INDEX else 0] = value
    field = table.schema.field(place)
    table = table.set_column(place, field, pa.array(values, field.type))
    with pa.ipc.new_file(str(folder / file), table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for entry in manifest["files"]:
        entry["bytes"] = (folder / entry["path"]).stat().st_size
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return ShardReader(folder)


@pytest.mark.parametrize(
    ("file", "column", "value"),
    [
        (RECORD_INDEX, "row", 10**6),
        (RECORD_INDEX, "row", -3),
        (RECORD_INDEX, "batch", 999),
        (RECORD_INDEX, "batch", -1),
        (BATCH_INDEX, "shard", 77),
        (BATCH_INDEX, "offset", -64),
        (BATCH_INDEX, "offset", 10**15),
        (BATCH_INDEX, "header_offsets", 10**9),
        (BATCH_INDEX, "meta_offsets", 3),
        (BATCH_INDEX, "picture_counts", -5),
        (BATCH_INDEX, "picture_data", 64),
        (BATCH_INDEX, "picture_data", 2**61),
    ],
)
def test_a_damaged_index_costs_its_records(file, column, value, tmp_path: Path) -> None:
    reader = damaged(tmp_path / "data", file, column, value)
    source = RecordSource("source", reader, len(reader))
    source.outline(NUMBER)  # None, or what the headers say: planning goes on
    with pytest.raises(ValueError, match="damaged") as found:
        source.record(NUMBER)
    bad = source.bad_record(NUMBER, key=source.key(NUMBER), reason=str(found.value))
    assert bad.number == NUMBER
    assert bad.kind in ("shard is damaged", "wrong checksum")
    assert reader.record(len(reader) - 1).key, "others are read"
