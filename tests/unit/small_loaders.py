"""Loaders over a few records, of every view, for the tests of loading."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocoa_dist.batch import StepBatch
from cocoa_dist.config import ASSET_DIR, RunConfig, parse_config
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.samples import ImageGeometry, Vocabulary
from cocoa_dist.data.shards import write_shards

GEOMETRY = ImageGeometry(patch_size=8)
NUM_RECORDS = 30
BATCH_SIZE = 12
BAD_RECORD = 5
TOKENIZER = ASSET_DIR / "tokenizer"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "caption": {"kind": "reconstruction", "text_mask_ratio": 0.3, "image_mask_ratio": 0.5},
    "bridged": {"kind": "reconstruction", "text_mask_ratio": 0.7},
    "language": {"kind": "next_token"},
    "pair": {"kind": "contrastive"},
    "interleaved": {"kind": "reconstruction", "text_mask_ratio": 0.3, "image_mask_ratio": 0.5},
    "dialogue": {"kind": "next_token"},
    "questions": {"kind": "next_token"},
}
CAPTION_VIEWS = sorted(OBJECTIVES.keys() - {"dialogue"})  # whose records have turns
RULES = {
    "bridged": "eos_bridged",
    "language": "causal",
    "dialogue": "compression",
    "questions": "compression",
}


def record(number: int, prefix: str = "a", *, broken: bool = False) -> Record:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    data = b"not a picture" if broken else file.getvalue()
    words = [f"word{number} {'and more ' * (number % 5)}", "small", "round"]
    return Record(
        key=f"{prefix}{number}",
        task="t",
        query=(text_part(f"thing {number}"),),
        positives=((image_part(0),),),
        target=(text_part(f"thing {number}: {', '.join(words)}"),),
        images=(data,),
        meta={"keywords": words},
    )


def write(path: Path, records: Sequence[Record]) -> Path:
    write_shards(records, path, info={}, records_per_batch=4, records_per_shard=16)
    return path


def config(
    sources: dict[str, Any], *, view: str = "caption", workers: int = 0, **changes: Any
) -> RunConfig:
    paths = {
        name: value if isinstance(value, dict) else {"path": str(value)}
        for name, value in sources.items()
    }
    stage = {
        "objective": OBJECTIVES[view],
        "attention": {"rule": RULES.get(view, "bidirectional")},
        "data": {"view": view, "sources": paths, "image_share": 0.5},
        "batch_size": BATCH_SIZE,
        "steps": 100,
        "optimizer": {"learning_rate": 1e-3},
    }
    image = {"augment_shift": 0.1, "augment_brightness": 0.1}
    data = {"num_workers": workers, "tokens_per_pack": 150, "image": image}
    tree = {
        "name": "test",
        "method": "test",
        "model": {"random": {}, "tokenizer": "asset:tokenizer"},
        "data": data | changes.pop("data", {}),
        "stages": {"s": stage | changes},
    }
    return parse_config(tree, source="test")


@contextmanager
def open_loader(
    run: RunConfig,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 1,
) -> Iterator[StageLoader]:
    loader = StageLoader(
        run,
        "s",
        vocabulary=vocabulary,
        geometry=GEOMETRY,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        folder=folder,
    )
    try:
        yield loader
    finally:
        loader.close()


def read(
    run: RunConfig,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    steps: int,
    world_size: int = 1,
    start_step: int = 1,
) -> list[list[StepBatch]]:
    """Return steps x ranks."""
    columns = []
    for rank in range(world_size):
        with open_loader(
            run, vocabulary, folder, rank=rank, world_size=world_size, start_step=start_step
        ) as loader:
            columns.append([loader.next_step() for _ in range(steps)])
    return [list(row) for row in zip(*columns, strict=True)]
