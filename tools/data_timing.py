#!/usr/bin/env python3
"""One arm of tools/bench_data.py in one process, which prints one line of JSON.

    python tools/data_timing.py ARM write FOLDER       from FOLDER/plain to the arm's own format
    python tools/data_timing.py ARM measure FOLDER     the figures of one round

What comes after reading is the same for all arms: `recipe`, with our sizes and our patches.
"""

import argparse
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from data_arms import ARMS, BATCH, LIBRARIES, OWN, Energon, Raw, without_torchvision  # noqa: E402

RANDOM_READS = 400
ENCODED = 160  # records of the way to the end
RECIPE_LIBRARIES = ("PIL.Image", "tokenizers", "cocoa_dist.data.packing")


def recipe(rows: Iterator[Raw], folder: Path) -> Iterator[int]:
    """Decode, resize, tokenise and pack; yield the tokens of each full pack.

    What a user writes after any reader: Pillow, a fast tokenizer, first come first packed.
    """
    import numpy as np
    from PIL import Image
    from tokenizers import Tokenizer

    from cocoa_dist.data.geometry import ImageGeometry
    from cocoa_dist.data.images import smart_size
    from cocoa_dist.data.packing import patchify

    settings = json.loads((folder / "settings.json").read_text())
    tokenizer = Tokenizer.from_file(settings["tokenizer"])
    geometry = ImageGeometry(patch_size=settings["patch_size"])
    limits = {"min_pixels": settings["min_pixels"], "max_pixels": settings["max_pixels"]}
    pack: list[tuple[list[int], Any]] = []
    total = 0
    for row in rows:
        picture = Image.open(io.BytesIO(row.image)).convert("RGB")
        size = smart_size(picture.height, picture.width, factor=geometry.factor, **limits)
        pixels = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
        patches = patchify(pixels[None], geometry=geometry)
        text = tokenizer.encode(row.text, add_special_tokens=False).ids
        ids = [0] * (len(patches) // geometry.merge**2 + 2) + text[: settings["max_text"]] + [1]
        if total + len(ids) > settings["tokens_per_pack"]:
            np.concatenate([part[0] for part in pack])
            np.concatenate([part[1] for part in pack])
            yield total
            pack, total = [], 0
        pack.append((ids, patches))
        total += len(ids)
    yield total


def stage_loader(folder: Path, *, start_step: int, limit: int | None = None) -> Any:
    """Open our own loader, in process, on the stage that bench_data.py has described."""
    from cocoa_dist.config import load_recipe
    from cocoa_dist.data.geometry import ImageGeometry
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.data.samples import Vocabulary

    settings = json.loads((folder / "settings.json").read_text())
    source = f"stages.{settings['stage']}.data.sources.emoji"
    limited = f"{source}.limit={'null' if limit is None else limit}"
    config = load_recipe(settings["recipe"], [*settings["overrides"], limited])
    return StageLoader(
        *(config, settings["stage"]),
        vocabulary=Vocabulary.load(Path(settings["tokenizer"]).parent, config.model),
        geometry=ImageGeometry(patch_size=settings["patch_size"]),
        rank=0,
        world_size=1,
        start_step=start_step,
        folder=Path(tempfile.mkdtemp(dir=folder)),
    )


def own_memory() -> float:
    """Return the memory of this process that no file backs, in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def rate(rows: Iterator[Raw]) -> tuple[float, int]:
    """Return records a CPU second, and the bytes of pictures, so that all must have been read."""
    began, count, size = time.process_time(), 0, 0
    for row in rows:
        count, size = count + 1, size + len(row.image) + len(row.text)
    return count / (time.process_time() - began), size


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return the figures of one round."""
    before = own_memory()
    arm = ARMS[name](folder)
    found: dict[str, Any] = {}
    rate(arm.sequential())  # what is done once: files into the page cache, late imports
    arm = ARMS[name](folder)
    found["sequential"], size = rate(arm.sequential())
    found["bytes"] = size
    arm = ARMS[name](folder)  # another one: no record is found in a cache of the first pass
    found["shuffled"], again = rate(arm.shuffled())
    assert again == size, f"{name}: {again} bytes in shuffled order, {size} in sequence"
    found["memory"] = own_memory() - before
    count = json.loads((folder / "settings.json").read_text())["records"]
    if arm.random is not None:
        draw = random.Random(os.getpid())
        numbers = [draw.randrange(count) for _ in range(min(RANDOM_READS, count))]
        found["random"], _ = rate(map(ARMS[name](folder).random, numbers))
    return found | whole_way(name, folder, count)


def whole_way(name: str, folder: Path, count: int) -> dict[str, Any]:
    """Return times to a first encoded batch, and tokens and records a CPU second to the end."""
    middle = count // 2 // BATCH * BATCH
    if name == "energon":
        Energon(folder).save_state(middle)
    found = {
        key: until_first_batch(name, folder, at) for key, at in (("first", 0), ("resume", middle))
    }
    records = min(count, ENCODED) // BATCH * BATCH  # the same ones for all arms
    began = time.process_time()
    tokens = sum(recipe(islice(ARMS[name](folder).sequential(), records), folder))
    spent = time.process_time() - began
    found |= {"plain_tokens": tokens / spent, "plain_records": records / spent}
    if name in OWN:
        loader = stage_loader(folder, start_step=1, limit=records)
        began = time.process_time()
        tokens = sum(loader.next_step().num_tokens for _ in range(records // BATCH))
        spent = time.process_time() - began
        found |= {"tokens": tokens / spent, "records": records / spent}
        loader.close()
    return found


def until_first_batch(name: str, folder: Path, start: int) -> float:
    """Return wall seconds to BATCH encoded records from `start` of a shuffled pass."""
    began = time.perf_counter()
    if name in OWN:
        loader = stage_loader(folder, start_step=1 + start // BATCH)
        loader.next_step()
        loader.close()
    else:
        rows = ARMS[name](folder).shuffled(start)
        sum(recipe(islice(rows, BATCH), folder))
    return time.perf_counter() - began


def main() -> int:
    """Run one arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("action", choices=("write", "measure"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.arm == "mds":
        without_torchvision()
    for library in (LIBRARIES[arguments.arm], *RECIPE_LIBRARIES):
        __import__(library)
    if arguments.action == "write":
        ARMS[arguments.arm].write(arguments.folder)  # type: ignore[attr-defined]
        return 0
    print(json.dumps(measure(arguments.arm, arguments.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
