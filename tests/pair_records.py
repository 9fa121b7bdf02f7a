"""Made records of pairs with hard negatives, for tests of data and of training alike."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocoa_dist.data.negatives import NEGATIVE_IDENTITIES, SCORES
from cocoa_dist.data.records import Record, Side, image_part, text_part
from cocoa_dist.data.shards import write_shards


def picture(number: int, side: int = 32) -> bytes:
    file = io.BytesIO()
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse.repeat(side // 4, 0).repeat(side // 4, 1)).save(file, "PNG")
    return file.getvalue()


def pair_record(
    number: int,
    *,
    shown: int | None = None,
    negatives: Sequence[int | str] = (),
    identities: Sequence[str] | None = None,
    scores: bool = False,
    identity: str = "",
) -> Record:
    """A name, its picture, and negatives: pictures by number, or texts.

    `shown`: the picture, where two records share one.
    """
    images = [picture(number if shown is None else shown)]
    sides: list[Side] = []
    for one in negatives:
        if isinstance(one, str):
            sides.append((text_part(one),))
        else:
            images.append(picture(one))
            sides.append((image_part(len(images) - 1),))
    meta: dict[str, Any] = {}
    if identities is not None:
        meta[NEGATIVE_IDENTITIES] = list(identities)
    if scores:
        drawn = np.random.default_rng(number).uniform(0.0, 1.0, len(sides) + 1).tolist()
        meta[SCORES] = {"positives": drawn[:1], "negatives": drawn[1:]}
    return Record(
        key=f"pair{number}",
        task="t",
        query=(text_part(f"thing number {number}"),),
        positives=((image_part(0),),),
        negatives=tuple(sides),
        images=tuple(images),
        identity=identity,
        meta=meta,
    )


def hard_records(count: int) -> list[Record]:
    """Pairs of all kinds: shared pictures, absent negatives, negatives that others look for."""
    made = []
    for n in range(count):
        kinds: dict[str, Any] = {
            # pictures of other pairs: false negatives of those, by content
            "negatives": [(n + 1) % count, f"another thing {n}", 1000 + n][: n % 4],
            "scores": n % 3 != 2,
        }
        if n % 5 == 4:
            kinds["shown"] = n - 2  # the same picture as another pair, on another rank or not
            kinds["negatives"] = [2000 + n, f"more words {n}"]
        made.append(pair_record(n, **kinds))
    return made


def write_pairs(path: Path, records: Sequence[Record]) -> Path:
    write_shards(records, path, info={}, records_per_batch=4, records_per_shard=16)
    return path
