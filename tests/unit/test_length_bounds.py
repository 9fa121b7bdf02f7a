"""No sample is larger than the plan believes, by the record or by the index, whatever it holds."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cocoa_dist.config import ASSET_DIR, DataConfig, ImageConfig, ModelConfig, RandomModelConfig
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.packing import length_bound
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.samples import Vocabulary, draw_for, view_samples, view_settings
from cocoa_dist.data.writing.shard_file import count_text_tokens, indexed_sizes

GEOMETRY = ImageGeometry(patch_size=8)  # a visual token is 16 x 16 pixels


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (side, 9, 9)).save(file, "PNG")
    return file.getvalue()


def record(query: tuple[Any, ...], images: tuple[bytes, ...], **fields: Any) -> Record:
    return Record("key", "task", query, images=images, **fields)


ONE, SHARED, NAME = picture(32), picture(96), text_part("a cat")
KEYWORDS = {"keywords": ["animal", "pet", "four legs", "a long tail"]}
RECORDS = {
    "query and negative share a picture": record(
        (image_part(0), text_part("make it blue")),
        (SHARED,),
        positives=((image_part(0), text_part("a blue one")),),
        negatives=((image_part(0), text_part("a red one")),),
    ),
    "a document repeats a picture": record((image_part(0), NAME, image_part(0)), (SHARED,)),
    "one positive has most tokens, another most patches": record(
        (NAME,),
        (SHARED, *[ONE] * 8),
        positives=((image_part(0),), tuple(image_part(i) for i in range(1, 9))),
    ),
    "keywords that no side lists": record(
        (NAME,), (ONE,), positives=((image_part(0),),), meta=KEYWORDS
    ),
    "keywords beside another target": record(
        (image_part(0), NAME), (ONE,), target=(text_part("something else"),), meta=KEYWORDS
    ),
    "a query in pieces": record(
        tuple(text_part(word) for word in ("cat", "dog", "xyz", "octopus", "zebra", "qq")),
        (ONE,),
        positives=((image_part(0),),),
    ),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    model = ModelConfig(random=RandomModelConfig(), tokenizer="x")
    return Vocabulary.load(ASSET_DIR / "tokenizer", model)


@pytest.mark.parametrize("with_record", [True, False], ids=["by the record", "by the index"])
@pytest.mark.parametrize("name", RECORDS)
def test_no_sample_is_larger_than_its_bound(name, with_record, vocabulary) -> None:
    one = RECORDS[name]
    view = "pair" if one.positives else "interleaved" if not one.target else "caption"
    data = DataConfig(image=ImageConfig(min_pixels=256, max_pixels=96 * 96))
    settings = replace(view_settings(data, geometry=GEOMETRY), negatives=len(one.negatives))
    bound = length_bound(
        view,
        num_text_tokens=count_text_tokens(one, count_tokens=lambda t: len(vocabulary.encode(t))),
        image_sizes=indexed_sizes(one),
        record=one if with_record else None,
        vocabulary=vocabulary,
        settings=settings,
    )
    most = np.zeros(2, dtype=np.int64)
    for passes in range(30):
        draw = draw_for(0, "stage", passes, 0)
        made = view_samples(view, one, draw=draw, vocabulary=vocabulary, settings=settings)
        assert made.reason is None
        images = [image for sample in made.samples for image in sample.images]
        tokens = sum(len(sample.input_ids) for sample in made.samples)
        patches = sum(4 * GEOMETRY.num_tokens(*image.shape[:2]) for image in images)
        most = np.maximum(most, [tokens, patches])
    assert (most <= bound).all(), f"samples of {most}, believed to be at most {bound}"
