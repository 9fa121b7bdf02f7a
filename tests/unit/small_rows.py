"""Rows in MMEB's published format about pictures of noise, for the tests of evaluation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = "cat dog boat tree house moon star fish bird leaf".split()


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rotated(right: int, count: int) -> list[int]:
    return [(right + step) % count for step in range(count)]


def rows_of_texts(count: int = 10) -> list[dict]:
    """Pictures asked for their names."""
    return [
        {
            "qry_text": "<|image_1|>\nIdentify the object shown in the image\n",
            "qry_img_path": f"noise/{right}.png",
            "tgt_text": [WORDS[i] for i in rotated(right, count)],
            "tgt_img_path": [""] * count,
        }
        for right in range(count)
    ]


def rows_of_pictures(count: int = 10) -> list[dict]:
    """Candidates that share texts, and pictures with other texts: both are needed to tell them."""
    return [
        {
            "qry_text": f"Find: {WORDS[right]}\n",
            "qry_img_path": "",
            "tgt_text": [f"<|image_1|>\npart {i % 2}\n" for i in rotated(right, count)],
            "tgt_img_path": [f"noise/{i // 2}.png" for i in rotated(right, count)],
        }
        for right in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
