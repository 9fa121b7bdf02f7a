#!/usr/bin/env python3
"""Reading data: our shards against WebDataset, energon's tar path, MDS, litdata, datasets, Lance.

    python tools/bench_data.py
    python tools/bench_data.py --records 4000 --repeats 3 --out benchmarks/data_cpu
    python tools/bench_data.py --quick             what is installed, few records, nothing fetched

The pictures are those of tools/fetch_clipart.py, or the emoji where that is not to be had. Peers
get an environment of their own below --cache, with the versions of PINS; one that cannot be had is
a row that says why. Every arm runs in a process of its own, the arms take turns, and each figure is
the median of the rounds. Rates are a CPU second, of files in the page cache; times are wall time,
from the end of imports. Writes OUT.md and OUT.json; `data_timing.py` is one arm.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from data_arms import ARMS, BATCH, OWN  # noqa: E402
from peer_environments import CannotError, peer_python, run  # noqa: E402

OURS = "ours"
PINS = {
    "mds": "mosaicml-streaming==0.13.0",
    "litdata": "litdata==0.2.76",
    "datasets": "datasets==5.0.1",
    "lance": "pylance==14.0.2",
}
INSTALLED = {"webdataset": "webdataset", "energon": "megatron-energon"}  # beside ours
STAGE = "joint_reconstruction"
PATCH_SIZE, TOKENS_PER_PACK, MAX_TEXT = 14, 8192, 4096
MIN_PIXELS, MAX_PIXELS = 3136, 112_896  # of cocoa_qwen2_vl_2b
READS = ("sequential", "shuffled", "random")
COLUMNS = {
    "sequential": ("sequential", "{:,.0f}"),
    "shuffled": ("shuffled", "{:,.0f}"),
    "random": ("random", "{:,.0f}"),
    "first": ("first batch, s", "{:.2f}"),
    "resume": ("resume, s", "{:.2f}"),
    "memory": ("memory, MB", "{:.0f}"),
    "plain_tokens": ("recipe, tokens", "{:,.0f}"),
    "tokens": ("loader, tokens", "{:,.0f}"),
}
TARGET_RANDOM, TARGET_END_TO_END = 5.0, 1.5


def pictures(cache: Path, *, quick: bool) -> tuple[Path, str]:
    """Return a data set of real pictures and what it is; the emoji if no other can be had."""
    from cocoa_dist.config import resolve_path
    from cocoa_dist.data.shard_format import SCHEMA_VERSION

    emoji = Path(resolve_path("asset:emoji/train"))
    if quick:
        return emoji, "the emoji of the package"
    shards = cache / f"shards-{SCHEMA_VERSION}"
    python, tools = sys.executable, ROOT / "tools"
    try:
        if not (shards / "manifest.json").exists():
            run([python, str(tools / "fetch_clipart.py"), str(cache / "clipart")])
            build = [python, str(tools / "build_shards.py"), str(shards), str(cache / "clipart")]
            run([*build, "--layout", "captions", "--tokenizer", "asset:tokenizer"])
    except CannotError as error:
        return emoji, f"the emoji of the package (no clip art: {error})"
    return shards, "clip art and stamps (tools/fetch_clipart.py)"


def lay_down(source: Path, folder: Path, *, limit: int) -> dict[str, Any]:
    """Write the first records plainly and as our shards; return what arms must know."""
    from cocoa_dist.config import resolve_path
    from cocoa_dist.data.shards import ShardReader, write_shards
    from cocoa_dist.data.writing.tokens import TokenCounter

    reader = ShardReader(source)
    records = []
    for number in range(len(reader)):
        record = reader.record(number)
        if len(records) < limit and record.target and record.images:
            records.append(record)
    (folder / "plain").mkdir()
    with (
        (folder / "plain" / "pictures.bin").open("wb") as data,
        (folder / "plain" / "records.jsonl").open("w") as lines,
    ):
        for number, record in enumerate(records):
            data.write(record.images[0])
            row = [f"{number:08d}", len(record.images[0]), record.target[0].text]
            lines.write(json.dumps(row) + "\n")
    tokenizer = resolve_path("asset:tokenizer")
    counter = TokenCounter(tokenizer)
    options = {"count_tokens": counter, "tokenizer_sha256": counter.sha256}
    write_shards(records, folder / OURS, info={}, **options)
    settings = {
        "records": len(records),
        "megabytes": round(sum(len(record.images[0]) for record in records) / 1e6, 1),
        "tokenizer": str(tokenizer / "tokenizer.json"),
        "patch_size": PATCH_SIZE,
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "max_text": MAX_TEXT,
        "tokens_per_pack": TOKENS_PER_PACK,
        "recipe": "debug",
        "stage": STAGE,
        "overrides": overrides(folder / OURS),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def overrides(path: Path) -> list[str]:
    """Return what makes of the debug recipe the sizes that all arms have, read in process."""
    stage = f"stages.{STAGE}"
    image = f"{{min_pixels: {MIN_PIXELS}, max_pixels: {MAX_PIXELS}, augment_shift: 0}}"
    return [
        *(f"{stage}.data.sources.emoji.path={path}", "data.num_workers=0"),
        *(f"{stage}.batch_size={BATCH}", f"data.image={image}"),
        *(f"data.tokens_per_pack={TOKENS_PER_PACK}", f"data.max_text_tokens={MAX_TEXT}"),
        f"model.random.patch_size={PATCH_SIZE}",
    ]


def measure(folder: Path, pythons: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Return rounds of figures by arm, and why some arms have none."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    why: dict[str, str] = {}
    timing = str(ROOT / "tools" / "data_timing.py")
    for name, python in pythons.items():
        try:
            if name not in OWN:
                run([str(python), timing, name, "write", str(folder)])
        except CannotError as error:
            why[name] = f"cannot write: {error}"
    for turn in range(repeats):
        names = [name for name in pythons if name not in why]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                told = run([str(pythons[name]), timing, name, "measure", str(folder)])
                rounds[name].append(json.loads(told.splitlines()[-1]))
            except CannotError as error:
                why[name] = f"cannot read: {error}"
            print(f"round {turn + 1} of {repeats}: {name}", file=sys.stderr, flush=True)
    sizes = {int(one["bytes"]) for each in rounds.values() for one in each}
    if len(sizes) > 1:
        raise SystemExit(f"the arms have read different bytes: {sorted(sizes)}")
    return {"rounds": {k: v for k, v in rounds.items() if v and k not in why}, "why": why}


def medians(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median of every figure of every arm."""
    return {
        name: {key: statistics.median(one[key] for one in turns) for key in turns[0]}
        for name, turns in rounds.items()
    }


def verdicts(found: dict[str, dict[str, float]]) -> list[str]:
    """Say of each target whether it is met."""
    peers = {name: figures for name, figures in found.items() if name not in OWN}
    lines = []

    def say(who: str, what: str, value: float, *, at_least: float) -> None:
        verdict = "met" if value >= at_least else "**missed**"
        lines.append(f"- {who}, {what}: {value:.2f} (target: at least {at_least:g}): {verdict}")

    for who in [name for name in OWN if name in found]:
        own = found[who]
        for key in READS:
            rates = {name: one[key] for name, one in peers.items() if key in one}
            if rates:
                best = max(rates, key=lambda name: rates[name])
                what = f"{key} reads over those of {best}, the fastest peer"
                say(who, what, own[key] / rates[best], at_least=1.0)
        if "mds" in peers:
            ratio = own["random"] / peers["mds"]["random"]
            say(who, "single random reads over those of MDS", ratio, at_least=TARGET_RANDOM)
        if peers:
            best = max(peers, key=lambda name: peers[name]["plain_records"])
            ratio = own["records"] / peers[best]["plain_records"]
            what = f"end to end, the loader's records over those of {best} and the plain recipe"
            say(who, what, ratio, at_least=TARGET_END_TO_END)
    return lines


def tables(figures: dict[str, Any]) -> str:
    """Return the page that stands in OUT.md."""
    found, settings = medians(figures["rounds"]), figures["settings"]
    heads = [title for title, _ in COLUMNS.values()]
    rows = [f"| | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for name in figures["arms"]:
        label = f"{name} {figures['versions'].get(name, '')}".strip()
        if name not in found:
            rows.append(f"| {label} | {figures['why'][name]} {'| ' * len(heads)}|")
            continue
        cells = [
            form.format(found[name][key]) if key in found[name] else "-"
            for key, (_, form) in COLUMNS.items()
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Reading data",
            "",
            f"`{figures['command']}` on {figures['machine']}: {settings['records']:,} records, "
            f"{settings['megabytes']:,} MB of pictures, {figures['data']}. Median of "
            f"{figures['repeats']} rounds in which the arms take turns.",
            "",
            "Reads: records a CPU second, files in the page cache; ours compares checksums, "
            "peers compare none.",
            f"First batch, resume: wall seconds from the end of imports to {BATCH} records decoded "
            "and packed, from the beginning and from the middle of a shuffled pass; ours by its "
            "whole loader, which reads the texts of a small data set to plan the stage. "
            "Memory: what the process grew over a "
            "sequential and a shuffled pass, without mapped files. Recipe: tokens a CPU second, "
            "the same records read in sequence, decoded and resized by Pillow, tokenised, packed. "
            "Loader: the same by ours, with masks, noise, positions and attention plans. "
            "`-`: it has no such.",
            "",
            *rows,
            "",
            *verdicts(found),
            "",
        ]
    )


def versions() -> dict[str, str]:
    """Return which version of each peer is meant."""
    found = {name: pin.partition("==")[2] for name, pin in PINS.items()}
    return found | {name: version(package) for name, package in INSTALLED.items()}


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cocoa_bench_data")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.records, arguments.repeats = min(arguments.records, 96), 1
    if OURS not in arguments.arms:
        parser.error(f"--arms {' '.join(arguments.arms)}: expected {OURS} among them")
    here = Path(sys.executable)
    pythons = {name: here for name in arguments.arms if name == OURS or name in INSTALLED}
    why = dict.fromkeys((n for n in arguments.arms if n not in pythons), "left out with --quick")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if why and not arguments.quick:
        there, why = peer_python(
            arguments.cache / "peers", {name: [pin] for name, pin in PINS.items()}
        )
        pythons |= {n: there for n in arguments.arms if n not in pythons and n not in why}
    source, data = pictures(arguments.cache, quick=arguments.quick)
    folder = Path(tempfile.mkdtemp(dir=arguments.cache))
    try:
        settings = lay_down(source, folder, limit=arguments.records)
        measured = measure(folder, pythons, arguments.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if OURS not in measured["rounds"]:
        raise SystemExit(f"{OURS}: {measured['why'][OURS]}")
    given = f" --records {arguments.records} --repeats {arguments.repeats}"
    figures = {
        "command": f"python tools/bench_data.py{' --quick' if arguments.quick else given}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {version('torch')}",
        "data": data,
        "repeats": arguments.repeats,
        "arms": arguments.arms,
        "versions": versions(),
        "settings": {k: v for k, v in settings.items() if k not in ("tokenizer", "overrides")},
        "why": why | measured["why"],
        "rounds": measured["rounds"],
    }
    page = tables(figures)
    print(page)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(page)
        arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
