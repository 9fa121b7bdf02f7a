"""Sources whose rows are made on the fly, to try builders with, and small pictures."""

import io
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cocoa_dist.config import ASSET_DIR
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.writing.build import BuildOptions, BuildReport, build_dataset
from cocoa_dist.data.writing.source import Rejected

TOKENIZER = ASSET_DIR / "tokenizer"
NUM_ROWS = 90
INFO = {"name": "test", "source": "here", "licence": "CC0-1.0"}
SMALL = {"records_per_batch": 4, "records_per_shard": 16}


def png(number: int = 0, height: int = 3, width: int = 5) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def make_record(number: int, key: str = "") -> Record:
    return Record(
        key=key or f"k{number}",
        task="t",
        query=(text_part(f"thing number {number}"),),
        positives=((image_part(0),),),
        images=(png(number, height=2 + number % 5),),
        meta={"licence": "CC0-1.0" if number % 2 else "MIT"},
    )


@dataclass(frozen=True)
class ListSource:
    """Rows made on the fly; `keys` gives some of them another key, `bad` rejects some."""

    count: int = NUM_ROWS
    keys: dict[int, str] = field(default_factory=dict)
    bad: tuple[int, ...] = (3, 40, 41)
    pause: float = 0.0  # seconds a row
    dies_at: int = -1
    damaged_at: int = -1
    seen: Path | None = None  # receives the number of every row that is read

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, stop: int) -> Iterator[Record | Rejected]:
        for number in range(start, stop):
            time.sleep(self.pause)
            if self.seen:
                with self.seen.open("a") as file:
                    file.write(f"{number}\n")
            if number == self.dies_at and multiprocessing.parent_process():
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self.damaged_at:
                raise ValueError("b.parquet is not a whole Parquet file")
            if number in self.bad:
                yield Rejected(self.where(number), "text is empty: column 'text'")
            else:
                yield make_record(number, self.keys.get(number, ""))

    def where(self, number: int) -> str:
        return f"list row {number}"

    @property
    def stamp(self) -> list[Any]:
        return [self.count, sorted(self.keys.items()), list(self.bad)]


def run(source: ListSource, path: Path, **changes: Any) -> BuildReport:
    options = {**SMALL, "tokenizer": TOKENIZER, **changes}
    return build_dataset(source, path, info=INFO, options=BuildOptions(**options))
