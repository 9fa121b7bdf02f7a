#!/usr/bin/env python3
"""What planning costs on a data set of many records: time to start, time a step, memory a process.

    python tools/bench_plan.py --records 100_000_000 --ranks 64
    python tools/bench_plan.py --records 1_000_000 --ranks 8 --batch-size 1024

Makes a data set whose index is real and whose shards are empty files of the right size (36 bytes a
record on disk, in --folder), opens it as a rank does, and plans steps for all ranks. Each part runs
in a process of its own. Times are CPU seconds. A second data set, of --first-batch-records, can be
read (first_batch.py): the wall time until a rank has 32 records of it decoded and packed. The table
goes to benchmarks/plan_cpu.{md,json}.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "benchmarks"
STAGE = "contrastive"
RECORDS_PER_BATCH, RECORDS_PER_SHARD = 64, 102_400
TARGETS = {
    "first_batch_seconds": 3.0,
    "first_batch_new_seconds": 3.0,
    "start_seconds": 2.0,
    "step_milliseconds": 60.0,
    "private_megabytes": 400.0,
    "tokens_over_mean": 1.02,
}


def main() -> int:
    """Make the data set, run the parts, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8192, help="records a step, all ranks")
    parser.add_argument("--tokens-per-pack", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=30, help="steps that are planned")
    parser.add_argument("--first-batch-records", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="first batches, lengths on disk")
    parser.add_argument("--folder", type=Path, help="where the index goes (default: temporary)")
    parser.add_argument("--out", type=Path, default=OUT / "plan_cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if arguments.worker:
        print(json.dumps(open_and_plan(arguments, Path(arguments.worker))))
        return 0
    if arguments.reader:
        from first_batch import until_first_batch

        print(json.dumps(until_first_batch(Path(arguments.reader))))
        return 0
    read = first_batches(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_data_set(Path(folder) / "data", count=arguments.records)
        first, again = (in_process(Path(folder), "--worker") for _ in range(2))
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[2]:.0f}",
        "arguments": {
            name: getattr(arguments, name)
            for name in (
                *("records", "ranks", "ranks_per_node", "batch_size", "tokens_per_pack"),
                "first_batch_records",
            )
        },
        **read,
        "lengths_seconds": first["start_seconds"] - again["start_seconds"],
        **again,
    }
    text = table(result)
    print(text)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    return 0


def first_batches(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the way to a first batch, where no lengths are on disk yet and where they are."""
    from first_batch import make_readable_data_set

    if not arguments.first_batch_records:
        return {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_readable_data_set(Path(folder) / "data", count=arguments.first_batch_records)
        new, *again = (in_process(Path(folder), "--reader") for _ in range(1 + arguments.repeats))
    return {
        "first_batch_new_seconds": new["first_batch_seconds"],
        "first_batch_new_cpu_seconds": new["first_batch_cpu_seconds"],
        **{
            name: statistics.median(found[name] for found in again)
            for name in ("first_batch_seconds", "first_batch_cpu_seconds")
        },
    }


def in_process(folder: Path, part: str) -> dict[str, Any]:
    """Measure one part, plan or read, in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], part, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_data_set(folder: Path, *, count: int) -> None:
    """Write manifest and index of `count` records with a picture and a text each."""
    import numpy as np
    import pyarrow as pa

    from cocoa_dist.data.shard_format import (
        BATCH_INDEX,
        BATCH_INDEX_SCHEMA,
        ENERGON_FOLDER,
        RECORD_INDEX,
        RECORD_INDEX_SCHEMA,
        shard_name,
    )

    (folder / "index").mkdir(parents=True)
    random = np.random.default_rng(0)
    shards = -(-count // RECORDS_PER_SHARD)
    with pa.ipc.new_file(folder / RECORD_INDEX, RECORD_INDEX_SCHEMA) as writer:
        for shard in range(shards):
            writer.write_table(_index_rows(shard, count=count, random=random))
    batches = -(-count // RECORDS_PER_BATCH)
    number = np.arange(batches)
    per_shard = RECORDS_PER_SHARD // RECORDS_PER_BATCH
    size = 4096
    columns = [
        pa.array((number // per_shard).astype(np.int32)),
        pa.array(np.minimum(count - number * RECORDS_PER_BATCH, RECORDS_PER_BATCH).astype("i4")),
        pa.array(number % per_shard * size),
        *([pa.array(np.full(batches, size))] * (len(BATCH_INDEX_SCHEMA) - 4)),
        pa.array(np.zeros(batches, dtype=np.uint32)),
    ]
    with pa.ipc.new_file(folder / BATCH_INDEX, BATCH_INDEX_SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=BATCH_INDEX_SCHEMA))
    for shard in range(shards):
        (folder / shard_name(shard)).touch()
        os.truncate(folder / shard_name(shard), per_shard * size)
    _write_energon(folder / ENERGON_FOLDER)
    _write_manifest(folder, count=count, batches=batches, shards=shards)


def _index_rows(shard: int, *, count: int, random: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    from cocoa_dist.data.shard_format import RECORD_INDEX_SCHEMA

    begin = shard * RECORDS_PER_SHARD
    rows = np.arange(begin, min(begin + RECORDS_PER_SHARD, count))
    one = pa.array(np.arange(len(rows) + 1, dtype=np.int32))
    sizes = [random.choice([336, 448, 512, 640, 768, 1024], len(rows)) for _ in range(2)]
    lists = [pa.ListArray.from_arrays(one, pa.array(side.astype(np.int32))) for side in sizes]
    text = np.clip(random.lognormal(4.0, 0.8, len(rows)), 3, 2000).astype(np.int32)
    columns = [
        pa.array(np.full(len(rows), shard, dtype=np.int32)),
        pa.array((rows // RECORDS_PER_BATCH).astype(np.int32)),
        pa.array((rows % RECORDS_PER_BATCH).astype(np.int32)),
        pa.array(rows.astype(np.uint32)),
        pa.array(text),
        *lists,
    ]
    return pa.table(columns, schema=RECORD_INDEX_SCHEMA)


def _write_energon(folder: Path) -> None:
    """Copy the files energon looks for from the shipped data set; they name a class, no data."""
    import shutil

    from cocoa_dist.config import resolve_path
    from cocoa_dist.data.shard_format import ENERGON_FILES

    folder.mkdir()
    for name in ENERGON_FILES:
        shutil.copy(resolve_path("asset:emoji/train") / folder.name / name, folder / name)


def _write_manifest(folder: Path, *, count: int, batches: int, shards: int) -> None:
    from cocoa_dist.data.shard_format import MANIFEST_NAME, SCHEMA_VERSION

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content = {
        "schema_version": SCHEMA_VERSION,
        "count": count,
        "num_batches": batches,
        "num_shards": shards,
        "records_per_batch": RECORDS_PER_BATCH,
        "records_per_shard": RECORDS_PER_SHARD,
        "bytes": sum(path.stat().st_size for path in files),
        "tokenizer_sha256": _tokenizer_sha256(),
        "fingerprint": _fingerprint(count),
        "info": {"source": "made by tools/bench_plan.py"},
        "files": [
            {"path": str(p.relative_to(folder)), "bytes": p.stat().st_size, "sha256": "0" * 64}
            for p in files
        ],
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def _fingerprint(count: int) -> str:
    """Return the digest over the checksums of all records, which are their numbers here."""
    import numpy as np

    digest = hashlib.sha256()
    for begin in range(0, count, RECORDS_PER_SHARD):
        numbers = np.arange(begin, min(begin + RECORDS_PER_SHARD, count))
        digest.update(numbers.astype("<u4").tobytes())
    return digest.hexdigest()


def _tokenizer_sha256() -> str:
    from cocoa_dist.config import load_recipe
    from cocoa_dist.train.build import load_vocabulary

    return load_vocabulary(load_recipe("debug").model).sha256


def open_and_plan(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do what a rank does before its first batch, then plan steps for all ranks."""
    from cocoa_dist.config import load_recipe
    from cocoa_dist.data.geometry import ImageGeometry
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.train.build import load_vocabulary

    config = load_recipe(
        "debug",
        [
            f"stages.{STAGE}.data.sources.emoji.path={folder / 'data'}",
            f"stages.{STAGE}.data.sources.emoji.limit=null",
            f"stages.{STAGE}.batch_size={arguments.batch_size}",
            f"data.tokens_per_pack={arguments.tokens_per_pack}",
            "data.max_text_tokens=512",
            "data.image.max_pixels=602112",
        ],
    )
    vocabulary = load_vocabulary(config.model)
    before, began = memory(), time.process_time()
    loader = StageLoader(
        config,
        STAGE,
        vocabulary=vocabulary,
        geometry=ImageGeometry(patch_size=14),
        rank=0,
        world_size=arguments.ranks,
        start_step=1,
        folder=folder / "run",
        num_nodes=max(1, arguments.ranks // arguments.ranks_per_node),
    )
    started = time.process_time() - began
    measured = plan_steps(loader.plan, arguments)
    after = memory()
    return {
        "start_seconds": started,
        "private_megabytes": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "mapped_megabytes": (after["RssFile"] - before["RssFile"]) / 1e6,
        **measured,
    }


def plan_steps(plan: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan steps at random places; how long each takes, and how even the ranks' work is."""
    import numpy as np

    source = plan.sources[0]
    nodes = max(1, arguments.ranks // arguments.ranks_per_node)
    places = np.random.default_rng(0).integers(1, 100_000, arguments.steps)
    seconds, tokens, patches = [], [], []
    for step in places.tolist():
        began = time.process_time()
        ranks = plan.step(step, arguments.ranks, num_nodes=nodes).ranks
        seconds.append(time.process_time() - began)
        records = [[slot.record for pack in packs for slot in pack] for packs in ranks]
        of_rank = np.array([source.tokens[numbers].sum() for numbers in records])
        tokens.append(of_rank.max() / of_rank.mean())
        of_unit = np.array([source.patches[numbers].sum() for numbers in records])
        patches.append(of_unit.max() / of_unit.mean())
    return {
        "step_milliseconds": 1e3 * statistics.median(seconds),
        "step_milliseconds_worst": 1e3 * max(seconds),
        "tokens_over_mean": max(tokens),
        "patches_over_mean": max(patches),
        "packs_a_rank": len(ranks[0]),
        "fills": [
            fill_of(plan, places=places[:8].tolist(), num_ranks=num_ranks, budget=budget)
            for num_ranks in sorted({max(1, plan.batch_size // 1024), arguments.ranks})
            for budget in (plan.tokens_per_pack, 2 * plan.tokens_per_pack)
        ],
        "blocks_a_window": blocks_of_a_window(plan),
        "state_bytes": len(json.dumps(plan.state(1000))),
    }


def fill_of(plan: Any, *, places: list[int], num_ranks: int, budget: int) -> dict[str, float]:
    """How full packs of a budget are, and how full whole packs can be: medians over steps.

    All ranks have as many packs as the neediest: of 5.2 packs' worth of tokens 6 are made.
    """
    import math
    from dataclasses import replace

    factor = budget / plan.tokens_per_pack
    plan = replace(
        plan, tokens_per_pack=budget, patches_per_pack=round(factor * plan.patches_per_pack)
    )
    source, fill, bound, packs = plan.sources[0], [], [], []
    for step in places:
        ranks = plan.step(step, num_ranks).ranks
        records = [[slot.record for pack in one for slot in pack] for one in ranks]
        tokens = [int(source.tokens[numbers].sum()) for numbers in records]
        patches = [int(source.patches[numbers].sum()) for numbers in records]
        need = max(max(tokens) / budget, max(patches) / plan.patches_per_pack)
        packs.append(len(ranks[0]))
        fill.append(sum(tokens) / (num_ranks * packs[-1] * budget))
        bound.append(sum(tokens) / (num_ranks * math.ceil(need) * budget))
    return {
        "records_a_rank": plan.batch_size // num_ranks,
        "budget": budget,
        "packs": statistics.median(packs),
        "fill": statistics.median(fill),
        "whole_packs_allow": statistics.median(bound),
    }


def blocks_of_a_window(plan: Any) -> int:
    """Count the blocks that the first window's steps read."""
    window = plan.shuffle.window_records
    seen: set[int] = set()
    for step in range(1, window // plan.batch_size + 1):
        seen.update(r // plan.shuffle.block_records for r in plan.step(step, 1).record_ids)
    return len(seen)


def memory() -> dict[str, int]:
    """Return this process's resident bytes: its own (RssAnon) and mapped files (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    given = result["arguments"]

    def row(label: str, key: str, shown: Callable[[float], str]) -> str:
        target = TARGETS.get(key)
        met = "" if target is None else "met" if result[key] <= target else "**missed**"
        limit = "" if target is None else f"at most {shown(target)}"
        return f"| {label} | {shown(result[key])} | {limit} | {met} |"

    lines = [
        "# What planning costs",
        "",
        f"`python tools/bench_plan.py --records {given['records']:_} --ranks {given['ranks']}` on "
        f"{result['machine']}: {given['batch_size']} records a step, "
        f"{given['ranks_per_node']} ranks a node, {given['tokens_per_pack']} tokens a pack; a "
        "picture and a text in each record. CPU time of one process.",
        "",
        "| | measured | target | |",
        "| --- | ---: | ---: | --- |",
        row("open and plan, lengths on disk", "start_seconds", lambda x: f"{x:.2f} s"),
        row("work out the lengths, once", "lengths_seconds", lambda x: f"{x:.1f} s"),
        row("a step, all ranks", "step_milliseconds", lambda x: f"{x:.0f} ms"),
        row("a step, the worst", "step_milliseconds_worst", lambda x: f"{x:.0f} ms"),
        row("memory of a process", "private_megabytes", lambda x: f"{x:.0f} MB"),
        row("mapped and shared", "mapped_megabytes", lambda x: f"{x:.0f} MB"),
        row("tokens, largest rank over mean", "tokens_over_mean", lambda x: f"{x:.3f}"),
        row("patches, largest rank over mean", "patches_over_mean", lambda x: f"{x:.3f}"),
        row("packs a rank", "packs_a_rank", lambda x: f"{x:.0f}"),
        row("blocks read in a window of 61,440 records", "blocks_a_window", lambda x: f"{x:.0f}"),
        row("data state of a checkpoint", "state_bytes", lambda x: f"{x:.0f} bytes"),
    ]
    if "first_batch_seconds" in result:
        size = f"{given['first_batch_records'] / 1e6:g} M records"
        lines += [
            row(f"first batch of {size}, lengths new", "first_batch_new_seconds", _seconds),
            row("- its CPU time", "first_batch_new_cpu_seconds", _seconds),
            row(f"first batch of {size}, lengths on disk", "first_batch_seconds", _seconds),
            row("- its CPU time", "first_batch_cpu_seconds", _seconds),
            "",
            "First batch: wall seconds from the end of imports until one rank of 8 has 32 records "
            "of it decoded, checked and packed; recipe and tokenizer are read, its plan hashed.",
        ]
    return "\n".join([*lines, "", *fill_lines(result["fills"]), ""])


def fill_lines(fills: list[dict[str, float]]) -> list[str]:
    """Return the table of how full packs are."""
    rows = [
        f"| {one['records_a_rank']:.0f} | {one['budget']:.0f} | {one['packs']:.0f} | "
        f"{100 * one['fill']:.1f} % | {100 * one['whole_packs_allow']:.1f} % |"
        for one in fills
    ]
    return [
        "Fill: tokens over packs times budget. A step has its own records and no others, and all "
        "ranks have as many packs: 5.2 packs' worth of tokens are 6 packs. Nothing is padded, so "
        "what is not filled is memory, not work.",
        "",
        "| records a rank | tokens a pack | packs a rank | fill | whole packs allow |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
