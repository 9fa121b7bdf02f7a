#!/usr/bin/env python3
"""What evaluation costs beside the bare forward passes of the same packs, all in one process.

    python tools/bench_evaluation.py quickstart --out benchmarks/evaluation_cpu

Arms take turns; a figure is the median of the rounds, in CPU milliseconds for 1,000 tokens (those
of the trainer's packs for every arm), its spread is the quartiles'. A share is the median of the
rounds' own ratios. Twice: with the recipe's model before training, and with a larger random one.

    forward   training's forward passes: gradients on, packs and plans made beforehand
    trainer   what runs while a stage trains, and in reports: decode, sample, pack, plan, forward
    folder    tools/evaluate_mmeb.py on the exported folder: decode, sentence-transformers, checks
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402

from cocoa_dist.config import RunConfig, load_recipe  # noqa: E402
from cocoa_dist.data.records import Record  # noqa: E402
from cocoa_dist.evaluation.embed import batches  # noqa: E402
from cocoa_dist.evaluation.encoder import Encoder, Job  # noqa: E402
from cocoa_dist.export import CardInfo, ImageSettings, export_folder  # noqa: E402
from cocoa_dist.manifest import write_atomic  # noqa: E402
from cocoa_dist.report.arms import export_tokenizer, self_test_vectors  # noqa: E402
from cocoa_dist.train.evaluate import (  # noqa: E402
    Embedder,
    Item,
    embedding_pack,
    load_embedder,
    picture_item,
    read_records,
    text_item,
)

TARGET = 0.95
FOLDER_BATCH = 32  # as tools/evaluate_mmeb.py has it
LARGER = (
    "model.path=null",
    "model.tokenizer=asset:tokenizer",
    "model.random={hidden_size: 384, num_layers: 4, num_heads: 8, intermediate_size: 1024, "
    "vision_width: 192}",
)
LARGER_RECORDS = 4  # of it one in so many is embedded


def export_base(config: RunConfig, embedder: Embedder, destination: Path) -> None:
    """Export the model of an embedder, for the arm that evaluates folders."""
    geometry, image = embedder.geometry, config.data.image
    export_folder(
        model=embedder.model.backbone,
        tokenizer=export_tokenizer(config.model),
        destination=destination,
        image_settings=ImageSettings(
            patch_size=geometry.patch_size,
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
            merge_size=geometry.merge,
            temporal_patch_size=geometry.temporal,
        ),
        bidirectional=True,
        pooling=embedder.stage.pooling,
        prompts={},
        card=CardInfo(name="bench", base="", stages=[], data="", licence="", compute="", scores=[]),
        self_test=self_test_vectors(embedder, []),
        max_text_tokens=config.data.max_text_tokens,
        verify=False,
    )


def arms_of(
    embedder: Embedder,
    encoder: Encoder,
    records: Sequence[Record],
    item: Callable[[Record], Item],
    jobs: Sequence[Job],
) -> tuple[dict[str, Callable[[], object]], int]:
    """Return what each arm does with one side of the records, and the tokens of the packs."""
    samples = [embedder.sample(item(record)) for record in records]
    size = embedder.batch_size
    packs = [
        embedding_pack(
            samples[begin : begin + size],
            stage=embedder.stage,
            geometry=embedder.geometry,
            vocabulary=embedder.vocabulary,
        )
        for begin in range(0, len(samples), size)
    ]

    def forward() -> None:
        embedder.model.train()
        for pack in packs:
            embedder.model(pack)
        embedder.model.eval()

    def trainer() -> None:
        embedder.embed([item(record) for record in records])

    def folder() -> None:
        for batch in batches(jobs, [0] * len(jobs), batch_size=FOLDER_BATCH):
            encoder.encode(batch)

    found = {"forward": forward, "trainer": trainer, "folder": folder}
    return found, sum(pack.num_tokens for pack in packs)


def measure(arms: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each arm in each round, after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        order = list(arms) if number % 2 else list(arms)[::-1]
        for name in order:
            begin = time.process_time()
            arms[name]()
            if number:
                found[name].append(time.process_time() - begin)
    return found


def summary(seconds: dict[str, list[float]], *, tokens: int) -> dict[str, dict[str, float]]:
    """Return milliseconds for 1,000 tokens with quartiles, and the share of the forward's rate."""
    found = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles([1e6 * value / tokens for value in values], n=4)
        shares = [base / own for base, own in zip(seconds["forward"], values, strict=True)]
        found[name] = {"ms": middle, "low": low, "high": high, "share": statistics.median(shares)}
    return found


def page(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "# Evaluation beside the bare forward pass",
        "",
        f"`{found['command']}`: held-out records of {found['sets']}, float32, one thread, "
        f"{found['rounds']} rounds in turn;",
        f"torch {found['torch']}, sentence-transformers {found['sentence_transformers']}, "
        f"{found['machine']}. What the arms are: the tool's first lines.",
        "",
        "| model | side | arm | CPU ms for 1,000 tokens (quartiles) | of the forward's rate |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for model in found["models"]:
        size = f"{model['parameters'] / 1e6:.1f} M"
        for side, one in model["sides"].items():
            for arm, row in one["arms"].items():
                cost = f"{row['ms']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
                cells = [size, f"{side}, {one['tokens']} tokens", arm, cost, f"{row['share']:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def passed(found: dict[str, Any]) -> bool:
    """Say whether the trainer's evaluation has the target on every side of every model."""
    sides = [side for model in found["models"] for side in model["sides"].values()]
    return all(side["arms"]["trainer"]["share"] >= TARGET for side in sides)


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both models, with held-out records of the recipe."""
    torch.set_num_threads(1)
    config = load_recipe(options.recipe, options.overrides)
    larger = load_recipe(options.recipe, [*options.overrides, *LARGER])
    few = max(options.records // LARGER_RECORDS, 1)
    return {
        "command": " ".join(["tools/bench_evaluation.py", options.recipe, *options.overrides]),
        "sets": ", ".join(config.evaluation.sets),
        "rounds": options.rounds,
        "torch": torch.__version__,
        "sentence_transformers": version("sentence-transformers"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "models": [
            bench_model(config, folder / "own", count=options.records, rounds=options.rounds),
            bench_model(larger, folder / "larger", count=few, rounds=options.rounds),
        ],
    }


def bench_model(config: RunConfig, folder: Path, *, count: int, rounds: int) -> dict[str, Any]:
    """Measure both sides of held-out records with a recipe's model before training."""
    folder.mkdir()
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    records = [r for source in config.evaluation.sets.values() for r in read_records(source)]
    records = records[:count]
    export_base(config, embedder, folder / "model")
    encoder = Encoder(folder / "model", device="cpu")
    files = [folder / f"{number}.image" for number in range(len(records))]
    for file, record in zip(files, records, strict=True):
        file.write_bytes(record.images[0])
    keys = [number.to_bytes(4, "big") for number in range(len(records))]
    items: dict[str, Callable[[Record], Item]] = {
        "texts": text_item,
        "pictures": lambda record: picture_item(record, embedder.settings),
    }
    jobs = {
        "texts": [
            Job(key, text_item(record).text or "", None, "")
            for key, record in zip(keys, records, strict=True)
        ],
        "pictures": [Job(key, "", file, "") for key, file in zip(keys, files, strict=True)],
    }
    sides = {}
    for side, item in items.items():
        arms, tokens = arms_of(embedder, encoder, records, item, jobs[side])
        seconds = measure(arms, rounds=rounds)
        sides[side] = {"tokens": tokens, "arms": summary(seconds, tokens=tokens)}
    parameters = sum(p.numel() for p in embedder.model.parameters())
    return {"records": len(records), "parameters": parameters, "sides": sides}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code (1: slower than the target)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value")
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.md and PATH.json")
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = bench(options, Path(folder))
    print(page(found))
    if options.out is not None:
        write_atomic(options.out.with_suffix(".md"), page(found).encode())
        text = json.dumps(found, indent=1) + "\n"
        write_atomic(options.out.with_suffix(".json"), text.encode())
    return 0 if passed(found) else 1


if __name__ == "__main__":
    sys.exit(main())
