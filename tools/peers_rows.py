"""What tools/bench_peers.py trains on: one small Qwen2-VL, and rows of the shipped data.

Everything is written twice with the same content: as we read it, and as the peers do (a folder for
sentence-transformers and transformers, rows in the order in which our plan takes them).
"""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SETS = ("short", "mixed")
STAGE = "contrastive"
RECIPE = "quickstart_contrastive"
SEED = 11
SIDE = 28  # pixels that one visual token covers: patches of 14, merged 2 x 2
SHORT_SIDE = 2  # visual tokens, one side, of every picture of `short`
MOST_SIDE = 4  # of `mixed`: 1 to 16 visual tokens
TEXT_TOKENS = (3, 200)  # of `mixed`
MAX_TEXT_TOKENS = 256
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM, TEMPERATURE = 1e-4, 0.01, 1.0, 0.05
MODEL = {
    **{"hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 704, "vision_width": 128, "vision_layers": 4, "vision_heads": 4},
    "patch_size": 14,
}
# Without it ms-swift takes the tokenizer for a whole processor.
PROCESSOR = {
    **{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"},
    **{"patch_size": SIDE // 2, "merge_size": 2, "temporal_patch_size": 2},
    **{"min_pixels": SIDE**2, "max_pixels": (MOST_SIDE * SIDE) ** 2},
}
# Languages whose names are cut between words without breaking a letter in two.
_LANGUAGES = ("de", "fr", "es", "it", "pt", "nl", "da", "sv", "fi", "nb", "pl", "hu", "et", "ms")


class Row(NamedTuple):
    """A text and the encoded picture that belongs to it."""

    text: str
    image: bytes


def overrides(folder: Path, *, kind: str, batch: int) -> list[str]:
    """Return what makes of our recipe the training that the peers do."""
    stage = f"stages.{STAGE}"
    sizes = f"min_pixels: {SIDE**2}, max_pixels: {(MOST_SIDE * SIDE) ** 2}"
    steady = "schedule: constant, warmup_steps: 0, betas: [0.9, 0.999], eps: 1.0e-8"
    objective = (
        f"{{kind: contrastive, temperature: {TEMPERATURE}, symmetric: false, "
        "mask_false_negatives: false}"
    )
    return [
        f"model.path={folder / 'model'}",
        f"data.max_text_tokens={MAX_TEXT_TOKENS}",
        f"data.image={{{sizes}, augment_shift: 0, augment_brightness: 0}}",
        f"{stage}.data={{view: pair, keywords: all, sources: {{rows: {{path: {folder / kind}}}}}}}",
        f"{stage}.objective={objective}",
        f"{stage}.attention.rule=causal",
        f"{stage}.batch_size={batch}",
        f"{stage}.optimizer={{learning_rate: {LEARNING_RATE}, {steady}, "
        f"weight_decay: {WEIGHT_DECAY}, max_grad_norm: {MAX_GRAD_NORM}}}",
        "metrics.measure_every_steps=1000",
    ]


def lay_down(folder: Path, *, batches: list[int], most_rows: int) -> dict[str, Any]:
    """Write the model, the rows and their order; return what a reader of the table must know."""
    _write_model(folder)
    facts = {}
    for kind in SETS:
        rows = list(_rows(kind, most_rows))
        facts[kind] = _write_rows(folder, kind, rows)
        for batch in batches:
            order = _our_order(folder, kind=kind, batch=batch, count=len(rows))
            (folder / f"{kind}-{batch}.json").write_text(json.dumps(order))
    return facts


def rows_in_order(folder: Path, kind: str, batch: int) -> Iterator[Row]:
    """Yield the rows as our plan takes them: each batch has the same ones on both sides."""
    lines = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    data = (folder / f"{kind}.bin").read_bytes()
    for number in json.loads((folder / f"{kind}-{batch}.json").read_text()):
        start, size, text = lines[number]
        yield Row(text, data[start : start + size])


def _write_model(folder: Path) -> None:
    """Write one model of random weights for us, and its export for the peers."""
    from cocoa_dist.config import load_recipe, resolve_path
    from cocoa_dist.export import CardInfo, ImageSettings, export_folder
    from cocoa_dist.report.arms import export_tokenizer, self_test_vectors
    from cocoa_dist.train.evaluate import load_embedder

    random = ", ".join(f"{name}: {value}" for name, value in MODEL.items())
    settings = ["model.path=null", f"model.random={{{random}}}", "model.tokenizer=asset:tokenizer"]
    config = load_recipe(RECIPE, [*settings, f"stages.{STAGE}.attention.rule=causal"])
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    model = embedder.model.backbone
    model.save_pretrained(folder / "model")
    for path in resolve_path("asset:tokenizer").glob("tokenizer*"):
        shutil.copy(path, folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    card = {"name": "peers", "base": "random weights", "stages": [], "data": "none"}
    export_folder(
        model=model,
        tokenizer=export_tokenizer(config.model),
        destination=folder / "export",
        image_settings=ImageSettings(
            patch_size=SIDE // 2, min_pixels=SIDE**2, max_pixels=(MOST_SIDE * SIDE) ** 2
        ),
        bidirectional=False,
        pooling="last",
        prompts={},
        card=CardInfo(**card, licence="apache-2.0", compute="none"),
        self_test=self_test_vectors(embedder, []),
        max_text_tokens=MAX_TEXT_TOKENS,
    )


def _rows(kind: str, most: int) -> Iterator[Row]:
    """Yield rows of the shipped training data: every drawing of a record with its words."""
    from tokenizers import Tokenizer

    from cocoa_dist.config import resolve_path
    from cocoa_dist.data.shards import ShardReader

    tokenizer = Tokenizer.from_file(str(resolve_path("asset:tokenizer") / "tokenizer.json"))
    reader = ShardReader(Path(resolve_path("asset:emoji/train")))
    draw = np.random.default_rng(SEED)
    count = 0
    for number in range(len(reader)):
        record = reader.record(number)
        for side in record.positives:
            if count == most:
                return
            text, high, wide = record.target[0].text, SHORT_SIDE, SHORT_SIDE
            if kind == "mixed":
                wanted = round(float(np.exp(draw.uniform(*np.log(TEXT_TOKENS)))))
                text = _of_length(tokenizer, record, wanted)
                high, wide = draw.integers(1, MOST_SIDE, size=2, endpoint=True).tolist()
            yield Row(text, _resized(record.images[side[0].image], high=high, wide=wide))
            count += 1


def _of_length(tokenizer: Any, record: Any, wanted: int) -> str:
    """Return words about a record: at most `wanted` tokens, where words allow it."""
    names = record.meta.get("names", {})
    more = [names[language] for language in _LANGUAGES if language in names]
    words = ". ".join([record.target[0].text, *more, record.target[0].text, *more]).split()
    ends = np.cumsum([len(tokenizer.encode(f" {word}").ids) for word in words])
    least = int(np.searchsorted(ends, TEXT_TOKENS[0])) + 1
    return " ".join(words[: max(least, int(np.searchsorted(ends, wanted, side="right")))])


def _resized(image: bytes, *, high: int, wide: int) -> bytes:
    """Return a picture at the model's size, so that nobody has to resize it, as PNG."""
    from PIL import Image

    out = io.BytesIO()
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    picture.resize((wide * SIDE, high * SIDE), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def _write_rows(folder: Path, kind: str, rows: list[Row]) -> dict[str, Any]:
    """Write the rows as our shards, and plainly."""
    from cocoa_dist.config import resolve_path
    from cocoa_dist.data.records import Record, image_part, text_part
    from cocoa_dist.data.shards import write_shards
    from cocoa_dist.data.writing.tokens import TokenCounter

    records, texts, start = [], [], 0
    counter = TokenCounter(resolve_path("asset:tokenizer"))
    with (folder / f"{kind}.jsonl").open("w") as lines:
        for number, row in enumerate(rows):
            lines.write(json.dumps([start, len(row.image), row.text]) + "\n")
            start += len(row.image)
            records.append(
                Record(
                    key=f"{number:05d}",
                    task="rows",
                    query=(text_part(row.text),),
                    positives=((image_part(0),),),
                    images=(row.image,),
                )
            )
            texts.append(counter(row.text))
    (folder / f"{kind}.bin").write_bytes(b"".join(row.image for row in rows))
    options = {"count_tokens": counter, "tokenizer_sha256": counter.sha256}
    write_shards(records, folder / kind, info={}, **options)
    return {
        "rows": len(rows),
        "text_tokens": [min(texts), float(np.mean(texts)), max(texts)],
    }


def _our_order(folder: Path, *, kind: str, batch: int, count: int) -> list[int]:
    """Return the numbers of the rows in the order of our plan, whole batches of one pass."""
    from cocoa_dist.config import load_recipe
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.train.build import (
        image_geometry,
        load_backbone,
        load_vocabulary,
        special_token_ids,
    )

    config = load_recipe(RECIPE, overrides(folder, kind=kind, batch=batch))
    vocabulary = load_vocabulary(config.model)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=vocabulary.size,
        weights=False,
    )
    geometry = image_geometry(backbone)
    loader = StageLoader(
        config,
        STAGE,
        vocabulary=vocabulary,
        geometry=geometry,
        rank=0,
        world_size=1,
        start_step=1,
        folder=folder,
    )
    steps = range(1, count // batch + 1)
    order = [number for step in steps for number in loader.plan.step(step, 1).record_ids]
    loader.close()
    return order
