"""The part of bench_plan.py that reads: from the end of imports to a rank's first batch.

The data set has as many records as is asked for and a real index; its shards are links to one file
of 64 real records, so that whatever the order draws first can be read, checked and packed.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

STAGE = "contrastive"
RECORDS_PER_BATCH, RECORDS_PER_SHARD = 64, 102_400
RANKS, RECORDS_A_RANK = 8, 32
PICTURE = (336, 448)  # height and width of every picture


def make_readable_data_set(folder: Path, *, count: int) -> None:
    """Write `count` records, of which 64 differ, with a picture and a text each."""
    import numpy as np
    import pyarrow as pa

    from cocoa_dist.data.shard_format import (
        BATCH_INDEX,
        BATCH_INDEX_SCHEMA,
        RECORD_INDEX,
        RECORD_INDEX_SCHEMA,
        shard_name,
    )
    from cocoa_dist.data.writing.dataset import write_shards

    vocabulary = load_vocabulary()
    write_shards(
        made_records(),
        folder,
        info={"source": "made by tools/bench_plan.py"},
        count_tokens=lambda text: len(vocabulary.encode(text)),
        tokenizer_sha256=vocabulary.sha256,
        records_per_batch=RECORDS_PER_BATCH,
    )
    rows = pa.ipc.open_file(folder / RECORD_INDEX).read_all()
    (one,) = pa.ipc.open_file(folder / BATCH_INDEX).read_all().to_pylist()
    batches = count // RECORDS_PER_BATCH
    numbers = np.arange(batches, dtype=np.int32)
    shard_of = numbers // (RECORDS_PER_SHARD // RECORDS_PER_BATCH)
    with pa.ipc.new_file(folder / RECORD_INDEX, RECORD_INDEX_SCHEMA) as writer:
        for begin in range(0, batches, RECORDS_PER_SHARD // RECORDS_PER_BATCH):
            several = slice(begin, begin + RECORDS_PER_SHARD // RECORDS_PER_BATCH)
            table = pa.concat_tables([rows] * len(numbers[several])).combine_chunks()
            for name, values in (("batch", numbers[several]), ("shard", shard_of[several])):
                repeated = pa.array(np.repeat(values, RECORDS_PER_BATCH))
                table = table.set_column(table.schema.get_field_index(name), name, repeated)
            writer.write_table(table.cast(RECORD_INDEX_SCHEMA))
    columns = {name: np.full(batches, value) for name, value in one.items()} | {"shard": shard_of}
    with pa.ipc.new_file(folder / BATCH_INDEX, BATCH_INDEX_SCHEMA) as writer:
        writer.write_table(pa.table(columns).cast(BATCH_INDEX_SCHEMA))
    for shard in range(1, int(shard_of[-1]) + 1):
        os.link(folder / shard_name(0), folder / shard_name(shard))
    checksums = rows.column("crc32").to_numpy().astype("<u4").tobytes()
    _describe_anew(
        folder,
        batches=batches,
        shards=int(shard_of[-1]) + 1,
        fingerprint=hashlib.sha256(checksums * batches).hexdigest(),
    )


def _describe_anew(folder: Path, *, batches: int, shards: int, fingerprint: str) -> None:
    """Let the manifest say what the files are now."""
    from cocoa_dist.data.shard_format import MANIFEST_NAME, file_names

    content = json.loads((folder / MANIFEST_NAME).read_text())
    content |= {"count": batches * RECORDS_PER_BATCH, "num_batches": batches, "num_shards": shards}
    content["fingerprint"] = fingerprint
    content["files"] = [
        {"path": name, "bytes": (folder / name).stat().st_size, "sha256": "0" * 64}
        for name in file_names(folder)
    ]
    content["bytes"] = sum(entry["bytes"] for entry in content["files"])
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def made_records() -> list[Any]:
    """Return records with a JPEG of a plain drawing and a caption each, of different lengths."""
    import io

    import numpy as np
    from PIL import Image, ImageDraw

    from cocoa_dist.data.records import Record, image_part, text_part

    random, records = np.random.default_rng(0), []
    for number in range(RECORDS_PER_BATCH):
        picture = Image.new("RGB", PICTURE[::-1], tuple(random.integers(0, 256, 3).tolist()))
        for _ in range(12):
            corners = np.sort(random.integers(0, min(PICTURE), (2, 2)), axis=0)
            colour = tuple(random.integers(0, 256, 3).tolist())
            ImageDraw.Draw(picture).ellipse(corners.reshape(-1).tolist(), fill=colour)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        words = " ".join(f"round thing {n}" for n in range(2 + number % 20))
        records.append(
            Record(
                key=f"drawing {number}",
                task="made",
                query=(text_part(words),),
                positives=((image_part(0),),),
                target=(text_part(words),),
                images=(file.getvalue(),),
            )
        )
    return records


def load_vocabulary() -> Any:
    """Return the tokenizer of the recipe that is read with."""
    from cocoa_dist.config import load_recipe
    from cocoa_dist.train import build

    return build.load_vocabulary(load_recipe("debug").model)


def until_first_batch(folder: Path) -> dict[str, float]:
    """Do what a rank does to have its first batch; wall and CPU seconds behind the imports."""
    from cocoa_dist.config import load_recipe
    from cocoa_dist.data.geometry import ImageGeometry
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.train import build, session  # what else a rank imports

    assert session
    wall, cpu = time.perf_counter(), time.process_time()
    source = f"stages.{STAGE}.data.sources.emoji"
    config = load_recipe(
        "debug",
        [
            *(f"{source}.path={folder / 'data'}", f"{source}.limit=null"),
            *(f"stages.{STAGE}.batch_size={RANKS * RECORDS_A_RANK}", "data.tokens_per_pack=8192"),
            *("data.max_text_tokens=512", "data.image.max_pixels=602112"),
        ],
    )
    loader = StageLoader(
        *(config, STAGE),
        vocabulary=build.load_vocabulary(config.model),
        geometry=ImageGeometry(patch_size=14),
        rank=0,
        world_size=RANKS,
        start_step=1,
        folder=folder / "run",
    )
    opened = time.perf_counter() - wall
    session.agree_on_plan(loader)
    batch = loader.next_step()
    assert not batch.bad_records, batch.bad_records
    assert batch.num_samples == 2 * RECORDS_A_RANK
    return {
        "opened_seconds": opened,
        "first_batch_seconds": time.perf_counter() - wall,
        "first_batch_cpu_seconds": time.process_time() - cpu,
        "records": float(len(loader.plan.sources[0].tokens)),
    }
