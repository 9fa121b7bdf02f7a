#!/usr/bin/env python3
"""Recompute the retrieval figures of a report from the exported folder alone.

    python tools/recheck_retrieval.py runs/quickstart

Reads the held-out sets as the Arrow files they are, embeds them with plain sentence-transformers,
and ranks with numpy: nothing of cocoa_dist is imported. Figures are equal to those of
report/retrieval.json to the fourth digit, or the exit code is 1. Texts are cut where training cut
them, and pictures are brought to the model's size by torch, as in training; what Pillow, the
folder's own resizing, gives instead is printed beside it.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

ASSETS = Path(__file__).resolve().parent.parent / "cocoa_dist" / "assets"


def read_set(folder: Path, limit: int | None) -> tuple[list[str], list[Image.Image]]:
    """Return the texts and the first pictures of a data set, row by row."""
    shards = [pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("shard-*.arrow"))]
    rows = pa.concat_tables(shards).slice(0, limit or None).to_pylist()
    sides = [[part["text"] for part in row["target"] or row["query"]] for row in rows]
    return [" ".join(side) for side in sides], [
        Image.open(io.BytesIO(row["images"][0])).convert("RGB") for row in rows
    ]


def as_in_training(picture: Image.Image, folder: Path) -> Image.Image:
    """Resize a picture by torch to the size that the folder's image processor asks for."""
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    height, width = smart_resize(
        picture.height,
        picture.width,
        factor=settings["patch_size"] * settings["merge_size"],
        min_pixels=settings["size"]["shortest_edge"],
        max_pixels=settings["size"]["longest_edge"],
    )
    if (width, height) == picture.size:
        return picture
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        pixels, size=(height, width), mode="bicubic", antialias=True
    )
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())


def recall(queries_ND: np.ndarray, answers_ND: np.ndarray, *, top: int) -> float:
    """Return the share (per cent) of queries whose answer is among the best, ties in half."""
    scores_NN = queries_ND @ answers_ND.T
    right_N1 = np.diagonal(scores_NN)[:, None]
    above_N, tied_N = (scores_NN > right_N1).sum(1), (scores_NN == right_N1).sum(1)
    return float(100 * np.clip((top - above_N) / tied_N, 0, 1).mean())


def longest_text(recipe: dict) -> int:
    """Return how many tokens training kept of a text, with those that end it."""
    model = recipe["model"]
    ends = model.get("compression_tokens") or model.get("num_bridge_tokens") or 1
    return int(recipe["data"]["max_text_tokens"]) + int(ends)


def figures(
    model: SentenceTransformer, texts: list[str], pictures: list[Image.Image], *, longest: int
) -> dict:
    """Return recall both ways, as in retrieval.json."""
    limit = {"text": {"max_length": longest}}
    text_ND = model.encode([{"text": text} for text in texts], processing_kwargs=limit)
    image_ND = model.encode([{"image": picture} for picture in pictures])
    ways = {"t2i": (text_ND, image_ND), "i2t": (image_ND, text_ND)}
    return {
        way: {f"r{top}": recall(*sides, top=top) for top in (1, 5, 10)}
        for way, sides in ways.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; returns 1 if one is not the report's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run with its report")
    options = parser.parse_args(arguments)
    recipe = yaml.safe_load((options.run / "resolved.yaml").read_text())
    report = json.loads((options.run / "report" / "retrieval.json").read_text())
    folder = options.run / "export" / recipe["name"]
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    equal, longest = True, longest_text(recipe)
    for name, source in recipe["evaluation"]["sets"].items():
        path = ASSETS / source["path"].removeprefix("asset:")
        path = path if source["path"].startswith("asset:") else Path(source["path"])
        texts, pictures = read_set(path, source.get("limit"))
        stated = report["arms"][recipe["method"]]["splits"][name]
        by_torch = [as_in_training(picture, folder) for picture in pictures]
        found = figures(model, texts, by_torch, longest=longest)
        by_pillow = figures(model, texts, pictures, longest=longest)
        print(f"{name}, {len(texts)} pairs: report / from the folder / with Pillow's resizing, %")
        for way, cuts in found.items():
            for cut, value in cuts.items():
                same = round(value, 4) == round(stated[way][cut], 4)
                equal = equal and same
                line = f"{stated[way][cut]:8.2f} {value:8.2f} {by_pillow[way][cut]:8.2f}"
                print(f"  {way} {cut:<4}{line}  {'' if same else 'DIFFERENT'}")
    assert "cocoa_dist" not in sys.modules, "something has imported cocoa_dist"
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
